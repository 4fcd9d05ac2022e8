"""Every backend against the formula in fp64, by the accuracy rule; layouts, containment, repeatability, autograd."""

import itertools

import pytest
import torch
from cases import TENSORS, Case, check, compare, fused, gradients
from layouts import ALIGNED, LAYOUTS, at_address, with_layout
from torch.autograd import forward_ad, gradcheck

import mpvg_kernels as mk

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
OPS = ("norm", "pool")

pytestmark = pytest.mark.parametrize("backend", [*mk.backends.BACKENDS, "cpp, autograd in Python"], indirect=True)

# Shapes: smallest, odd widths, one past a vector, a prime, ViT widths, a wide row, more tokens than a tile.
SHAPES = [
    (1, 1, 1),
    (2, 3, 7),
    (3, 5, 17),
    (2, 1, 33),
    (5, 19, 48),
    (2, 4, 192),
    (1, 3, 384),
    (2, 2, 1280),
    (17, 2, 20),
    (2, 1, 16),  # fewer elements than a warp has threads, in aligned rows
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(op, shape, backend, device):
    check(op, Case(*shape, branch_dtype=F32, scale=True, device=device))


# (x, branch, parameters, output)
DTYPES = [
    (F32, None, F32, None),
    (BF16, None, BF16, None),
    (F16, None, F16, None),
    (BF16, None, F32, None),
    (F32, BF16, F32, BF16),
    (F32, F16, F32, F16),
    (BF16, F32, BF16, None),
    (BF16, F16, F32, F32),
    (F16, F16, F16, BF16),
    (F64, None, F64, None),
    (F64, F64, F64, None),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normed_pos_shapes(op, shape, backend, device):
    check(op, Case(*shape, branch_dtype=F32, normed_pos=True, device=device))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x).split(".")[-1] for x in d))
@pytest.mark.parametrize("D", (40, 64))  # ragged, and whole vectors in every dtype
def test_dtypes(op, dtypes, D, backend, device):
    x, branch, param, out = dtypes
    if x == F64 and backend in ("triton", "cuda"):
        with pytest.raises(TypeError, match="float64"):
            fused(op, Case(dtype=F64, param_dtype=F64, device=device).inputs(), Case())
        return
    check(op, Case(4, 6, D, x, branch, param, out, scale=branch is not None, device=device))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("pos", ("no pos", "pos", "normed_pos"))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("branch,scale", [(None, False), (F32, False), (F32, True)])
@pytest.mark.parametrize("prefix", (0, 2))
def test_flags(op, pos, bias, branch, scale, prefix, backend, device):
    given = dict(pos=pos != "no pos", normed_pos=pos == "normed_pos")
    check(op, Case(3, 6, 24, F32, branch, bias=bias, scale=scale, num_prefix_tokens=prefix, device=device, **given))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype,param,out", [(BF16, BF16, None), (F16, F32, BF16), (F64, F64, None)])
@pytest.mark.parametrize("D", (40, 64))
def test_normed_pos_dtypes(op, dtype, param, out, D, backend, device):
    if dtype == F64 and backend in ("triton", "cuda"):
        pytest.skip(f"{backend} has no float64")
    check(op, Case(4, 6, D, dtype, None, param, out, normed_pos=True, num_prefix_tokens=1, device=device))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("needs", [("pos",), ("x",), ("bias",), ("pos", "weight")])
def test_normed_pos_partial_gradients(op, needs, backend, device):
    check(op, Case(9, 18, 24, normed_pos=True, needs=frozenset(needs), device=device))


@pytest.mark.parametrize("op", OPS)
def test_normed_pos_gradcheck(op, backend, device):
    if backend in ("triton", "cuda"):
        pytest.skip(f"{backend} has no float64")
    case = Case(2, 3, 5, F64, F64, F64, normed_pos=True, num_prefix_tokens=1, device=device)
    t = case.inputs()
    names = [n for n in TENSORS if t[n] is not None]
    assert gradcheck(
        lambda *v: tuple(fused(op, t | dict(zip(names, v, strict=True)), case)[0].values()), [t[n] for n in names]
    )


