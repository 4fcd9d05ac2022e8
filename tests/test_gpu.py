"""What only a GPU can show: graphs, streams, devices, misaligned memory, huge tensors, repeatability, the sanitizers.

The operators' own tests (test_operators.py and its neighbours) run on the GPU too, where there is one.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_pe_chain
import timm
import torch
from cases import TENSORS, Case, check, fused, gradients
from test_pe_chain import Chain
from torch.utils._pytree import tree_flatten

import mpvg_kernels as mk
from mpvg_kernels import backends
from mpvg_kernels.analysis.diagnostics import pos_statistics
from mpvg_kernels.analysis.summary import summarise
from mpvg_kernels.models.deformable_attention import DeformableAttention, reference_points

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible"),
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPS = ("norm", "pool")


@pytest.fixture(params=("triton", "cuda"))
def backend(request):
    """The GPU backends, each chosen for the length of the test; skipped with its reason where it can't run."""
    if request.param not in mk.available_backends("cuda"):
        pytest.skip(f"{request.param}: {backends.status(request.param).reason}")
    with mk.use_backend(request.param):
        yield request.param


def run(op: str, t: dict, case: Case) -> list[torch.Tensor]:
    """Outputs and gradients of a call whose outputs all have gradients of ones."""
    out, _ = fused(op, t, case)
    out = {name: v for name, v in out.items() if v is not None}
    grads = gradients(out, t, {name: torch.ones_like(v) for name, v in out.items()})
    return [*(v.detach() for v in out.values()), *(g for g in grads.values() if g is not None)]


def run_chain(t: dict, case: Chain) -> list[torch.Tensor]:
    """The same of pe_chain."""
    out = test_pe_chain.chain(t, case)
    return [out.detach(), *test_pe_chain.gradients(out, t, torch.ones_like(out)).values()]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("D", (192, 50))
def test_graph_capture_and_replay(op, D, backend):
    """A captured forward and backward, replayed on new data, gives the bits of an ordinary call."""
    case = Case(6, 21, D, BF16, BF16, scale=True, device="cuda")
    t = case.inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what compiles at the first call must not do so inside the capture
        run(op, t, case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, t, case)
    for seed in (1, 2):
        other = Case(6, 21, D, BF16, BF16, scale=True, device="cuda", seed=seed).inputs()
        with torch.no_grad():
            for name, tensor in t.items():
                tensor.copy_(other[name])
        graph.replay()
        assert_same(captured, run(op, other, case))


def test_reduce_overhead_records_cuda_graphs(backend):
    """torch.compile's mode of CUDA graphs takes the operators whole: it skips no graph, and replays on new data."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sizes = dict(img_size=32, depth=2, embed_dim=64, num_heads=2, num_classes=10)
    model = timm.create_model("mpvg_deit_tiny_patch16_224", scheme="mpvg", **sizes).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, recording, replays
        images, found = torch.randn(4, 3, 32, 32, device="cuda"), []
        for forward in (model, compiled):
            model.zero_grad()
            out = forward(images)
            out.square().sum().backward()
            found.append([out.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("op", OPS)
def test_runs_on_the_current_stream(op, backend):
    """The kernels wait for what was queued before them on their stream, and for nothing on another."""
    case = Case(4, 33, 96, device="cuda")
    t = case.inputs()
    want = run(op, t, case)
    x = t["x"].detach().clone()
    late = {**t, "x": torch.zeros_like(x).requires_grad_()}
    run(op, late, case)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # some 30 ms, before which x is still zero
        with torch.no_grad():
            late["x"].copy_(x)
        got = run(op, late, case)
    torch.cuda.synchronize()
    assert_same(got, want)


@pytest.mark.parametrize("op", OPS)
def test_several_streams_at_once(op, backend):
    cases = [Case(3 + i, 40, 192, BF16, BF16, seed=i, device="cuda") for i in range(4)]
    inputs = [case.inputs() for case in cases]
    want = [run(op, t, case) for t, case in zip(inputs, cases, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    got = []
    for _ in range(5):
        got = []
        for stream, t, case in zip(streams, inputs, cases, strict=True):
            with torch.cuda.stream(stream):
                got.append(run(op, t, case))
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("op", OPS)
def test_second_device(op, backend):
    """Tensors on a device that is not the current one: the kernels run there, and the current device stays."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    assert torch.cuda.current_device() == 0
    check(op, Case(3, 20, 192, BF16, BF16, scale=True, device="cuda:1"))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("offset", (1, 2, 4, 7))
