"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100: no spills, no atomics, wide loads.

The launchers themselves run, on tensors of the `meta` device and with a stand-in for the GPU's driver that only names
an architecture; each launch then compiles what it would have launched. So block sizes, warps and specialisations are
those of a real call. Registers and spills come from `ptxas -v`. This happens in subprocesses (this file run as a
script), one an architecture, because the test run has Triton's interpreter on, which leaves nothing to compile.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ARCHITECTURES = (80, 90, 100)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# name -> (N, D, x, branch, parameters, output, pos, prefix tokens): widths of one and of two column blocks, aligned
# rows and not, several rows a program and 16 warps a row, every dtype and every flag.
CASES = {
    "deit_tiny": (196, 192, BF16, BF16, F32, BF16, True, 0),
    "deit_small_fp32": (196, 384, F32, None, F32, F32, True, 0),
    "deit_base_mixed": (197, 768, F32, BF16, F32, BF16, True, 1),
    "deit_base_no_pos": (197, 768, BF16, BF16, BF16, BF16, False, 0),
    "swin_fp16": (3136, 96, F16, None, F16, F16, True, 0),
    "t2t_fp32": (196, 256, F32, F32, F32, F32, True, 0),
    "huge_mixed": (256, 1280, BF16, F16, F32, F32, True, 4),
    "odd": (50, 33, F32, F16, F32, F32, True, 0),
    "widest": (64, 8192, F32, F32, F32, F32, True, 0),
}

# Three programs of four warps a multiprocessor; ptxas gives most kernels 128 or fewer.
MOST_REGISTERS = 168
# ptxas puts a few words in local memory by its own choice too, where that lets one more program fit (at 48, 64 or 128
# registers, with up to 255 to be had). That is no shortage of registers: up to so many bytes, stored and loaded, pass.
TRADED_BYTES = 48


def compile_case(N, D, x_dtype, branch_dtype, param_dtype, out_dtype, has_pos, prefix) -> None:
    """Call the four launchers, with every gradient asked for."""
    from mpvg_kernels.triton_ops import pe_layer_norm, pe_norm_pool

    def empty(*shape, dtype=param_dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    B = 64
    x = empty(B, N, D, dtype=x_dtype)
    branch = scale = pos = pos_weight = None
    if branch_dtype is not None:
        branch, scale = empty(B, N, D, dtype=branch_dtype), empty(B, dtype=branch_dtype)
    if has_pos:
        pos, pos_weight = empty(N - prefix, D), empty(D)
    weight = empty(D)
    inputs = (x, branch, scale, weight, weight, pos, pos_weight, pos_weight, 1e-6, 1e-6, prefix, out_dtype, True)
    rest = (weight, scale, pos, pos_weight, 1e-6, prefix, x_dtype, branch_dtype or x_dtype, 127)

    y, h, pos_out, stats = pe_layer_norm.forward(*inputs)
    h = x if h is None else h
    pe_layer_norm.backward(y, h, pos_out, h, stats, *rest)
    out, h, stats, s = pe_norm_pool.forward(*inputs)
    pe_norm_pool.backward(out, x if h is None else h, stats, s, *rest)


class Driver:
    """Stands in for a GPU's driver: names the target, and has no device to launch on."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def ptxas(ptx: str, arch: int) -> dict[str, int]:
    """Registers a thread and bytes spilled, as `ptxas -v` reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx)[1]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", source, "-o", source.with_suffix(".cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return dict(registers=int(re.search(r"Used (\d+) registers", log)[1]), spilled=int(spills[1]) + int(spills[2]))