def test_normed_pos_is_handed_on(backend, device):
    """The result's pos is normed_pos itself; LN'(pos) beforehand changes no more than roundings."""
    case = Case(3, 4, 16, pos_batched=True, device=device)
    t = case.inputs()
    want = fused("norm", t, case)[0]
    p = torch.nn.functional.layer_norm(t["pos"], (16,), t["pos_weight"], t["pos_bias"], 1e-6)
    got = mk.pe_layer_norm(t["x"], t["weight"], t["bias"], normed_pos=p)
    assert got.pos is p
    torch.testing.assert_close(got.y, want["y"])
    torch.testing.assert_close(
        mk.pe_norm_pool(t["x"], t["weight"], t["bias"], normed_pos=p), fused("pool", t, case)[0]["out"]
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", (0, 1))
@pytest.mark.parametrize("pos", (False, True))
def test_empty_and_single_batch(op, size, pos, backend, device):
    case = Case(size, 4, 12, branch_dtype=F32, pos=pos, device=device)
    if size:
        check(op, case)
        return
    t = case.inputs()
    out, _ = fused(op, t, case)
    upstream = {n: torch.ones_like(v) for n, v in out.items() if v is not None}
    grads = gradients(out, t, upstream)
    assert all(v.shape == (0, 12) if op == "pool" else v.shape == (0, 4, 12) for v in list(out.values())[:1])
    assert not grads["weight"].any() and not grads["bias"].any()
    if pos and op == "norm":  # pos' still has its own gradient
        assert torch.equal(grads["pos_bias"], torch.full((12,), 4.0, device=device))


def test_all_prefix(backend, device):
    """N = num_prefix_tokens: no row has a PE; the pool has nothing to pool."""
    case = Case(2, 3, 8, num_prefix_tokens=3, device=device)
    check("norm", case)
    with pytest.raises(ValueError, match="no token to pool"):
        fused("pool", case.inputs(), case)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "subset", [*itertools.combinations(TENSORS, 1), ("x", "pos"), ("weight", "bias"), ("branch", "pos_bias")]
)
def test_partial_gradients(op, subset, backend, device):
    check(op, Case(3, 4, 12, branch_dtype=F32, scale=True, needs=frozenset(subset), device=device))


@pytest.mark.parametrize("outputs", [("y",), ("stream",), ("pos",), ("stream", "pos"), ("y", "stream")])
@pytest.mark.parametrize("branch", (None, F32))
def test_partial_outputs(outputs, branch, backend, device):
    check("norm", Case(3, 4, 12, branch_dtype=branch, outputs=frozenset(outputs), device=device))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("D", (1, 2, 3, 4, 5, 7, 8))
@pytest.mark.parametrize("dtype", (F32, BF16))
def test_accuracy_of_few_elements_over_many_draws(op, D, dtype, backend, device):
    """One draw of a few elements is a matter of luck; of the errors of 60 draws together nothing is put down to it."""
    if backend in ("triton", "cuda") and device == "cpu":
        pytest.skip(f"{backend} takes minutes for this on the CPU")
    squares = {}
    for seed in range(60):
        case = Case(3, 5, D, dtype, seed=seed, device=device)
        for name, got, plain, exact, own, _ in compare(op, case, case.inputs()):
            errors = torch.stack([got.double() - exact, plain.double() - own, exact]).detach().flatten(1)
            squares[name] = squares.get(name, 0) + errors.square().sum(1)
            eps = torch.finfo(got.dtype).eps
            squares[name][2] += (eps**2 - 1) * errors[2].square().sum()
    for name, found in squares.items():
        error, plain, rounding = found.sqrt().tolist()
        assert error <= 1.25 * plain + rounding, f"{name}: {error:.3e}, and {plain:.3e} by the plain formula"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("offset", (1e2, 1e4))