@pytest.mark.parametrize("D", (192, 24))
def test_misaligned_storage(op, dtype, offset, D, backend):
    """Every tensor starts some elements into its storage, at no multiple of 16 bytes."""

    def moved(v: torch.Tensor) -> torch.Tensor:
        return torch.cat((v.new_zeros(offset), v.flatten()))[offset:].view(v.shape)

    case = Case(3, 9, D, dtype, dtype, dtype, scale=True, device="cuda")
    t = case.inputs()
    t = {name: moved(v.detach()).requires_grad_(v.requires_grad) for name, v in t.items()}
    check(op, case, t)
    out = {name: v for name, v in fused(op, t, case)[0].items() if v is not None}
    upstream = {name: torch.randn_like(v) for name, v in out.items()}
    want = gradients(out, t, upstream)
    got = gradients(fused(op, t, case)[0], t, {name: moved(u) for name, u in upstream.items()})
    for name in TENSORS:
        torch.testing.assert_close(got[name], want[name])


# More than 2^31 elements: many samples, and one sample of that many.
HUGE = {"samples": (14_400, 196, 768), "tokens": (1, 2_822_400, 768)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", HUGE)
def test_past_2_to_31_elements(op, size, backend):
    """The last rows of a huge tensor, whose offsets don't fit in 32 bits, come out as those of a small one."""
    B, N, D = HUGE[size]
    assert B * N * D > 2**31
    needed, free = 8 * B * N * D * 2, torch.cuda.mem_get_info()[0]  # x, branch, h, y, dy, dh, dx and dbranch at most
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} GiB are free")
    torch.cuda.empty_cache()
    few = 5  # samples, or tokens, at the end
    weight, bias = torch.randn(D, device="cuda"), torch.randn(D, device="cuda")
    x = torch.zeros(B, N, D, device="cuda", dtype=BF16)
    tail = (slice(-few, None),) if size == "samples" else (slice(None), slice(-few, None))
    last = torch.randn(x[tail].shape, device="cuda", dtype=BF16)
    x[tail] = last
    x.requires_grad_()
    small = last.clone().requires_grad_()
    if op == "pool" and size == "tokens":  # the mean is over all of them: all but the last are zero, also normalised
        out, want = mk.pe_norm_pool(x, weight, None) * (N / few), mk.pe_norm_pool(small, weight, None)
    else:
        call = mk.pe_norm_pool if op == "pool" else lambda *args: mk.pe_layer_norm(*args).y
        out, want = call(x, weight, bias), call(small, weight, bias)
        out = out[tail]
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(want)
    (got,) = torch.autograd.grad(out, x, grad)
    (expected,) = torch.autograd.grad(want, small, grad)
    torch.testing.assert_close(got[tail], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(256, 196, 192), (64, 577, 768), (1024, 49, 96), (31, 197, 1280)], ids=str)
def test_bitwise_repeatable(op, shape, backend):
    """The same bits in every run at full size, with other work on the GPU or none."""
    case = Case(*shape, BF16, BF16, scale=True, device="cuda")
    t = case.inputs()
    first = run(op, t, case)
    busy, stop = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(3):
        with torch.cuda.stream(stop):
            for _ in range(10):
                busy = torch.tanh(busy @ busy)
        assert_same(run(op, t, case), first)
    torch.cuda.synchronize()


