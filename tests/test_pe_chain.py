"""pe_chain in every backend: the accuracy rule against fp64, partial gradients, layouts, repeatability, bad input."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import assert_accurate
from torch.autograd import gradcheck

import mpvg_kernels as mk

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = ("pos", "weight", "bias")


@dataclass
class Chain:
    """One call of pe_chain: its shape, dtypes, flags, and which inputs need a gradient."""

    L: int = 3
    K: int = 5
    D: int = 16
    dtype: torch.dtype = F32
    param_dtype: torch.dtype = F32
    out_dtype: torch.dtype | None = None
    bias: bool = True
    hierarchical: bool = True
    offset: float = 0.0
    eps: float = 1e-6
    seed: int = 0
    needs: frozenset = frozenset(NAMES)
    device: str = "cpu"

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """The tensors of the call, as leaves that need their gradients."""
        g = torch.Generator().manual_seed(self.seed)

        def rand(*shape, dtype, scale=1.0, shift=0.0):
            return (torch.randn(*shape, generator=g, dtype=F64) * scale + shift).to(dtype).to(self.device)

        t = dict(
            pos=rand(self.K, self.D, dtype=self.dtype, scale=0.5, shift=self.offset),
            weight=rand(self.L, self.D, dtype=self.param_dtype, scale=0.3, shift=1.0),
            bias=rand(self.L, self.D, dtype=self.param_dtype) if self.bias else None,
        )
        return {n: v.requires_grad_(n in self.needs) if v is not None else None for n, v in t.items()}


def chain(t: dict, case: Chain) -> torch.Tensor:
    return mk.pe_chain(*(t[n] for n in NAMES), eps=case.eps, hierarchical=case.hierarchical, out_dtype=case.out_dtype)


def plain(t: dict, case: Chain, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, dict]:
    """One LayerNorm after the other, as eager PyTorch has them, in the inputs' dtypes or wholly in `dtype`."""
    if dtype is not None:
        t = {n: None if v is None else v.detach().to(dtype).requires_grad_(v.requires_grad) for n, v in t.items()}
    wide = torch.promote_types(t["pos"].dtype, t["weight"].dtype)
    row, out = t["pos"].to(wide), []
    for layer in range(case.L):
        bias = None if t["bias"] is None else t["bias"][layer].to(wide)
        out.append(F.layer_norm(row, (case.D,), t["weight"][layer].to(wide), bias, case.eps))
        row = out[-1] if case.hierarchical else row
    return torch.stack(out).to(dtype or case.out_dtype or case.dtype), t