def test_common_offset(op, offset, backend, device):
    check(op, Case(3, 8, 96, offset=offset, device=device))


@pytest.mark.parametrize("op", OPS)
def test_outliers_and_flat_rows(op, backend, device):
    case = Case(2, 6, 64, device=device)
    t = case.inputs()
    with torch.no_grad():
        t["x"][0, 0, 3] = 1e4  # one outlier among ordinary values, as first element too
        t["x"][0, 1, 0] = -1e4
        t["x"][0, 2] = 3.0  # no variance at all
        t["x"][1, 3] *= 1e-6  # a variance below eps
        t["x"][1, 4] *= 1e15
    check(op, case, t)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("N", (1, 5, 11))
def test_no_eps(op, N, backend, device):
    """eps=0: the rows past the end of a tile have no variance, so no finite rstd, and must not reach the others."""
    check(op, Case(3, N, 16, eps=0.0, branch_dtype=F32, device=device))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("spread,offset", [(5e-6, 50), (1e-6, 500), (0, 5e-4), (1.0, 0.99), (1.0, 1.01)])
def test_rows_flat_against_eps_or_their_mean(op, spread, offset, backend, device):
    """The mean is large against the row's deviation, and both may be small against sqrt(eps); or about equal."""
    for D in (64, 384):
        case = Case(4, 17, D, pos=False, bias=False, device=device)
        t = case.inputs()
        x = t["x"].detach()
        x = (torch.randn_like(x) + offset) * spread if spread else torch.full_like(x, offset)
        check(op, case, t | {"x": x.requires_grad_()})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op, layout, backend, device):
    case = Case(3, 4, 20, branch_dtype=F32, scale=True, device=device)
    t = case.inputs()
    for n in ("x", "branch"):
        t[n] = with_layout(t[n], layout)
    for n in ("weight", "pos_bias"):
        t[n] = torch.stack((t[n], t[n]), 1).detach()[:, 0].requires_grad_()
    t["pos"] = t["pos"].detach().t().contiguous().t().requires_grad_()
    check(op, case, t)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_layouts(op, layout, backend, device):
    """Gradients arrive in any layout: of `.sum()` expanded, of a transpose transposed."""
    case = Case(3, 4, 20, branch_dtype=F32, device=device)
    t = case.inputs()
    out, _ = fused(op, t, case)
    base = {n: torch.randn_like(v) for n, v in out.items()}
    relay = {}
    for n, u in base.items():
        relay[n] = LAYOUTS[layout](u)
    got = gradients(out, t, relay)
    want = gradients(fused(op, t, case)[0], t, {n: u.contiguous() for n, u in relay.items()})
    for n in want:
        assert torch.equal(got[n], want[n]), n


@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=str)
def test_every_address(dtype, backend, device):
    """Results don't depend on where tensors start: each element of a cache line, the others' addresses unlike x's.

    On a GPU Triton compiles other code for addresses that are no multiple of 16 bytes, whose sums go in another order.
    """
    if dtype == F64 and backend in ("triton", "cuda"):
        pytest.skip(f"{backend} has no float64")
    branch = None if dtype == F64 else F16 if dtype == F32 else F32
    places = ALIGNED // torch.finfo(dtype).bits * 8
    if backend in ("triton", "cuda") and device == "cpu":
        places = min(places, 8)
    for D in (24, 64):  # ragged, and whole vectors
        case = Case(2, 3, D, dtype, branch, dtype if dtype == F64 else F32, device=device)
        t, g = case.inputs(), torch.Generator().manual_seed(1)
        results = []
        for place in range(places):
            here = {
                n: v if v is None else at_address(v, (place * step) % 16).requires_grad_(v.requires_grad)
                for step, (n, v) in enumerate(t.items(), 1)
            }
            here["x"] = at_address(t["x"], place).requires_grad_()
            found = []
            for op in OPS:
                out = fused(op, here, case)[0]
                g.manual_seed(1)
                upstream = {n: torch.randn(v.shape, generator=g).to(v) for n, v in out.items()}
                upstream = {n: at_address(v, (place + i) % 16) for i, (n, v) in enumerate(upstream.items(), 3)}
                found += [*out.values(), *gradients(out, here, upstream).values()]
            results.append(found)
            for a, b in zip(results[0], found, strict=True):
                if backend == "triton" and device == "cuda":
                    torch.testing.assert_close(b, a, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-5)
                else:
                    assert torch.equal(a, b), place


