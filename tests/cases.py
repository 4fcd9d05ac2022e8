"""Random cases for the operators, the plain formula written out, and the accuracy rule for every backend."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import mpvg_kernels as mk

TENSORS = ("x", "branch", "weight", "bias", "pos", "pos_weight", "pos_bias")


@dataclass
class Case:
    """One call of an operator: its shape, dtypes, flags, and which inputs need a gradient."""

    B: int = 3
    N: int = 5
    D: int = 16
    dtype: torch.dtype = torch.float32
    branch_dtype: torch.dtype | None = None
    param_dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    pos: bool = True
    normed_pos: bool = False  # pos is given as normed_pos: normalised already
    bias: bool = True
    scale: bool = False
    num_prefix_tokens: int = 0
    pos_batched: bool = False
    offset: float = 0.0
    eps: float = 1e-6
    pos_eps: float | None = None
    seed: int = 0
    needs: frozenset = frozenset(TENSORS)
    outputs: frozenset = frozenset({"y", "stream", "pos"})
    device: str = "cpu"
    options: dict = field(init=False)

    def __post_init__(self):
        self.options = dict(eps=self.eps, pos_eps=self.pos_eps, num_prefix_tokens=self.num_prefix_tokens)

    def inputs(self) -> dict[str, Tensor | None]:
        """The tensors of the call, in the case's dtypes, as leaves that need their gradients."""
        g = torch.Generator().manual_seed(self.seed)

        def rand(*shape, dtype, scale=1.0, shift=0.0):
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale + shift).to(dtype).to(self.device)

        B, N, D, K = self.B, self.N, self.D, self.N - self.num_prefix_tokens
        pos_norm = self.pos and not self.normed_pos
        pos_shape = (1, K, D) if self.pos_batched else (K, D)
        t = dict(
            x=rand(B, N, D, dtype=self.dtype, scale=2.0, shift=self.offset),
            branch=rand(B, N, D, dtype=self.branch_dtype, shift=0.3) if self.branch_dtype else None,
            weight=rand(D, dtype=self.param_dtype, scale=0.3, shift=1.0),
            bias=rand(D, dtype=self.param_dtype) if self.bias else None,
            pos=rand(*pos_shape, dtype=self.param_dtype, scale=0.5) if self.pos else None,
            pos_weight=rand(D, dtype=self.param_dtype, scale=0.3, shift=1.0) if pos_norm else None,
            pos_bias=rand(D, dtype=self.param_dtype) if pos_norm and self.bias else None,
        )
        for name, tensor in t.items():
            if tensor is not None and name in self.needs:
                tensor.requires_grad_()
        scale = None
        if self.scale:
            scale = (torch.randint(0, 2, (B,), generator=g) / 0.7).to(self.branch_dtype).to(self.device)
        return t | {"branch_scale": scale}


def plain(op: str, t: dict, case: Case, dtype: torch.dtype | None = None, stream: Tensor | None = None):
    """The plain PyTorch formula, in the inputs' dtypes or wholly in `dtype`: {"y", "stream", "pos"} or {"out"}.

    With `stream` the formula goes on from that h, as somebody has rounded it, instead of its own.
    """
    if dtype is not None:
        t = {k: None if v is None else v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in t.items()}
    k, D = case.num_prefix_tokens, case.D

    def norm(v, w, b, eps):
        wide = torch.promote_types(v.dtype, w.dtype)
        return F.layer_norm(v.to(wide), (D,), w.to(wide), None if b is None else b.to(wide), eps)

    h = t["x"]
    if t["branch"] is not None:
        s = 1 if t["branch_scale"] is None else t["branch_scale"][:, None, None]
        h = h + t["branch"] * s
        if stream is not None:
            h = h + (stream.to(h.dtype) - h).detach()
    y = norm(h, t["weight"], t["bias"], case.eps)
    p = None
    if t["pos"] is not None:
        pos_eps = case.eps if case.pos_eps is None else case.pos_eps
        p = t["pos"] if case.normed_pos else norm(t["pos"], t["pos_weight"], t["pos_bias"], pos_eps)
        y = torch.cat((y[:, :k], y[:, k:] + p), 1)
    out_dtype = dtype or case.out_dtype or h.dtype
    outputs = dict(out=y[:, k:].mean(1).to(out_dtype)) if op == "pool" else dict(y=y.to(out_dtype), stream=h, pos=p)
    if p is not None and "pos" in outputs:
        outputs["pos"] = p.to(t["pos"].dtype)
    return outputs, t


