"""Running the CUDA kernels on the host: that it shows mistakes (negative controls), and what only it can test.

The operators' own suite runs on the `cuda` backend too; without a GPU that is the host run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_host_library
import pytest
import torch

import mpvg_kernels as mk
from mpvg_kernels import backends

ROOT = Path(__file__).parents[1]
THREADS = 64
pytestmark = pytest.mark.xdist_group(__name__)  # one program for all tests


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    """The program of tests/cuda_host/controls.cpp, under address sanitizer: call it with a case's name."""
    if cuda_host_library.missing():
        pytest.skip(cuda_host_library.missing())
    folder = tmp_path_factory.mktemp("controls")
    flags = ["-O1", "-g1"]
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if os.path.isabs(library):
        flags.append("-fsanitize=address")
    sources = [cuda_host_library.HOST / name for name in ("fibers.cpp", "controls.cpp")]
    objects = cuda_host_library.compile_objects(sources, folder, flags)
    subprocess.run(["g++", *flags, *objects, "-o", folder / "controls"], check=True)

    def run(case: str, seed: int = 0) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"CUDA_HOST_SEED": str(seed)}
        return subprocess.run([folder / "controls", case], capture_output=True, text=True, env=environment)

    run.has_sanitizer = "-fsanitize=address" in flags
    return run


def numbers(result: subprocess.CompletedProcess) -> list[float]:
    assert result.returncode == 0 and not result.stdout.startswith("error"), result.stdout + result.stderr
    return [float(word) for word in result.stdout.split()]


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_right_kernels_give_right_results(controls, seed):
    assert numbers(controls("barrier", seed)) == [(i - 1) % THREADS for i in range(THREADS)]
    groups = [float(sum(range(i // 8 * 8, i // 8 * 8 + 8))) for i in range(THREADS)]
    assert numbers(controls("group_sum", seed)) == groups
    halves = [float(sum(range(i // 32 * 32, i // 32 * 32 + 16))) if i % 32 < 16 else i for i in range(THREADS)]
    assert numbers(controls("half_warps", seed)) == halves
    assert numbers(controls("copy", seed)) == list(range(THREADS))


@pytest.mark.parametrize("case", ("missing_barrier", "copy_without_wait", "unwritten"))
def test_reading_too_early_and_not_writing_give_nan(controls, case):
    assert any(v != v for v in numbers(controls(case)))


def test_threads_run_in_an_order_of_the_seed(controls):
    first, again, other = (controls("missing_barrier", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "case,message",
    [
        ("divergent_barrier", r"divergent barrier: not all threads reach it: .*__syncthreads.*thread 40 on: has ended"),
        ("two_barriers", r"divergent barrier: thread 0 is at __syncthreads.*thread 32 at __syncthreads"),
        ("divergent_shuffle", r"the mask names a lane that has ended|deadlock"),
        ("shuffle_from_outside_its_mask", "reads a lane that its mask leaves out"),
        ("shuffle_past_its_width", "reads a lane outside of its width"),
        ("unaligned_copy", "a copy is not aligned to its size"),
    ],
)
def test_mistakes_are_errors(controls, case, message):
    result = controls(case)
    assert re.match(rf"error: cuda_host: block 0: .*{message}", result.stdout), result.stdout + result.stderr


def test_shared_memory_has_bounds(controls):
    if not controls.has_sanitizer:
        pytest.skip("g++ has no libasan.so")
    result = controls("out_of_bounds")
    assert result.returncode and "AddressSanitizer" in result.stderr and "out_of_bounds" in result.stderr


def test_one_declaration_of_shared_memory():
    """The host's header knows dynamic shared memory alone; static arrays would be each thread's own there."""
    uses = [
        line
        for path in (ROOT / "csrc/cuda").iterdir()
        for line in path.read_text().splitlines()
        if "__shared__" in line
    ]
    assert len(uses) == 1 and "extern" in uses[0]


def host_run():
    if "cpu" not in backends.status("cuda").devices:
        pytest.skip("the cuda backend does not run on the host here")


def test_results_do_not_depend_on_the_order_of_threads():
    host_run()
    code = (
        "import torch, mpvg_kernels as mk\n"
        "torch.manual_seed(0)\n"
        "x, w, p = torch.randn(5, 40, 96).requires_grad_(), torch.randn(96).requires_grad_(), torch.randn(40, 96)\n"
        "with mk.use_backend('cuda'):\n"
        "    y, _, q = mk.pe_layer_norm(x, w, w, p, w, w)\n"
        "    (y.sin().sum() + mk.pe_norm_pool(x, w, w, q, w, w).sin().sum()).backward()\n"
        "print(y.sum().item().hex(), x.grad.double().sum().item().hex(), w.grad.double().sum().item().hex())\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"CUDA_HOST_SEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop().split()) == 3


@pytest.mark.parametrize("width", (16, 33))
@pytest.mark.parametrize("op", ("norm", "pool"))
def test_offsets_past_32_bits(op, width):
    """Rows that lie 2^31 elements and more apart, in memory that is never touched but for them."""
    host_run()
    from mpvg_kernels.ops import pe_layer_norm, pe_norm_pool

    B, N, step = 3, 2, 2**30 + 1024
    try:
        memory = torch.empty((B - 1) * step + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GB of address space: {error}")

    def far(offset: int) -> torch.Tensor:
        view = memory.as_strided((B, N, width), (step, 512, 1), offset)
        view.copy_(torch.randn(B, N, width))
        return view

    x, branch, dy, dh = far(0), far(64), far(128), far(192)
    weight = torch.randn(width)
    module = pe_norm_pool if op == "pool" else pe_layer_norm

    def call(x, branch, dy, dh):
        results = module.FORWARD["cuda"](
            x, branch, None, weight, weight, None, None, None, 1e-6, 1e-6, 0, torch.bfloat16, True
        )
        tail = (weight, None, None, None, 1e-6, 0, torch.bfloat16, torch.bfloat16, 7)
        if op == "pool":
            dout = dy[:, 0]
            return *results, *module.BACKWARD["cuda"](dout, dh, results[2], results[3], *tail)
        return *results, *module.BACKWARD["cuda"](dy, dh, None, x, results[3], *tail)

    near = call(*(t.contiguous() for t in (x, branch, dy, dh)))
    for a, b in zip(call(x, branch, dy, dh), near, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # vector and scalar kernels add in another order
            torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("width", (8193, 20001))
def test_rows_wider_than_the_register_kernels(width):
    host_run()
    from cases import Case, check

    with mk.use_backend("cuda"):
        for op in ("norm", "pool"):
            check(op, Case(2, 3, width, branch_dtype=torch.float32, scale=True, num_prefix_tokens=1))


@pytest.mark.parametrize("hierarchical", (True, False))
def test_chain_rows_wider_than_the_register_kernels(hierarchical):
    host_run()
    from test_pe_chain import Chain, check

    with mk.use_backend("cuda"):
        check(Chain(2, 1, 8193, hierarchical=hierarchical))


def test_wide_aligned_rows_take_several_warps():
    host_run()
    from cases import Case, check

    with mk.use_backend("cuda"):
        for op in ("norm", "pool"):
            check(op, Case(2, 2, 4096, torch.bfloat16, torch.bfloat16, torch.bfloat16))