def test_more_token_axes(backend, device):
    """(B, H, W, D) with p (H, W, D), as Swin has it, equals the flattened call."""
    case = Case(2, 12, 16, branch_dtype=F32, device=device)
    t = case.inputs()
    flat = fused("norm", t, case)[0]
    for shape in ((3, 4, 16), (1, 3, 4, 16)):
        deep = t | {n: t[n].view(2, 3, 4, 16) for n in ("x", "branch")} | {"pos": t["pos"].view(shape)}
        out = fused("norm", deep, case)[0]
        assert out["y"].shape == out["stream"].shape == (2, 3, 4, 16) and out["pos"].shape == shape
        assert all(torch.equal(out[n].flatten(), flat[n].flatten()) for n in out)
        assert torch.equal(fused("pool", deep, case)[0]["out"], fused("pool", t, case)[0]["out"])
    check("norm", Case(2, 4, 8, pos_batched=True, device=device))
    check("pool", Case(2, 4, 8, pos_batched=True, device=device))


def test_plain_x_is_the_stream(backend, device):
    """Without a branch the stream holds x's own memory, and its gradient joins x's."""
    case = Case(2, 3, 8, device=device)
    t = case.inputs()
    out = fused("norm", t, case)[0]
    assert out["stream"].data_ptr() == t["x"].data_ptr()
    (out["y"].sum() + (3 * out["stream"]).sum()).backward()
    assert t["x"].grad is not None


