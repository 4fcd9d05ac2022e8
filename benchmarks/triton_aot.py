"""Compiles every Triton kernel ahead of time, without a GPU: for resources.py and tests/test_triton_aot.py.

The launchers themselves run, on tensors of the `meta` device and with a stand-in for the GPU's driver that only names
an architecture; each launch then compiles what it would have launched. So block sizes, warps and specialisations are
those of a real call. Registers and spills come from `ptxas -v`. This happens in subprocesses (this file run as a
script), one an architecture, because Triton's interpreter, which the tests have on, leaves nothing to compile, and
because Triton has one driver a process.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100)
LAYERS = 12


class Call(NamedTuple):
    """A call of all launchers; dtypes are torch's names ("bfloat16"), `branch` is None without a branch."""

    N: int
    D: int
    x: str
    branch: str | None
    params: str
    out: str
    pos: bool = True
    num_prefix_tokens: int = 0
    pos_norm: bool = True
    hierarchical: bool = True


class Kernel(NamedTuple):
    """A compiled kernel. `spilled` counts bytes stored to local memory and loaded from it."""

    operator: str
    direction: str
    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int
    wide_loads: int
    atomics: int


def compile_calls(
    calls: dict[str, Call], architectures: tuple[int, ...] = ARCHITECTURES
) -> dict[int, dict[str, list[Kernel]]]:
    """{architecture: {name of the call: its kernels, in the order of their launches}}; all architectures at a time."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MPVG_TUNED")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    started = {
        arch: subprocess.Popen(
            [sys.executable, __file__, str(arch), json.dumps(calls)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )  # fmt: skip
        for arch in architectures
    }
    found = {}
    for arch, process in started.items():
        out, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"compiling for sm_{arch} failed: {errors[-3000:]}")
        kernels = json.loads(out.splitlines()[-1])
        found[arch] = {name: [Kernel(*kernel) for kernel in group] for name, group in kernels.items()}
    return found


class _Driver:
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


def _ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as `ptxas -v` reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx)[1]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", source, "-o", source.with_suffix(".cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(re.search(r"Used (\d+) registers", log)[1]), int(spills[1]) + int(spills[2])


def _launch(call: Call):
    """Call the launchers with every gradient asked for; yields (operator, direction) before each."""
    import torch

    from mpvg_kernels.triton_ops import pe_chain, pe_layer_norm, pe_norm_pool

    def empty(*shape, dtype=call.params):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    B, N, D = 256, call.N, call.D
    x = empty(B, N, D, dtype=call.x)
    branch = scale = pos = pos_weight = None
    if call.branch:
        branch, scale = empty(B, N, D, dtype=call.branch), empty(B, dtype=call.branch)
    if call.pos:
        pos, pos_weight = empty(N - call.num_prefix_tokens, D), empty(D) if call.pos_norm else None
    weight, prefix = empty(D), call.num_prefix_tokens
    out_dtype = getattr(torch, call.out)
    inputs = (x, branch, scale, weight, weight, pos, pos_weight, pos_weight, 1e-6, 1e-6, prefix, out_dtype, True)
    rest = (weight, scale, pos, pos_weight, 1e-6, prefix, x.dtype, (x if branch is None else branch).dtype, 127)

    yield "pe_layer_norm", "fwd"
    y, h, pos_out, stats = pe_layer_norm.forward(*inputs)
    h = x if h is None else h
    yield "pe_layer_norm", "bwd"
    pe_layer_norm.backward(y, h, pos_out, h, stats, *rest)
    yield "pe_norm_pool", "fwd"
    out, h, stats, s = pe_norm_pool.forward(*inputs)
    yield "pe_norm_pool", "bwd"
    pe_norm_pool.backward(out, x if h is None else h, stats, s, *rest)

    rows, weights = empty(N, D), empty(LAYERS, D)
    yield "pe_chain", "fwd"
    tables = pe_chain.forward(rows, weights, weights, 1e-6, call.hierarchical, out_dtype)
    yield "pe_chain", "bwd"
    pe_chain.backward(tables, rows, weights, weights, 1e-6, call.hierarchical, 7)


def _main(arch: int, calls: dict[str, list]) -> None:
    """Compile all calls for `arch`; prints {name: [Kernel]} as JSON."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_Driver(arch))
    compiled, run, at = [], JITFunction.run, ("", "")

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((*at, self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    checked, results = {}, {}
    for name, call in calls.items():
        compiled.clear()
        for at in _launch(Call(*call)):  # noqa: B007  (read by compile_only)
            pass
        results[name] = []
        for operator, direction, kernel, binary in compiled:
            ptx = binary.asm["ptx"]
            if ptx not in checked:  # calls share their small kernels
                wide, atomics = (len(re.findall(p, ptx)) for p in (WIDE_LOAD, r"\b(?:atom|red)\."))
                facts = binary.metadata
                checked[ptx] = facts.num_warps, *_ptxas(ptx, arch), facts.shared, wide, atomics
            results[name].append(Kernel(operator, direction, kernel, *checked[ptx]))
    print(json.dumps(results))


# 16 bytes at a time, into registers or, in a pipelined loop, into shared memory.
WIDE_LOAD = r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global\S* \[[^]]*\], \[[^]]*\], 0x10"

if __name__ == "__main__":
    _main(int(sys.argv[1]), json.loads(sys.argv[2]))
