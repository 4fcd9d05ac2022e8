"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100: no spills, no atomics, wide loads; and the
launch choices: tiles, slices and pipeline depths.
"""

import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from triton_aot import ARCHITECTURES, Call, Kernel, compile_calls  # noqa: E402

pytestmark = pytest.mark.xdist_group(__name__)  # one compilation for all tests

F32, BF16, F16 = "float32", "bfloat16", "float16"

# Widths of one and of several column blocks, aligned rows and not, several rows a program and 16 warps a row, every
# dtype and every flag.
CALLS = {
    "deit_tiny": Call(196, 192, BF16, BF16, F32, BF16),
    "deit_small_fp32": Call(196, 384, F32, None, F32, F32, hierarchical=False),
    "deit_base_mixed": Call(197, 768, F32, BF16, F32, BF16, num_prefix_tokens=1),
    "deit_base_no_pos": Call(197, 768, BF16, BF16, BF16, BF16, pos=False),
    "swin_fp16": Call(3136, 96, F16, None, F16, F16),
    "t2t_fp32": Call(196, 256, F32, F32, F32, F32, pos_norm=False),
    "huge_mixed": Call(256, 1280, BF16, F16, F32, F32, num_prefix_tokens=4),
    "odd": Call(50, 33, F32, F16, F32, F32, hierarchical=False),
    "widest": Call(64, 8192, F32, F32, F32, F32),
}

# Three programs of four warps a multiprocessor; ptxas gives most kernels 128 or fewer.
MOST_REGISTERS = 168
# Nothing by the Triton that the kernels are tuned with. 3.6 (PyTorch 2.11) spills in one kernel, the backward of
# deit_base_mixed on sm_90: 20 bytes a thread, stores and loads together, which is a few registers once.
MOST_SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 32


@pytest.fixture(scope="module")
def results() -> dict[int, dict[str, list[Kernel]]]:
    return compile_calls(CALLS)


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("arch", ARCHITECTURES, ids="sm_{}".format)
def test_compiles_within_registers(arch, case, results):
    kernels = results[arch][case]
    assert {"forward_kernel", "backward_kernel", "pool_kernel", "output_kernel", "batch_sums_kernel"} <= {
        k.kernel for k in kernels
    }
    for k in kernels:
        assert k.spilled <= MOST_SPILLED, f"{k.kernel} spills {k.spilled} bytes at {k.registers} registers"
        assert k.registers * 32 * k.warps <= 65536, f"{k.kernel} can't be launched"
        assert k.atomics == 0, f"{k.kernel} uses atomics: its results would change from run to run"
        if CALLS[case].D % 16 == 0:  # other rows are read one element at a time, by more registers of addresses
            assert k.registers <= MOST_REGISTERS, f"{k.kernel} takes {k.registers} registers"
            if k.kernel in ("forward_kernel", "backward_kernel"):
                assert k.wide_loads, f"{k.kernel} reads aligned rows in less than 16 bytes at a time"


def test_every_kernel_is_compiled(results):
    """A kernel added to triton_ops and reached by no case here would go untested."""
    from mpvg_kernels.triton_ops import pe_chain, pe_layer_norm, pe_norm_pool

    modules = {module.__name__.rpartition(".")[2]: module for module in (pe_chain, pe_layer_norm, pe_norm_pool)}
    defined = {(op, name) for op, module in modules.items() for name in vars(module) if name.endswith("_kernel")}
    for cases in results.values():
        assert defined <= {(k.operator, k.kernel) for case in cases.values() for k in case}


@pytest.mark.parametrize("N", (1, 3, 49, 196, 577, 3136))
def test_row_tiles(N):
    """Tiles cover the row, keep to the elements a thread that the rules name, and fit in a block; few rows idle."""
    from mpvg_kernels.triton_ops.tiles import RULES, row_tile

    for D in (*range(1, 1300), 2048, 3000, 4096, 8192):
        for rules in (RULES.pe_layer_norm_fwd, RULES.finishing):
            for itemsize in (2, 4):
                tile = row_tile(D, N, itemsize, rules)
                assert D <= tile.width * tile.blocks < max(2 * D, 64)
                assert tile.elements_per_thread <= rules.elements_per_thread + 8 * (tile.num_warps == RULES.max_warps)
                assert tile.rows == 1 or tile.num_warps <= rules.warps
                assert tile.rows < 2 * N
                assert all(b & (b - 1) == 0 for b in (tile.width, tile.rows, tile.num_warps))
                assert tile.num_warps <= RULES.max_warps


@pytest.mark.parametrize("D", (96, 192, 256, 384, 512, 768, 1024, 1280))
def test_vit_widths_waste_no_lane(D):
    from mpvg_kernels.triton_ops.tiles import RULES, row_tile

    for itemsize in (2, 4):
        tile = row_tile(D, 196, itemsize, RULES.pe_layer_norm_bwd)
        assert tile.width * tile.blocks == D
        lanes = 32 * tile.num_warps // tile.rows
        assert lanes <= 32 or D > 768  # a row in one warp: its reductions need no barrier
        assert tile.width // lanes * itemsize >= 8  # and 8 or 16 bytes a load


@pytest.mark.parametrize("count", (0, 1, 5, 64, 1000))
@pytest.mark.parametrize("programs,wave", [(1, 1), (25, 528), (289, 528), (600, 528)])
@pytest.mark.parametrize("at_most", (0, 1, 7, 64))
def test_slices_cover(count, programs, wave, at_most):
    from mpvg_kernels.triton_ops.tiles import slices

    number, length = slices(count, programs, wave, at_most)
    assert 1 <= number <= max(1, at_most)
    assert number * length >= count
    assert (number - 1) * length < max(count, 1)  # no slice is empty


def test_slices_fill_whole_waves():
    from mpvg_kernels.triton_ops.tiles import slices

    assert slices(256, 25, 528, 256) == (20, 13)  # 500 of 528 programs; 21 slices would be as long
    # 289 programs are 0.55 of a wave and cost 64 + 1; five slices each are 2.74 waves, and cost 3 * (13 + 1).
    assert slices(64, 289, 528, 64) == (5, 13)
    assert slices(3, 10_000, 528, 3) == (1, 3)  # enough programs as they are


def test_pipelines_have_enough_bytes_in_flight():
    """As many stages as bring LaunchRules.bytes_in_flight, none for a loop of one round."""
    from mpvg_kernels.triton_ops.tiles import RULES, row_tile, stages

    for kernel in ("pe_layer_norm_fwd", "pe_layer_norm_bwd", "pe_norm_pool_fwd", "pe_norm_pool_bwd"):
        rules = getattr(RULES, kernel)
        for D in (192, 384, 768, 1280):
            for itemsize in (2, 4):
                tile = row_tile(D, 196, itemsize, rules)
                deep = stages(tile, itemsize, 100, rules)
                one = rules.threads * tile.elements_per_thread * itemsize
                assert (deep - 1) * one >= RULES.bytes_in_flight > (deep - 2) * one
                # Shared memory holds all stages but the one at work; a multiprocessor has 164 KB or more.
                assert (deep - 1) * one <= 80 << 10
                assert stages(tile, itemsize, 1, rules) == 1