@pytest.mark.parametrize("hierarchical", (True, False))
@pytest.mark.parametrize("D", (192, 50, 1280))
def test_chain_capture_and_repeatability(D, hierarchical, backend):
    """At full size: the plain formula's result, the same bits in each run, and in a captured graph on new data."""
    case = Chain(12, 197, D, BF16, hierarchical=hierarchical, device="cuda")
    t = case.inputs()
    test_pe_chain.check(case, t)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what compiles at the first call must not do so inside the capture
        first = run_chain(t, case)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(run_chain(t, case), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_chain(t, case)
    other = Chain(12, 197, D, BF16, hierarchical=hierarchical, seed=1, device="cuda").inputs()
    with torch.no_grad():
        for name, tensor in t.items():
            tensor.copy_(other[name])
    graph.replay()
    assert_same(captured, run_chain(other, case))


@pytest.mark.parametrize("D", (192, 24))
def test_chain_on_misaligned_storage(D, backend):
    case = Chain(3, 9, D, F16, F16, device="cuda")
    t = case.inputs()
    moved = {n: torch.cat((v.new_zeros(1), v.detach().flatten()))[1:].view(v.shape) for n, v in t.items()}
    test_pe_chain.check(case, {n: v.requires_grad_() for n, v in moved.items()})


def test_chain_of_wide_and_many_rows(backend):
    """32 layers of 8192 columns, the widest row that stays in registers; and a result of more than 2^31 elements."""
    test_pe_chain.check(Chain(32, 3, 8192, device="cuda"))
    L, K, D = 12, 240_000, 768
    needed, free = 13 * L * K * D, torch.cuda.mem_get_info()[0]  # two tables in bf16 and scratch rows in fp32
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} GiB are free")
    torch.cuda.empty_cache()
    weight, few = torch.randn(L, D, device="cuda"), 5
    pos = torch.randn(K, D, device="cuda", dtype=BF16).requires_grad_()
    small = pos[-few:].detach().requires_grad_()
    out, want = mk.pe_chain(pos, weight), mk.pe_chain(small, weight)
    assert_same([out[:, -few:]], [want])
    (got,) = torch.autograd.grad(out, pos, torch.ones_like(out))
    (expected,) = torch.autograd.grad(want, small, torch.ones_like(want))
    assert_same([got[-few:]], [expected])


def sanitizer() -> str | None:
    """compute-sanitizer's path, from PATH or the CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [
        shutil.which("compute-sanitizer"),
        *(shutil.which("compute-sanitizer", path=f"{h}/bin") for h in homes if h),
    ]
    return next(filter(None, found), None)


def races(text: str) -> list[str]:
    """The races that racecheck reports, but for those of a store in Triton's own reductions with itself.

    Where a tile has fewer elements than the program has threads, Triton lets several threads hold the same element, and
    its tl.sum has each of them store the same value in the same place.
    """
    found = re.findall(r"Race reported between (.*)\n.*?and (.*?) \[", text)
    return [
        f"{first}; {second}"
        for first, second in found
        if not (first == second and first.startswith("Write") and re.search(r" in standard\.py:\d+$", first))
    ]


def test_races_that_count():
    same = "Write access at pool_kernel+0x10 in standard.py:287"
    report = "========= Error: Race reported between {}\n=========     and {} [4 hazards]\n"
    assert races(report.format(same, same)) == []
    for first, second in (
        (same, same.replace("0x10", "0x20")),
        (same, same.replace("Write", "Read")),
        (same.replace("Write", "Read"), same.replace("Write", "Read")),
        ("Write access at k+0x1 in pe_layer_norm.cuh:7",) * 2,
        ("Write access at k+0x1",) * 2,
    ):
        assert races(report.format(first, second)) == [f"{first}; {second}"]


@pytest.mark.parametrize("tool", ("memcheck", "racecheck", "initcheck"))
def test_sanitizer(tool):
    """No access out of bounds, no race in shared memory, no read of what was never written, in any kernel."""
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    # Without the caching allocator each tensor has its own bounds, and is not "written" by the one before it.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "10000"]
    command += [sys.executable, str(Path(__file__).with_name("gpu_kernels.py"))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    if tool == "racecheck" and done.returncode == 99:
        assert "Race reported" in output and not races(output), races(output)[:20]
    else:
        assert done.returncode == 0, output[-4000:]
    assert "every kernel ran and is right" in done.stdout


def test_analysis_finds_what_it_finds_on_the_cpu():
    """The numbers of `mpvg analyze` and of the looks while training."""
    torch.manual_seed(0)
    options = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    model, x = timm.create_model("mpvg_deit_tiny_patch16_224", scheme="mpvg", **options), torch.randn(3, 3, 32, 48)
    found = []
    for device in ("cpu", "cuda"):
        model.to(device)
        numbers = summarise(model, [x.to(device)]).numbers() | pos_statistics(model, x.to(device))
        found.append(tree_flatten(numbers))
    (on_cpu, cpu_shape), (on_gpu, gpu_shape) = found
    assert cpu_shape == gpu_shape
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert a == b if isinstance(a, str | None) else b == pytest.approx(a, rel=1e-2, abs=1e-3), (a, b)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative: ||a - b|| / ||b||."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def adapter_step(backend: str, dtype: torch.dtype, device: str = "cuda") -> dict[str, torch.Tensor]:
    """The four maps of a small ViT-Adapter and the gradients of all its parameters, dtype bf16 under autocast."""
    torch.manual_seed(0)
    sizes = dict(img_size=64, embed_dim=48, depth=4, num_heads=3, deform_num_heads=3, conv_inplane=16, init_values=0.5)
    sizes |= dict(window_size=3, global_layers=(1,), interaction_indexes=((0, 1), (2, 3)), drop_path_rate=0.2)
    model = timm.create_model("mpvg_vit_adapter_tiny", scheme="mpvg", features_only=True, **sizes)
    for parameter in model.parameters():  # so that each matters: none is zero or one
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    model.to(device).train()
    for module in model.modules():  # behind a BatchNorm in training biases have no gradient but rounding
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    image, weights = torch.randn(2, 3, 64, 96), [torch.randn(2, 48, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    with mk.use_backend(backend), torch.autocast(device, BF16, enabled=dtype == BF16):
        maps = model(image.to(device))
    sum((m.float() * w.to(device)).sum() for m, w in zip(maps, weights, strict=True)).backward()
    found = {f"map {i}": m.detach() for i, m in enumerate(maps)}
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


def test_adapter(backend):
    """ViT-Adapter in fp32: its maps and each parameter's gradient are those of the plain formula."""
    found, expected = adapter_step(backend, F32), adapter_step("reference", F32)
    assert found.keys() == expected.keys()
    wrong = {name: distance(found[name], expected[name]) for name in found}
    assert not {name: off for name, off in wrong.items() if not off <= 1e-3}