def fused(op: str, t: dict, case: Case):
    """The same through the public function."""
    names = ("x", "weight", "bias") if case.normed_pos else ("x", "weight", "bias", "pos", "pos_weight", "pos_bias")
    args = [t[n] for n in names]
    kwargs = dict(branch=t["branch"], branch_scale=t["branch_scale"], out_dtype=case.out_dtype, **case.options)
    if case.normed_pos:
        kwargs["normed_pos"] = t["pos"]
    if op == "pool":
        return dict(out=mk.pe_norm_pool(*args, **kwargs)), t
    return mk.pe_layer_norm(*args, **kwargs)._asdict(), t


def gradients(outputs: dict, t: dict, upstream: dict) -> dict[str, Tensor]:
    """The gradient of sum(output * upstream) in each input that needs one."""
    pairs = [(outputs[n], u.to(outputs[n].dtype)) for n, u in upstream.items() if outputs[n].requires_grad]
    names = [n for n in TENSORS if t[n] is not None and t[n].requires_grad]
    if not pairs or not names:
        return {}
    grads = torch.autograd.grad([p[0] for p in pairs], [t[n] for n in names], [p[1] for p in pairs], allow_unused=True)
    return dict(zip(names, grads, strict=True))


def term_sizes(op: str, t: dict, case: Case, upstream: dict) -> dict[str, Tensor]:
    """How large the terms are that each output and gradient adds up, element by element.

    A rounding error is a share of a term. Terms may cancel: at D = 2 a row's gradient is nothing but the remainder of
    terms that do. A sum over rows has errors of either sign, so its terms count by the root of their squares' sum.
    """
    k = case.num_prefix_tokens
    a = {n: None if v is None else v.detach().double() for n, v in t.items()}
    u = {n: v.double().abs() for n, v in upstream.items()}
    zero = torch.zeros((), dtype=torch.float64, device=a["x"].device)

    def norm(v, eps):  # vhat's terms: v * rstd and mean * rstd, of which the second is small or taken off first; rstd
        c = v - v.mean(-1, keepdim=True)
        rstd = (c.square().mean(-1, keepdim=True) + eps).rsqrt()
        return 1 + (c * rstd).abs(), rstd

    def affine(vhat, w, b):
        return vhat * w.abs() + (zero if b is None else b.abs())

    def input_gradient(g, vhat, rstd):
        return rstd * (g + g.mean(-1, keepdim=True) + vhat * (g * vhat).mean(-1, keepdim=True))

    def root_sum(terms, *axes):
        return terms.square().sum(axes).sqrt()

    h, scale = a["x"], torch.ones(case.B, dtype=torch.float64, device=a["x"].device)
    if a["branch"] is not None:
        scale = scale if a["branch_scale"] is None else a["branch_scale"]
        h = h + a["branch"] * scale[:, None, None]
    hhat, rstd = norm(h, case.eps)
    y, sizes = affine(hhat, a["weight"], a["bias"]), {"stream": zero}
    if case.normed_pos and a["pos"] is not None:
        sizes["pos"] = a["pos"].abs()
        y = torch.cat((y[:, :k], y[:, k:] + a["pos"].view(-1, case.D).abs()), 1)
    elif a["pos"] is not None:
        phat, pos_rstd = norm(a["pos"].view(-1, case.D), case.eps if case.pos_eps is None else case.pos_eps)
        pos = affine(phat, a["pos_weight"], a["pos_bias"])
        sizes["pos"] = pos.view(a["pos"].shape)
        y = torch.cat((y[:, :k], y[:, k:] + pos), 1)
    sizes |= {"y": y, "out": root_sum(y[:, k:], 1) / max(1, case.N - k)}

    dy = u.get("y", torch.zeros_like(h))
    if op == "pool":
        dy = torch.cat((dy[:, :k], (u["out"][:, None] / (case.N - k)).expand(h[:, k:].shape)), 1)
    dh = input_gradient(dy * a["weight"].abs(), hhat, rstd) + u.get("stream", zero)
    sizes |= {"dx": dh, "dbranch": dh * scale[:, None, None]}
    sizes |= {"dweight": root_sum(dy * hhat, 0, 1), "dbias": root_sum(dy, 0, 1)}
    if a["pos"] is not None:
        dpos_out = root_sum(dy[:, k:], 0) + (u["pos"].view(-1, case.D) if "pos" in u else zero)
        if case.normed_pos:
            return sizes | {"dpos": dpos_out.view(a["pos"].shape)}
        dpos = input_gradient(dpos_out * a["pos_weight"].abs(), phat, pos_rstd)
        sizes |= {"dpos": dpos.view(a["pos"].shape)}
        sizes |= {"dpos_weight": root_sum(dpos_out * phat, 0), "dpos_bias": root_sum(dpos_out, 0)}
    return sizes