def gradients(out: torch.Tensor, t: dict, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [n for n in NAMES if t[n] is not None and t[n].requires_grad]
    return dict(zip(names, torch.autograd.grad(out, [t[n] for n in names], upstream.to(out.dtype)), strict=True))


def check(case: Chain, t: dict | None = None) -> None:
    """Hold the result and every gradient to the accuracy rule."""
    t = t or case.inputs()
    got, (want, want_t), (exact, exact_t) = chain(t, case), plain(t, case), plain(t, case, F64)
    assert got.shape == (case.L, case.K, case.D) and got.is_contiguous()
    assert got.requires_grad == want.requires_grad
    assert_accurate("out", got, want, exact)
    if not got.requires_grad:
        return
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = torch.randn(got.shape, generator=generator).to(got)
    results = [gradients(out, tensors, upstream) for out, tensors in ((got, t), (want, want_t), (exact, exact_t))]
    for name in results[1]:
        assert results[0][name].dtype == t[name].dtype and results[0][name].shape == t[name].shape
        assert_accurate(f"d{name}", *(r[name] for r in results))


# Smallest, one layer, one row, odd widths, a ViT's, more rows than a block, a wide row.
SHAPES = [(1, 1, 1), (1, 5, 7), (4, 1, 17), (3, 19, 33), (11, 21, 192), (2, 35, 64), (3, 6, 1280), (2, 3, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("hierarchical", (True, False))
def test_shapes(shape, hierarchical, backend, device):
    check(Chain(*shape, hierarchical=hierarchical, device=device))


# (pos, parameters, result)
DTYPES = [
    (F32, F32, None),
    (BF16, BF16, None),
    (F16, F16, None),
    (BF16, F32, None),
    (F16, F32, BF16),
    (F32, F32, BF16),
    (BF16, BF16, F32),
    (F64, F64, None),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x).split(".")[-1] for x in d))
@pytest.mark.parametrize("D", (40, 64))
@pytest.mark.parametrize("hierarchical,bias", [(True, True), (False, True), (True, False)])
def test_dtypes(dtypes, D, hierarchical, bias, backend, device):
    case = Chain(4, 9, D, *dtypes, hierarchical=hierarchical, bias=bias, device=device)
    if dtypes[0] == F64 and backend in ("triton", "cuda"):
        with pytest.raises(TypeError, match=f"pos is float64: backend '{backend}' has"):
            chain(case.inputs(), case)
        return
    check(case)


@pytest.mark.parametrize("needs", [("pos",), ("weight",), ("bias",), ("pos", "bias"), ("weight", "bias"), ()])
@pytest.mark.parametrize("hierarchical", (True, False))
def test_partial_gradients(needs, hierarchical, backend, device):
    check(Chain(3, 18, 24, hierarchical=hierarchical, needs=frozenset(needs), device=device))


@pytest.mark.parametrize("hierarchical", (True, False))
@pytest.mark.parametrize("D", (20, 96))
def test_hard_rows(hierarchical, D, backend, device):
    """A common offset, outliers, rows with no variance or below eps: each beside ordinary rows of its group."""
    case = Chain(3, 14, D, hierarchical=hierarchical, device=device)
    t = case.inputs()
    with torch.no_grad():
        t["pos"][1] += 1e4
        t["pos"][3, 0] = -1e4
        t["pos"][6] = 3.0
        t["pos"][9] *= 1e-6
        t["bias"][1] += 50.0  # the rows that the third layer reads have a mean far above their deviation
    check(case, t)


def test_no_eps(backend, device):
    check(Chain(3, 11, 24, eps=0.0, device=device))


def test_empty(backend, device):
    """No rows: an empty result, and gradients that are zero."""
    case = Chain(3, 0, 8, device=device)
    t = case.inputs()
    out = chain(t, case)
    grads = gradients(out, t, torch.ones_like(out))
    assert out.shape == (3, 0, 8) and grads["pos"].shape == (0, 8)
    assert not grads["weight"].any() and not grads["bias"].any()


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_non_finite_values_stay_in_their_row(bad, backend, device):
    case = Chain(3, 9, 20, device=device)
    t = case.inputs()
    clean = chain(t, case)
    with torch.no_grad():
        t["pos"][2, 5] = bad
    out = chain(t, case)
    others = torch.arange(9, device=device) != 2
    assert torch.equal(out[:, others], clean[:, others]) and out[:, 2].isnan().all()
    dpos = gradients(out, t, torch.ones_like(out))["pos"]
    assert dpos[others].isfinite().all() and dpos[2].isnan().any()


def test_a_row_does_not_depend_on_its_company(backend, device):
    case = Chain(3, 9, 64, device=device)
    t = case.inputs()
    out = chain(t, case)
    alone = chain(t | {"pos": t["pos"][3:4]}, case)
    if backend == "triton" and device == "cuda":  # a tile for one row is another, and its sums go in another order
        torch.testing.assert_close(alone[:, 0], out[:, 3], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(alone[:, 0], out[:, 3])


def test_sequences_and_axes(backend, device):
    """Lists of (D,) give what (L, D) gives, gradients too; pos may have token axes, and drops a leading 1."""
    case = Chain(3, 6, 16, device=device)
    t = case.inputs()
    want = chain(t, case)
    upstream = torch.randn_like(want)
    want_grads = gradients(want, t, upstream)
    weights, biases = ([v.detach().clone().requires_grad_() for v in t[n].unbind(0)] for n in ("weight", "bias"))
    for shape in ((6, 16), (1, 6, 16), (2, 3, 16), (1, 2, 3, 16)):
        pos = t["pos"].view(shape)
        got = mk.pe_chain(pos, weights, torch.nn.ParameterList(biases))
        assert got.shape == (3, *shape[shape[0] == 1 :]) and torch.equal(got.flatten(), want.flatten())
    grads = torch.autograd.grad(got, weights + [t["pos"]], upstream.view(got.shape))
    assert torch.equal(torch.stack(grads[:3]), want_grads["weight"]) and torch.equal(grads[3], want_grads["pos"])


@pytest.mark.parametrize("layout", ("expanded", "scalar", "transposed", "unbound"))
def test_layouts(layout, backend, device):
    """Strided inputs, and gradients that are expanded, transposed or come from one layer alone."""
    case = Chain(3, 6, 20, device=device)
    t = case.inputs()
    t["pos"] = t["pos"].detach().t().contiguous().t().requires_grad_()
    t["weight"] = torch.stack((t["weight"], t["weight"]), 2).detach()[..., 0].requires_grad_()
    check(case, t)
    out = chain(t, case)
    base = torch.randn_like(out)
    given = {
        "expanded": base[:1, :1].expand(out.shape),
        "scalar": base[0, 0, 0].expand(out.shape),
        "transposed": base.transpose(0, 2).contiguous().transpose(0, 2),
        "unbound": torch.cat((torch.zeros_like(base[:2]), base[2:])),
    }[layout]
    if layout == "unbound":
        got = dict(zip(NAMES, torch.autograd.grad(out.unbind(0)[2], [t[n] for n in NAMES], base[2]), strict=True))
    else:
        got = gradients(out, t, given)
    want = gradients(chain(t, case), t, given.contiguous())
    assert all(torch.equal(got[n], want[n]) for n in NAMES)


def test_bitwise_repeatable(backend, device):
    """The same bits in each run and for any number of threads."""
    runs, threads = [], torch.get_num_threads()
    case = Chain(5, 150 if backend == "cpp" else 37, 192, BF16, device=device)
    t = case.inputs()
    try:
        for n in (1, 2, 3, 1) if backend == "cpp" else (threads, threads):
            torch.set_num_threads(n)
            out = chain(t, case)
            runs.append([out, *gradients(out, t, torch.ones_like(out)).values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("hierarchical", (True, False))
@pytest.mark.parametrize("bias", (True, False))
def test_gradcheck(hierarchical, bias, backend, device):
    if backend in ("triton", "cuda"):
        pytest.skip(f"{backend} has no float64")
    case = Chain(3, 2, 5, F64, F64, hierarchical=hierarchical, bias=bias, device=device)
    t = case.inputs()
    names = [n for n in NAMES if t[n] is not None]
    assert gradcheck(lambda *v: chain(t | dict(zip(names, v, strict=True)), case), [t[n] for n in names])


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("mask", (7, 1, 6))
def test_opcheck(bias, mask, backend, device):
    if backend == "reference":
        pytest.skip("reference has no raw operator")
    from mpvg_kernels.ops.pe_chain import BACKWARD, FORWARD

    t = Chain(3, 4, 16, bias=bias, needs=frozenset(), device=device).inputs()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(FORWARD[backend], (*t.values(), 1e-6, True, BF16), test_utils=tests)
    dout = FORWARD[backend](*t.values(), 1e-6, True, BF16)
    args = (dout, *t.values(), 1e-6, True, mask if bias else mask & 3)
    torch.library.opcheck(BACKWARD[backend], args, test_utils=tests)


def test_refusals(backend, device):
    """Double backward and torch.func work in `reference` and are clear errors elsewhere."""
    case = Chain(device=device)
    t = case.inputs()
    (dpos,) = torch.autograd.grad(chain(t, case).square().sum(), t["pos"], create_graph=True)
    detached = {n: v.detach() for n, v in t.items()}

    def loss(pos):
        return chain(detached | {"pos": pos}, case).sum()

    if backend == "reference":
        assert torch.autograd.grad(dpos.sum(), t["weight"])[0].isfinite().all()
        assert torch.func.grad(loss)(detached["pos"]).shape == (5, 16)
        return
    with pytest.raises(RuntimeError, match="pe_chain: double backward is not supported.*use_backend"):
        torch.autograd.grad(dpos.sum(), t["weight"], allow_unused=True)
    with pytest.raises(RuntimeError, match="torch.func.*use_backend"):
        torch.func.grad(loss)(detached["pos"])


@pytest.mark.parametrize("dynamic", (None, True))
def test_compile(dynamic, backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter does not run under torch.compile")
    torch._dynamo.reset()
    case = Chain(device=device)
    compiled = torch.compile(chain, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 8):
        t = Chain(K=rows, device=device).inputs()
        got, want = compiled(t, case), chain(t, case)
        torch.testing.assert_close(got, want)
        upstream = torch.ones_like(want)
        torch.testing.assert_close(gradients(got, t, upstream), gradients(want, t, upstream))


w, p = torch.ones(2, 8), torch.ones(4, 8)
MISTAKES = {
    "pos no tensor": (([1.0], w), TypeError, "pos must be a tensor, not list"),
    "pos integer": ((p.int(), w), TypeError, "pos must be float32.*torch.int32"),
    "pos a vector": ((p[0], w), ValueError, r"pos has shape \(8,\): expected \(K, D\)"),
    "pos without width": ((p[:, :0], w[:, :0]), ValueError, r"pos has shape \(4, 0\).*D of at least 1"),
    "weights a number": ((p, 1.0), TypeError, r"weights must be a sequence of tensors or a tensor \(L, D\), not float"),
    "weights empty": ((p, []), ValueError, "weights is empty: expected one tensor for each layer"),
    "weights a vector": ((p, w[0]), ValueError, r"weights has shape \(8,\): expected \(L, 8\)"),
    "weights of no layer": ((p, w[:0]), ValueError, r"weights has shape \(0, 8\): expected \(L, 8\)"),
    "weights of another width": ((p, w[:, :7]), ValueError, r"weights has shape \(2, 7\): expected \(L, 8\)"),
    "a weight no tensor": ((p, [w[0], 1.0]), TypeError, r"weights\[1\] must be a tensor, not float"),
    "a weight of another width": ((p, [w[0], w[1, :7]]), ValueError, r"weights\[1\] has shape \(7,\): expected \(8,\)"),
    "a weight of another dtype": (
        (p, [w[0], w[1].half()]),
        TypeError,
        r"weights\[1\] has dtype torch.float16: expected weights\[0\]'s, torch.float32",
    ),
    "weights half for a float pos": (
        (p, w.half()),
        TypeError,
        "weights have dtype torch.float16: expected torch.float32$",
    ),
    "weights bfloat16 for a half pos": (
        (p.half(), w.bfloat16()),
        TypeError,
        "weights have dtype torch.bfloat16: expected torch.float32 or pos's dtype, torch.float16",
    ),
    "a weight on another device": ((p, [w[0], w[1].to("meta")]), ValueError, r"weights\[1\] is on meta and pos on"),
    "weights on another device": ((p, w.to("meta")), ValueError, "weights is on meta and pos on"),
    "biases of fewer layers": ((p, w, w[:1]), ValueError, "biases are for 1 layers, weights for 2"),
    "biases with a hole": ((p, w, [w[0], None]), TypeError, r"biases\[1\] must be a tensor, not NoneType"),
    "biases of another dtype": ((p, w, w.half()), TypeError, "biases have dtype torch.float16: expected the weights'"),
    "eps negative": ((p, w, None, dict(eps=-1.0)), ValueError, "eps=-1.0: expected a number of at least 0"),
    "eps nan": ((p, w, None, dict(eps=float("nan"))), ValueError, "eps=nan"),
    "eps no number": ((p, w, None, dict(eps="small")), ValueError, "eps='small'"),
    "out_dtype integer": ((p, w, None, dict(out_dtype=torch.int8)), TypeError, "out_dtype=torch.int8: expected"),
    "out_dtype double": ((p, w, None, dict(out_dtype=F64)), TypeError, "out_dtype=torch.float64: expected"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_message(mistake, backend, device):
    (*args, last), error, message = MISTAKES[mistake]
    args, kwargs = (args, last) if isinstance(last, dict) else ([*args, last], {})

    def move(a):
        if isinstance(a, list):
            return [move(v) for v in a]
        return a.to(device) if isinstance(a, torch.Tensor) and a.device.type == "cpu" else a

    with pytest.raises(error, match=message):
        mk.pe_chain(*map(move, args), **kwargs)