def test_adapter_under_autocast(backend):
    """In bf16: no farther from fp32 than the plain formula in bf16, each map, and all gradients together."""
    exact, plain, found = (adapter_step(*args) for args in (("reference", F32), ("reference", BF16), (backend, BF16)))
    results = []
    for step in (exact, plain, found):
        maps = {name: step.pop(name) for name in list(step) if name.startswith("map")}
        results.append(maps | {"gradients": torch.cat([g.flatten() for g in step.values()])})
    for name, right in results[0].items():
        allowed = 1.25 * distance(results[1][name], right) + torch.finfo(BF16).eps
        assert distance(results[2][name], right) <= allowed, name


@pytest.mark.parametrize("grids", ([(12, 16)], [(24, 32), (12, 16), (6, 8)]), ids=("extractor", "injector"))
def test_deformable_attention_is_the_cpus(grids):
    """Output and gradients; some points lie outside of the maps.

    In fp64: where a point comes to lie on the other side of a pixel's centre its gradient is another.
    """
    torch.manual_seed(0)
    attn, queries = DeformableAttention(48, len(grids), num_heads=3).double(), [(12, 16), (6, 8)]
    torch.nn.init.normal_(attn.sampling_offsets.weight)
    torch.nn.init.normal_(attn.attention_weights.weight)
    points = reference_points(queries)
    sizes = len(points), sum(rows * columns for rows, columns in grids)
    inputs, grad, found = [torch.randn(2, n, 48).double() for n in sizes], torch.randn(2, len(points), 48).double(), []
    for device in ("cpu", "cuda"):
        attn.to(device).zero_grad()
        query, features = (v.detach().to(device).requires_grad_() for v in inputs)
        out = attn(query, points.to(device), features, grids)
        out.backward(grad.to(device))
        found.append([out, query.grad, features.grad, *(p.grad.clone() for p in attn.parameters())])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert distance(on_gpu.cpu(), on_cpu) <= 1e-5