# By how many deviations of one element's rounding error a norm may differ from the plain formula's by luck; see below.
# In 17,000 random cases of the C++ kernels 300 results needed some, and none more than 1.1.
LUCK = 2.0


def assert_accurate(
    name: str, got: Tensor, plain: Tensor, exact: Tensor, own: Tensor | None = None, terms: Tensor | None = None
) -> None:
    """The accuracy rule: ||err|| <= 1.25 ||err of the plain formula|| + eps(dtype) ||exact|| + luck.

    `own` is what is exact for the plain formula, which may have rounded its stream otherwise; left out, `exact`.
    Without `terms` there is no luck.

    Luck: of n rounding errors of deviation s the norm is s sqrt(n), give or take s / sqrt(2), whatever n is. That is
    nothing among many, but of two or three elements the plain formula often gets each right to the last bit, and 1.25
    times nothing is no bound. s is eps of the arithmetic times the root mean square of the results' terms.
    """
    assert got.dtype == plain.dtype and got.shape == plain.shape, f"{name}: {got.dtype} {got.shape}"
    got, plain, exact = got.detach(), plain.detach(), exact.detach().double()
    own = exact if own is None else own.detach().double()
    if not got.numel():
        return
    if got.dtype == torch.float64:  # nothing more exact to compare with: a few roundings apart
        torch.testing.assert_close(
            got, exact, rtol=1e-12, atol=1e-13 * float(exact.norm()), msg=lambda m: f"{name}: {m}"
        )
        return
    luck = 0 if terms is None else LUCK * torch.finfo(torch.float32).eps * terms.square().mean().sqrt()
    bound = 1.25 * (plain.double() - own).norm() + torch.finfo(got.dtype).eps * exact.norm() + luck
    error = (got.double() - exact).norm()
    assert error <= bound, f"{name}: error {error:.3e} above {bound:.3e} (norm {exact.norm():.3e})"


def compare(op: str, case: Case, t: dict, relay=lambda gradient: gradient):
    """Run a case; yields name, result, plain formula's, exact, what is exact for the plain formula, sizes of the terms.

    Results come from the stream as it is stored. Its rounding is judged once, as the stream's: a row that is flat
    against it turns it into anything in y. `relay` lays out the incoming gradients.
    """
    plain_out, plain_t = plain(op, t, case)
    fused_out, _ = fused(op, t, case)
    stream, plain_stream = None, None
    if t["branch"] is not None and case.dtype != torch.float64:
        with torch.no_grad():
            stream, plain_stream = (f("norm", t, case)[0]["stream"] for f in (fused, plain))
    exact_out, exact_t = plain(op, t, case, torch.float64, stream)
    own_out, own_t = (exact_out, exact_t) if stream is None else plain(op, t, case, torch.float64, plain_stream)
    names = [n for n in fused_out if fused_out[n] is not None]
    assert names == [n for n in plain_out if plain_out[n] is not None]
    g = torch.Generator().manual_seed(case.seed + 1)
    upstream = {}
    for n in names:
        if n in case.outputs or op == "pool":
            upstream[n] = relay(torch.randn(fused_out[n].shape, generator=g).to(fused_out[n]))
    sizes = term_sizes(op, t, case, upstream)
    for n in names:
        exact, own = exact_out[n], own_out[n]
        if n == "stream":
            exact = own = plain("norm", t, case, torch.float64)[0]["stream"]
        yield n, fused_out[n], plain_out[n], exact, own, sizes[n]
        assert fused_out[n].is_contiguous() or fused_out[n] is t["x"] or n == "stream" or case.normed_pos
        assert fused_out[n].requires_grad == plain_out[n].requires_grad, n

    got = gradients(fused_out, t, upstream)
    want = gradients(plain_out, plain_t, upstream)
    exact = gradients(exact_out, exact_t, upstream)
    own = exact if stream is None else gradients(own_out, own_t, upstream)
    for n in want:
        if want[n] is None:
            assert got[n] is None or not got[n].any(), f"d{n} should be absent"
            continue
        assert got[n] is not None, f"d{n} is missing"
        assert got[n].dtype == t[n].dtype and got[n].shape == t[n].shape
        yield f"d{n}", got[n], want[n], exact[n], own[n], sizes[f"d{n}"]


def check(op: str, case: Case, t: dict | None = None, relay=lambda gradient: gradient) -> None:
    """Run a case and hold every output and gradient to the accuracy rule, against the formula in fp64."""
    for results in compare(op, case, t or case.inputs(), relay):
        assert_accurate(*results)