def main(arch: int) -> None:
    """Compile all cases for `arch`; prints {case: [a dict for each compiled kernel]} as JSON."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(Driver(arch))
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    checked, results = {}, {}
    for name, case in CASES.items():
        compiled.clear()
        compile_case(*case)
        results[name] = []
        for kernel, binary in compiled:
            ptx = binary.asm["ptx"]
            if ptx not in checked:  # cases share their small kernels
                checked[ptx] = ptxas(ptx, arch) | dict(
                    warps=binary.metadata.num_warps,
                    wide_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
                    atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
                )
            results[name].append(checked[ptx] | dict(kernel=kernel))
    print(json.dumps(results))


@functools.cache
def results() -> dict[int, dict[str, list[dict]]]:
    """What `main` finds for each architecture, every one in a process of its own, all at the same time."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [env.get("PYTHONPATH")])])
    started = {
        arch: subprocess.Popen(
            [sys.executable, __file__, str(arch)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for arch in ARCHITECTURES
    }
    found = {}
    for arch, process in started.items():
        out, errors = process.communicate()
        assert process.returncode == 0, f"sm_{arch}: {errors[-3000:]}"
        found[arch] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_compiles_within_registers(arch, case):
    pytest.importorskip("triton", reason="Triton is not installed")
    kernels = results()[arch][case]
    assert {"forward_kernel", "backward_kernel", "pool_kernel", "output_kernel", "batch_sums_kernel"} <= {
        k["kernel"] for k in kernels
    }
    for k in kernels:
        available = min(255, 65536 // (32 * k["warps"]))
        allowed = TRADED_BYTES if k["registers"] <= available - 8 else 0
        assert k["spilled"] <= allowed, f"{k['kernel']} spills {k['spilled']} bytes at {k['registers']} registers"
        assert k["atomics"] == 0, f"{k['kernel']} uses atomics: its results would change from run to run"
        if CASES[case][1] % 16 == 0:  # other rows are read one element at a time, by more registers of addresses
            assert k["registers"] <= MOST_REGISTERS, f"{k['kernel']} takes {k['registers']} registers"
            if k["kernel"] in ("forward_kernel", "backward_kernel"):
                assert k["wide_loads"], f"{k['kernel']} reads aligned rows in less than 16 bytes at a time"


def test_every_kernel_is_compiled():
    """A kernel added to triton_ops and reached by no case here would go untested."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from mpvg_kernels.triton_ops import pe_layer_norm, pe_norm_pool

    defined = {name for module in (pe_layer_norm, pe_norm_pool) for name in vars(module) if name.endswith("_kernel")}
    for cases in results().values():
        assert {k["kernel"] for case in cases.values() for k in case} == defined


@pytest.mark.parametrize("N", (1, 3, 196, 3136))
def test_row_tiles(N):
    """Tiles cover the row, keep to 16 elements a thread, waste no more than half their lanes, and fit in a block."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from mpvg_kernels.triton_ops.tiles import RULES, row_tile

    for D in (*range(1, 1300), 2048, 3000, 4096, 8192):
        for warps in (RULES.warps, RULES.finishing_warps):
            tile = row_tile(D, N, warps)
            width = sum(tile.blocks)
            assert D <= width < max(2 * D, 64)
            assert tile.rows * width <= RULES.elements_per_thread * 32 * tile.num_warps
            assert tile.rows == 1 or tile.num_warps <= warps
            assert tile.rows < 2 * N
            assert all(b & (b - 1) == 0 for b in (*tile.blocks, tile.rows, tile.num_warps))
            assert tile.num_warps <= RULES.max_warps
    assert row_tile(192, N).blocks == (128, 64)


@pytest.mark.parametrize("count", (0, 1, 5, 64, 1000))
@pytest.mark.parametrize("at_most", (0, 1, 7, 64))
def test_slices_cover(count, at_most):
    pytest.importorskip("triton", reason="Triton is not installed")
    from mpvg_kernels.triton_ops.tiles import slices

    number, length = slices(count, at_most)
    assert 1 <= number <= max(1, at_most)
    assert number * length >= count
    assert (number - 1) * length < max(count, 1)  # no slice is empty


if __name__ == "__main__":
    main(int(sys.argv[1]))