@pytest.mark.parametrize("N", (1, 9))
def test_a_row_does_not_depend_on_its_company(N, backend, device):
    """Kernels take several rows at a time: one that needs more care (a common offset) changes no bit of the others."""
    case = Case(9, N, 64, device=device)
    t = case.inputs()
    careful = {**t, "x": t["x"].detach().clone()}
    careful["x"][2, N // 2] += 1e4
    careful["x"][8, 0] *= 1e30
    careful["x"].requires_grad_()
    alone = {**t, "x": t["x"].detach()[3:4].clone().requires_grad_()}
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(9, N, 64, generator=g).to(device)
    found = {}
    for name, inputs in (("plain", t), ("careful", careful)):
        out, _ = fused("norm", inputs, case)
        found[name] = out["y"].detach(), gradients(out, inputs, {"y": upstream})["x"]
    others = torch.ones(9, N, dtype=torch.bool, device=device)
    others[2, N // 2] = others[8, 0] = False
    for plain_rows, careful_rows in zip(found["plain"], found["careful"], strict=True):
        assert torch.equal(plain_rows[others], careful_rows[others])
    out, _ = fused("norm", alone, Case(1, N, 64, device=device))
    assert torch.equal(out["y"], found["plain"][0][3:4])
    assert torch.equal(gradients(out, alone, {"y": upstream[3:4]})["x"], found["plain"][1][3:4])


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_non_finite_values_stay_in_their_row(bad, backend, device):
    case = Case(4, 5, 24, branch_dtype=F32, device=device)
    t = case.inputs()
    clean = {op: fused(op, t, case)[0] for op in OPS}
    with torch.no_grad():
        t["x"][1, 2, 7] = bad
    y, out = fused("norm", t, case)[0]["y"], fused("pool", t, case)[0]["out"]
    rows = torch.ones(4, 5, dtype=torch.bool, device=device)
    rows[1, 2] = False
    assert torch.equal(y[rows], clean["norm"]["y"][rows]) and y[1, 2].isnan().all()
    samples = torch.arange(4, device=device) != 1
    assert torch.equal(out[samples], clean["pool"]["out"][samples]) and out[1].isnan().all()
    for op, keep in (("norm", rows), ("pool", samples)):
        result = fused(op, t, case)[0]
        (dx,) = torch.autograd.grad(next(iter(result.values())).sum(), t["x"])
        assert dx[keep].isfinite().all() and dx[1, 2].isnan().any()


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("branch", (None, F32))
def test_non_finite_prefix_is_no_part_of_the_pool(bad, branch, backend, device):
    """The mean leaves the prefix out: what it holds reaches no output and no gradient, its own being zero."""
    case = Case(3, 5, 24, branch_dtype=branch, num_prefix_tokens=2, device=device)
    t = case.inputs()
    found = []
    for value in (0.5, bad):
        with torch.no_grad():
            t["x"][1, 1, 7] = value
        out = fused("pool", t, case)[0]
        found.append([out["out"], *gradients(out, t, {"out": torch.ones_like(out["out"])}).values()])
        assert not found[-1][1][:, :2].any()
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("place", ("gradient", "pos", "weight"))
def test_non_finite_values_elsewhere(place, backend, device):
    """A NaN in an incoming gradient stays in its row of dx, one in pos in its token, one in weight in its column."""
    case = Case(3, 5, 24, branch_dtype=F32, device=device)
    t = case.inputs()
    upstream = {n: torch.ones_like(v) for n, v in fused("norm", t, case)[0].items()}
    if place == "gradient":
        upstream["y"][1, 2, 7] = float("nan")
    else:
        with torch.no_grad():
            t[place][(2, 7) if place == "pos" else 7] = float("nan")
    out = fused("norm", t, case)[0]
    grads = gradients(out, t, upstream)
    y, dx, dpos = out["y"].isnan(), grads["x"].isnan(), grads["pos"].isnan()
    if place == "gradient":
        assert not y.any() and dx[1, 2].any() and dx.sum() == dx[1, 2].sum() and dpos.sum() == dpos[2].sum() > 0
    elif place == "pos":
        assert y[:, 2].all() and y.sum() == y[:, 2].sum() and not dx.any() and dpos.sum() == dpos[2].sum() > 0
    else:
        assert y[..., 7].all() and y.sum() == y[..., 7].sum() and not dpos.any()


@pytest.mark.parametrize("op", OPS)
def test_bitwise_repeatable(op, backend, device):
    """The same bits in each run and for any number of threads, with more work than one thread takes."""
    case = (
        Case(23, 61, 192, BF16, BF16, scale=True, device=device)
        if backend in ("cpp", "reference")
        else Case(9, 37, 48, BF16, BF16, scale=True, device=device)
    )
    t = case.inputs()
    runs, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7, 1) if backend == "cpp" else (threads, threads):
            torch.set_num_threads(n)
            out = fused(op, t, case)[0]
            runs.append([*out.values(), *gradients(out, t, {k: torch.ones_like(v) for k, v in out.items()}).values()])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("branch", (None, F64))
@pytest.mark.parametrize("prefix", (0, 1))
def test_gradcheck(op, branch, prefix, backend, device):
    if backend in ("triton", "cuda"):
        pytest.skip(f"{backend} has no float64")
    case = Case(2, 3, 5, F64, branch, F64, scale=branch is not None, num_prefix_tokens=prefix, device=device)
    t = case.inputs()
    names = [n for n in TENSORS if t[n] is not None]

    def call(*tensors):
        return tuple(v for v in fused(op, t | dict(zip(names, tensors, strict=True)), case)[0].values())

    assert gradcheck(call, [t[n] for n in names])


@pytest.mark.parametrize("op", OPS)
def test_double_backward(op, backend, device):
    """`reference` differentiates twice; the kernels say that they don't, also where allow_unused would hide it."""
    case = Case(2, 3, 8, device=device)
    t = case.inputs()
    loss = (next(iter(fused(op, t, case)[0].values())) ** 2).sum()
    (dx,) = torch.autograd.grad(loss, t["x"], create_graph=True)
    if backend == "reference":
        assert torch.autograd.grad(dx.sum(), t["weight"])[0].isfinite().all()
        return
    want = torch.autograd.grad((next(iter(fused(op, t, case)[0].values())) ** 2).sum(), t["x"])[0]
    assert torch.equal(dx, want)
    with pytest.raises(RuntimeError, match="double backward is not supported.*use_backend"):
        torch.autograd.grad(dx.sum(), t["weight"], allow_unused=True)


@pytest.mark.parametrize("op", OPS)
def test_functorch_is_refused(op, backend, device):
    case = Case(2, 3, 8, needs=frozenset(), device=device)
    t = case.inputs()

    def loss(x):
        return next(iter(fused(op, t | {"x": x}, case)[0].values())).sum()

    if backend == "reference":
        assert torch.func.grad(loss)(t["x"]).shape == t["x"].shape
        return
    with pytest.raises(RuntimeError, match="torch.func.*use_backend"):
        torch.func.grad(loss)(t["x"])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("argument", ("x", "weight", "pos"))
@pytest.mark.parametrize("needs", (frozenset(), frozenset({"x", "weight", "pos"})))
def test_forward_mode_is_refused(op, argument, needs, backend, device):
    """A tangent is never dropped in silence, whether or not the call has a backward too."""
    case = Case(2, 3, 8, needs=needs, device=device)
    t = case.inputs()
    with forward_ad.dual_level():
        fused(op, t, case)  # within the level, but without a tangent
        dual = t | {argument: forward_ad.make_dual(t[argument], torch.ones_like(t[argument]))}
        if backend == "reference":
            out = next(iter(fused(op, dual, case)[0].values()))
            assert forward_ad.unpack_dual(out).tangent is not None
            return
        with pytest.raises(RuntimeError, match=r"forward-mode derivatives \(torch.autograd.forward_ad\).*use_backend"):
            fused(op, dual, case)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", (BF16, F16))
def test_autocast(op, dtype, backend, device):
    """Under autocast y comes in the autocast dtype, the stream keeps its own, and the gradients their inputs'."""
    case = Case(3, 4, 16, F32, dtype, device=device)
    t = case.inputs()
    with torch.autocast(device, dtype):
        out = fused(op, t, case)[0]
    assert next(iter(out.values())).dtype == dtype
    if op == "norm":
        assert out["stream"].dtype == out["pos"].dtype == F32
    grads = gradients(out, t, {n: torch.ones_like(v) for n, v in out.items()})
    assert all(grads[n].dtype == t[n].dtype for n in grads)
    explicit = fused(op, t, Case(3, 4, 16, F32, dtype, out_dtype=dtype))[0]
    if backend != "reference":
        assert all(torch.equal(out[n], explicit[n]) for n in out)


def test_no_grad_and_inference_mode(backend, device):
    case = Case(2, 3, 8, branch_dtype=F32, device=device)
    t = case.inputs()
    want = {op: fused(op, t, case)[0] for op in OPS}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for op in OPS:
                got = fused(op, t, case)[0]
                assert all(torch.equal(got[n], want[op][n]) and not got[n].requires_grad for n in got)


def test_fixed_pos_carries_no_gradient(backend, device):
    """A sinusoid behind fixed pos parameters: pos' requires no gradient, and nothing is computed for it."""
    case = Case(2, 3, 8, needs=frozenset({"x", "weight", "bias"}), device=device)
    out = fused("norm", case.inputs(), case)[0]
    assert out["y"].requires_grad and not out["pos"].requires_grad


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("autocast", (False, True))
def test_checkpoint(op, reentrant, autocast, backend, device):
    """Activation checkpointing of either kind gives the same gradients, bit for bit, under autocast too."""
    case = Case(2, 3, 8, branch_dtype=F32, device=device)
    t = case.inputs()
    names = [n for n in TENSORS if t[n] is not None]

    def call(*tensors):
        return tuple(fused(op, t | dict(zip(names, tensors, strict=True)), case)[0].values())

    found = []
    for wrapped in (call, lambda *a: torch.utils.checkpoint.checkpoint(call, *a, use_reentrant=reentrant)):
        leaves = [t[n].detach().clone().requires_grad_() for n in names]
        with torch.autocast(device, BF16, enabled=autocast):
            out = wrapped(*leaves)
        sum(v.float().sin().sum() for v in out).backward()
        found.append([*out, *(leaf.grad for leaf in leaves)])
    assert found[0][0].dtype == (BF16 if autocast else F32)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("branch,normed_pos", [(None, False), (BF16, False), (None, True)])
def test_opcheck(op, branch, normed_pos, backend, device):
    """Schema, fakes and aliasing of the raw operators, as torch.library checks them."""
    if backend == "reference":
        pytest.skip("reference has no raw operator")
    from mpvg_kernels.ops import pe_layer_norm, pe_norm_pool

    module = pe_norm_pool if op == "pool" else pe_layer_norm
    case = Case(3, 4, 16, F32, branch, scale=branch is not None, needs=frozenset(), device=device)
    case.normed_pos = normed_pos
    t = case.inputs()
    args = [t[n] for n in ("x", "branch", "branch_scale", "weight", "bias", "pos", "pos_weight", "pos_bias")]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(module.FORWARD[backend], (*args, 1e-6, 1e-6, 0, F32, True), test_utils=tests)
    first, *saved = module.FORWARD[backend](*args, 1e-6, 1e-6, 0, F32, True)
    dy = torch.randn_like(first)
    if op == "pool":
        h, stats, s = saved
        head = (dy, t["x"] if h is None else h, stats, s)
    else:
        h, pos_out, stats = saved
        h = t["x"] if h is None else h
        head = (dy, torch.randn_like(h), None if normed_pos else torch.randn_like(pos_out), h, stats)
    tail = (t["weight"], t["branch_scale"], t["pos"], t["pos_weight"], 1e-6, 0, F32, branch or F32, 127)
    torch.library.opcheck(module.BACKWARD[backend], (*head, *tail), test_utils=tests)


def test_raw_results_never_alias(backend, device):
    """One tensor serves dx and dbranch in the Function only; the raw operators return fresh memory."""
    if backend == "reference":
        pytest.skip("reference has no raw operator")
    from mpvg_kernels.ops.pe_layer_norm import BACKWARD, FORWARD

    t = Case(2, 3, 8, needs=frozenset(), device=device).inputs()
    args = (t["x"], None, None, t["weight"], t["bias"], t["pos"], t["pos_weight"], t["pos_bias"])
    y, h, pos_out, stats = FORWARD[backend](*args, 1e-6, 1e-6, 0, F32, True)
    assert h is None
    tail = (t["weight"], None, t["pos"], t["pos_weight"], 1e-6, 0, F32, F32, 127)
    grads = BACKWARD[backend](y, None, None, t["x"], stats, *tail)
    memory = [g.data_ptr() for g in (*grads, y, pos_out, stats, t["x"])]
    assert len(set(memory)) == len(memory)


def test_backward_keeps_the_forwards_backend(backend, device):
    """A forward under one backend keeps it: its backward runs on the same kernels after the choice has changed."""
    case = Case(2, 3, 8, device=device)
    t = case.inputs()
    out = fused("norm", t, case)[0]
    with mk.use_backend("reference"):
        grads = gradients(out, t, {"y": torch.ones_like(out["y"])})
    want = gradients(fused("norm", t, case)[0], t, {"y": torch.ones_like(out["y"])})
    assert all(torch.equal(grads[n], want[n]) for n in want if want[n] is not None)
