"""The operator benchmarks' cases, byte model, providers and command line: what bench_dual_ln, bench_norm_pool,
bench_overhead and the pytest-benchmark file have in common.

A provider is a function of the operator's arguments that returns its outputs, (y, stream, pos') or (pooled,). To add
one, write an entry of PROVIDERS: a function of the case that returns it, or raises Unavailable with the reason. It must
do the same work as the plain formula below, and its outputs and gradients are compared with that formula in fp64 before
it is timed.

Shapes: x, f (the branch), y, h and their gradients (B, N, D); pos, pos' (N, D); weight, bias, pos_weight, pos_bias
(D,); the branch's scale (B,); pooled (B, D). pe_chain has B layers: x is its pos (N, D), weight and bias are (B, D),
and its outputs are B tables (N, D), as layers take them.
"""

import argparse
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import harness
import peers
import plots
import torch
import torch.nn.functional as F
from harness import Column, Group, Variant, number
from torch import Tensor

import mpvg_kernels as mk

EPS = 1e-6
SIZES = ((64, 196, 192), (32, 196, 384), (16, 196, 768))
MODES = ("fwd", "fwd_grad", "bwd", "fwd_bwd")
DEFAULT_MODES = ("fwd", "fwd_bwd")
# The grid of --grid: B 1 to 1024, the token counts of ViT, DeiT and Swin, the widths of their variants.
GRID = tuple(
    (B, N, D)
    for D in (96, 192, 256, 384, 512, 768, 1024, 1280)
    for N in (49, 64, 196, 197, 577, 784)
    for B in (1, 8, 64, 256, 1024)
)
DEFAULT_DTYPES = ("fp32", "bf16")
DEFAULT_INPUTS = ("x", "x+f")


class Dtypes(NamedTuple):
    """The dtypes of a case; the stream h has the promoted dtype of x and branch."""

    x: torch.dtype
    branch: torch.dtype
    out: torch.dtype
    params: torch.dtype
    tolerance: float  # largest relative L2 distance from the fp64 formula


DTYPES = {
    "fp32": Dtypes(torch.float32, torch.float32, torch.float32, torch.float32, 1e-5),
    "bf16": Dtypes(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16, 2e-2),
    "fp16": Dtypes(torch.float16, torch.float16, torch.float16, torch.float16, 3e-3),
    # What autocast makes of a model in fp32: the stream stays fp32, linear layers give and take bf16.
    "mixed": Dtypes(torch.float32, torch.bfloat16, torch.bfloat16, torch.float32, 2e-2),
}


class Given(NamedTuple):
    """What the operator is given besides x, weight and bias."""

    branch: bool = False
    scale: bool = False
    pos: bool = True
    stream_grad: bool = False  # the stream, pe_layer_norm's second output, gets a gradient too (MPVG's residual path)


INPUTS = {
    "x": Given(),
    # The stream is x itself here. Autograd adds its gradient in a pass of its own for eager, and for torch.compile as
    # long as only this operator is compiled, which in a compiled model would be fused: hence not among the default
    # cases.
    "x,dh": Given(stream_grad=True),
    "x+f": Given(branch=True, stream_grad=True),
    "x+s*f": Given(branch=True, scale=True, stream_grad=True),
    "x+f,no-pos": Given(branch=True, pos=False, stream_grad=True),
}


@dataclass(frozen=True)
class Case:
    """One row group of a benchmark."""

    op: str
    mode: str
    inputs: str
    B: int
    N: int
    D: int
    dtype: str

    @property
    def given(self) -> Given:
        return INPUTS[self.inputs]

    @property
    def differentiates(self) -> bool:
        """Gradients are recorded; in mode "bwd" the forward runs too, once, untimed."""
        return self.mode != "fwd"

    @property
    def has_backward(self) -> bool:
        """The backward is part of the timed call."""
        return self.mode in ("bwd", "fwd_bwd")

    @property
    def dtypes(self) -> Dtypes:
        return DTYPES[self.dtype]

    @property
    def stream_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtypes.x, self.dtypes.branch) if self.given.branch else self.dtypes.x

    @property
    def out_dtype(self) -> torch.dtype | None:
        """The output dtype asked for; None where it is the stream's own, which needs no asking."""
        return None if self.dtypes.out == self.stream_dtype else self.dtypes.out

    def __str__(self) -> str:
        return f"{self.op} {self.mode} {self.inputs} ({self.B},{self.N},{self.D}) {self.dtype}"


# ---- byte model


class Traffic(NamedTuple):
    """The least traffic of a call: bytes read in all, and the bytes of each tensor written."""

    read: int
    written: list[int]

    @property
    def total(self) -> int:
        return self.read + sum(self.written)


def traffic(case: Case) -> Traffic:
    """Every argument read once and every result written once, in the forward and again in the backward.

    Mode "fwd_bwd" is "fwd_grad" and "bwd" together. It reads x (or h) twice and dy and dh once, and writes y, dx and,
    with a branch, h. The branch's gradient counts where it is a tensor of its own: with a scale, or in another dtype
    than x's.
    Row statistics and partial sums do not count: how many there are is the kernel's choice. The pool's output is (B,
    D), and its forward writes no h where there are no gradients.
    """
    given, dtypes = case.given, case.dtypes
    if case.op == "pe_chain":
        table, vector = case.N * case.D * dtypes.params.itemsize, case.D * dtypes.params.itemsize
        sources, tables = table + 2 * case.B * vector, [table] * case.B
        forward, backward = case.mode != "bwd", case.differentiates
        return Traffic(
            sources * (forward + backward) + sum(tables) * backward,
            tables * forward + [table, case.B * vector, case.B * vector] * backward,
        )
    elements = case.B * case.N * case.D
    x, f, y = (elements * dtype.itemsize for dtype in (dtypes.x, dtypes.branch, dtypes.out))
    h = elements * case.stream_dtype.itemsize
    vector, pos = case.D * dtypes.params.itemsize, case.N * case.D * dtypes.params.itemsize
    scale = case.B * dtypes.branch.itemsize * given.scale
    pooled = case.op == "pe_norm_pool"
    if pooled:
        y = case.B * case.D * dtypes.out.itemsize

    read, written = 0, []
    if case.mode != "bwd":
        read += x + f * given.branch + scale + 2 * vector + (pos + 2 * vector) * given.pos
        written.append(y)
        if given.branch and (case.differentiates or not pooled):
            written.append(h)
        if given.pos and not pooled:
            written.append(pos)
    if case.has_backward:
        read += y + h + vector + scale + (pos + vector) * given.pos
        if not pooled:
            read += h * given.stream_grad + pos * given.pos
        written.append(x)
        if given.scale or (given.branch and dtypes.branch != dtypes.x):
            written.append(f)
        written += [vector, vector] + [pos, vector, vector] * given.pos
    return Traffic(read, written)


def roof(case: Case, rotations: int, device: str) -> Callable[[], object]:
    """A copy of the case's bytes with the variants' allocation policy.

    Each large tensor that the operator writes is a clone, in memory as fresh as a variant gets it; what it reads beyond
    that is copied into a buffer that stays.
    """
    read, written = traffic(case)
    large = [size for size in written if size >= 1 << 16]
    rest = max(0, read + sum(written) - 2 * sum(large)) // 2

    def buffers() -> tuple[list[Tensor], Tensor]:
        return [torch.ones(size // 4, device=device) for size in large], torch.ones(rest // 4, device=device)

    kept = torch.empty(rest // 4, device=device)
    calls = itertools.cycle([buffers() for _ in range(rotations)])

    def copy() -> list[Tensor]:
        cloned, source = next(calls)
        kept.copy_(source)
        return [t.clone() for t in cloned]

    return copy


# ---- inputs, providers


class Arguments(NamedTuple):
    """The tensors of a call in the order of the plain formulas' arguments; None for what the case does not have."""

    x: Tensor
    branch: Tensor | None
    scale: Tensor | None
    weight: Tensor
    bias: Tensor
    pos: Tensor | None
    pos_weight: Tensor | None
    pos_bias: Tensor | None

    def differentiable(self) -> list[Tensor]:
        return [t for t in self if t is not None and t.requires_grad]


def make_arguments(case: Case, device: str, seed: int = 0) -> tuple[Arguments, tuple[Tensor | None, ...]]:
    """Random arguments of a case, and the gradients of its outputs (None: that output gets none)."""
    given, dtypes = case.given, case.dtypes
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype, mean: float = 0.0, spread: float = 1.0, grad: bool = True) -> Tensor:
        t = (torch.randn(shape, generator=generator, device=device) * spread + mean).to(dtype)
        return t.requires_grad_(grad and case.differentiates)

    B, N, D, params = case.B, case.N, case.D, dtypes.params
    if case.op == "pe_chain":
        weight, bias = draw(B, D, dtype=params, mean=1.0, spread=0.1), draw(B, D, dtype=params, spread=0.1)
        arguments = Arguments(draw(N, D, dtype=params), None, None, weight, bias, None, None, None)
        return arguments, tuple(draw(N, D, dtype=params, grad=False) for _ in range(B))
    arguments = Arguments(
        x=draw(B, N, D, dtype=dtypes.x),
        branch=draw(B, N, D, dtype=dtypes.branch) if given.branch else None,
        scale=draw(B, dtype=dtypes.branch, mean=1.0, spread=0.1, grad=False) if given.scale else None,
        weight=draw(D, dtype=params, mean=1.0, spread=0.1),
        bias=draw(D, dtype=params, spread=0.1),
        pos=draw(N, D, dtype=params) if given.pos else None,
        pos_weight=draw(D, dtype=params, mean=1.0, spread=0.1) if given.pos else None,
        pos_bias=draw(D, dtype=params, spread=0.1) if given.pos else None,
    )
    if case.op == "pe_norm_pool":
        return arguments, (draw(B, D, dtype=dtypes.out, grad=False),)
    return arguments, (
        draw(B, N, D, dtype=dtypes.out, grad=False),
        draw(B, N, D, dtype=case.stream_dtype, grad=False) if given.stream_grad else None,
        draw(N, D, dtype=params, grad=False) if given.pos else None,
    )


def _layer_norm(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(v, v.shape[-1:], weight, bias, EPS)


def _add(x: Tensor, branch: Tensor | None, scale: Tensor | None) -> Tensor:
    if branch is None:
        return x
    return x + (branch if scale is None else branch * scale[:, None, None])


def _add_norm(x, branch, scale, weight, bias, peer):
    """(y, h): LayerNorm of the stream and the stream, by PyTorch or by a peer's functions."""
    if branch is not None and peer is not None and peer.add_norm is not None:
        return peer.add_norm(x, branch, scale, weight, bias, EPS)
    h = _add(x, branch, scale)
    return _norm(h, weight, bias, peer), h


def _norm(v, weight, bias, peer):
    return _layer_norm(v, weight, bias) if peer is None else peer.norm(v, weight, bias, EPS)


def pe_layer_norm(x, branch, scale, weight, bias, pos, pos_weight, pos_bias, out_dtype, peer=None):
    """The plain formula, as a model without these kernels has it: (y, stream, pos')."""
    y, h = _add_norm(x, branch, scale, weight, bias, peer)
    if pos is not None:
        pos = _norm(pos, pos_weight, pos_bias, peer)
        y = y + pos
    return y if out_dtype is None else y.to(out_dtype), h, pos


def pe_norm_pool(x, branch, scale, weight, bias, pos, pos_weight, pos_bias, out_dtype, peer=None):
    """The plain formula, as a model without these kernels has it: (pooled,)."""
    y, _ = _add_norm(x, branch, scale, weight, bias, peer)
    if pos is not None:
        y = y + _norm(pos, pos_weight, pos_bias, peer)
    y = y.mean(1)
    return (y if out_dtype is None else y.to(out_dtype),)


def pe_chain(x, branch, scale, weight, bias, pos, pos_weight, pos_bias, out_dtype, peer=None):
    """The plain formula, as a model without these kernels has it: a table for each layer."""
    tables = []
    for layer_weight, layer_bias in zip(weight.unbind(0), bias.unbind(0), strict=True):
        x = _norm(x, layer_weight, layer_bias, peer)
        tables.append(x)
    return tuple(tables)


def _ours_layer_norm(x, branch, scale, weight, bias, pos, pos_weight, pos_bias, out_dtype):
    return mk.pe_layer_norm(
        x, weight, bias, pos, pos_weight, pos_bias, branch=branch, branch_scale=scale, eps=EPS, out_dtype=out_dtype
    )


def _ours_norm_pool(x, branch, scale, weight, bias, pos, pos_weight, pos_bias, out_dtype):
    out = mk.pe_norm_pool(
        x, weight, bias, pos, pos_weight, pos_bias, branch=branch, branch_scale=scale, eps=EPS, out_dtype=out_dtype
    )
    return (out,)


def _ours_chain(x, branch, scale, weight, bias, pos, pos_weight, pos_bias, out_dtype):
    return mk.pe_chain(x, weight, bias, eps=EPS).unbind(0)


PLAIN = {"pe_layer_norm": pe_layer_norm, "pe_norm_pool": pe_norm_pool, "pe_chain": pe_chain}
TOKEN_OPERATORS = ("pe_layer_norm", "pe_norm_pool")  # those that INPUTS is about
OURS = {"pe_layer_norm": _ours_layer_norm, "pe_norm_pool": _ours_norm_pool, "pe_chain": _ours_chain}


class Unavailable(RuntimeError):
    """A provider can't run a case; the message says why."""


class Provider(NamedTuple):
    """A function that does the case's work, and the context it runs in."""

    function: Callable[..., Sequence[Tensor | None]]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def _eager(case: Case) -> Provider:
    return Provider(PLAIN[case.op])


def _compile(case: Case) -> Provider:
    torch._dynamo.reset()  # one case's code must not meet another's guards, nor the limit on recompilations
    compiled = torch.compile(PLAIN[case.op], dynamic=False)
    if case.mode != "bwd":
        return Provider(compiled)

    # A backward that runs again and again on one forward must not take that one's buffers for its own.
    def keeping(*args):
        with torch._functorch.config.patch(donated_buffer=False):
            return compiled(*args)

    return Provider(keeping)


def _peer(name: str) -> Callable[[Case], Provider]:
    def provider(case: Case) -> Provider:
        try:
            return Provider(functools.partial(PLAIN[case.op], peer=peers.load(name)))
        except ImportError as error:
            raise Unavailable(str(error)) from error

    return provider


def _backend(name: str) -> Callable[[Case], Provider]:
    def provider(case: Case) -> Provider:
        if name not in mk.available_backends():
            raise Unavailable(mk.backends.status(name).reason)
        return Provider(OURS[case.op], lambda: mk.use_backend(name))

    return provider


# The backward alone is timed again and again on one forward (retain_graph): compiled code must keep its buffers.
torch._functorch.config.donated_buffer = False

PROVIDERS: dict[str, Callable[[Case], Provider]] = {
    "eager": _eager,
    "compile": _compile,
    **{name: _backend(name) for name in mk.backends.BACKENDS},
    **{name: _peer(name) for name in peers.PEERS},
}


def default_providers(device: str) -> list[str]:
    """Eager, torch.compile, our kernels for the device (without any, our plain formula), on a GPU installed peers."""
    ours = harness.kernel_backends(device) or ["reference"]
    return ["eager", "compile", *ours, *(peers.installed() if device == "cuda" else [])]


# ---- calls and their check


def make_call(case: Case, function: Callable, arguments: Arguments, output_grads: Sequence[Tensor | None]):
    """The timed call: the outputs (fwd, fwd_grad), all arguments' gradients by `torch.autograd.grad` (bwd), or both."""
    out_dtype = case.out_dtype
    if not case.has_backward:
        return lambda: function(*arguments, out_dtype)
    wrt = arguments.differentiable()
    at = [i for i, grad in enumerate(output_grads) if grad is not None]
    grads = [output_grads[i] for i in at]
    if case.mode == "bwd":
        outputs = function(*arguments, out_dtype)
        kept = [outputs[i] for i in at]
        return lambda: torch.autograd.grad(kept, wrt, grads, retain_graph=True)

    def forward_backward() -> Sequence[Tensor]:
        outputs = function(*arguments, out_dtype)
        return torch.autograd.grad([outputs[i] for i in at], wrt, grads)

    return forward_backward


def results(
    case: Case, function: Callable, arguments: Arguments, output_grads: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """Every output and gradient of a call by name, for the check."""
    layers = tuple(f"table {layer}" for layer in range(case.B))
    names = {"pe_norm_pool": ("pooled",), "pe_chain": layers}.get(case.op, ("y", "stream", "pos'"))
    outputs = function(*arguments, case.out_dtype)
    found = {name: t.detach() for name, t in zip(names, outputs, strict=True) if t is not None}
    if case.differentiates:
        wrt = [
            f"d{name}"
            for name, t in zip(Arguments._fields, arguments, strict=True)
            if t is not None and t.requires_grad
        ]
        grads = make_call(replace(case, mode="fwd_bwd"), function, arguments, output_grads)()
        found |= dict(zip(wrt, grads, strict=True))
    return found


def reference_results(case: Case, arguments: Arguments, output_grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """What a provider is checked against: the plain formula in fp64 on the same (rounded) arguments."""
    exact = Arguments(*(t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in arguments))

    def formula(*args):
        return PLAIN[case.op](*args[:-1], None)

    return results(case, formula, exact, [g if g is None else g.double() for g in output_grads])


def differences(
    found: dict[str, Tensor], expected: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float
) -> str:
    """Which results are too far from the expected ones, in words; "" when none is.

    Allowed is a relative L2 distance of `tolerance`, and more where the plain formula in the case's own dtypes is
    farther off: on a CPU, eager's bf16 LayerNorm sums the weight's gradient over all rows in bf16, for one.
    """

    def distance(results: dict[str, Tensor], name: str) -> float:
        want = expected[name]
        return ((results[name].double() - want).norm() / want.norm().clamp_min(1e-30)).item()

    wrong = []
    for name, want in expected.items():
        if name not in found or found[name].shape != want.shape:
            wrong.append(f"{name} is missing or has another shape")
            continue
        off, allowed = distance(found, name), max(tolerance, 1.25 * distance(plain, name))
        if not off <= allowed:  # also where it is NaN
            wrong.append(f"{name} is off by {off:.1e} (allowed {allowed:.0e})")
    return ", ".join(wrong)


# ---- running


class Settings(NamedTuple):
    """How a run measures."""

    device: str = "cpu"
    rounds: int = 25
    wall_rounds: int = 10
    cold: bool = False
    roof: bool = True
    min_sample_s: float = harness.MIN_SAMPLE_S


def prepare(case: Case, names: Sequence[str], settings: Settings) -> tuple[list[Variant], dict[str, tuple[str, str]]]:
    """The variants of a case that are right, the roof first, and for each of the others (status, note)."""
    rotations = 1
    if settings.cold and settings.device == "cpu":
        rotations = 1 + -(-4 * harness.last_level_cache_bytes() // traffic(case).read)
    sets = [make_arguments(case, settings.device, seed) for seed in range(rotations)]
    no_grad = torch.no_grad if case.mode == "fwd" else contextlib.nullcontext
    with no_grad():
        expected = reference_results(case, *sets[0])
        plain = results(case, PLAIN[case.op], *sets[0])
    variants = [Variant("copy", roof(case, rotations, settings.device))] if settings.roof else []
    refused = {}
    for name in names:
        try:
            provider = PROVIDERS[name](case)
            with no_grad(), provider.context():
                found = results(case, provider.function, *sets[0])
                wrong = differences(found, expected, plain, case.dtypes.tolerance)
        except Unavailable as error:
            refused[name] = "failed", str(error)
            continue
        except Exception as error:
            # Not ours: say so and go on. torch.compile fails in many ways where there is no working compiler.
            if name in mk.backends.BACKENDS:
                raise
            refused[name] = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        if wrong:
            refused[name] = "wrong", wrong
            continue
        with provider.context():
            calls = itertools.cycle([make_call(case, provider.function, *one) for one in sets])
        call = (lambda calls=calls: next(calls)()) if rotations > 1 else next(calls)
        variants.append(Variant(name, call, _nested(no_grad, provider.context)))
    return variants, refused


def _nested(*contexts: Callable[[], contextlib.AbstractContextManager]):
    @contextlib.contextmanager
    def entered():
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    return entered


def run_case(case: Case, names: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """Check and time every provider on one case; returns the rows, the roof's first."""
    on_gpu = settings.device == "cuda"
    all_threads = torch.get_num_threads()
    with harness.threads(all_threads if on_gpu else 1):
        variants, refused = prepare(case, names, settings)
        clock = harness.CudaClock() if on_gpu else harness.cpu_seconds
        warm = not (settings.cold or on_gpu)
        samples = harness.interleave(
            variants, settings.rounds, clock, warm=warm, min_sample_s=0 if on_gpu else settings.min_sample_s
        )
        peaks = {variant.name: harness.peak_extra_bytes(variant, settings.device) for variant in variants}
    wall = {}
    if settings.wall_rounds and not on_gpu:
        wall = harness.interleave(
            variants, settings.wall_rounds, harness.wall_seconds, warm=warm, min_sample_s=settings.min_sample_s
        )
    total = traffic(case).total
    rows = []
    for name in ("copy", *names) if settings.roof else names:
        status, note = refused.get(name, ("ok", ""))
        row = {"op": case.op, "mode": case.mode, "inputs": case.inputs, "B": case.B, "N": case.N, "D": case.D}
        row |= {"dtype": case.dtype, "cache": "warm" if warm else "cold", "device": settings.device, "provider": name}
        row |= {"status": status, "note": note, "bytes": total}
        row |= dict.fromkeys(("ms", "wall_ms", "gbps", "roof_percent", "peak_extra_bytes"))
        if name in samples:
            fastest = min(samples[name])
            row |= {"ms": fastest * 1e3, "wall_ms": min(wall[name]) * 1e3 if wall else None}
            row |= {"gbps": total / fastest / 1e9, "peak_extra_bytes": peaks[name]}
            if settings.roof:
                row["roof_percent"] = 100 * min(samples["copy"]) / fastest
        rows.append(row | harness.speedups(samples if name in samples and name != "copy" else {}, name))
    return rows


# ---- command line


def parse_size(text: str) -> tuple[int, int, int]:
    try:
        B, N, D = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected BxNxD, for example 64x196x192") from None
    if min(B, N, D) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: B, N and D start at 1")
    return B, N, D


def _listed(choices: Sequence[str]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return check


def _parser(op: str, description: str, sizes, dtypes, modes, inputs, quick: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", type=parse_size, metavar="BxNxD", default=list(sizes))
    add("--grid", action="store_true", help=f"instead of --sizes {len(GRID)}: B 1 to 1024, N 49 to 784, D 96 to 1280")
    add("--max-mib", type=int, metavar="MIB", help="leave out sizes whose x is larger than that in the first dtype")
    add(
        "--dtypes",
        nargs="+",
        type=_listed(tuple(DTYPES)),
        metavar="DTYPE",
        default=list(dtypes),
        help=", ".join(DTYPES),
    )
    add("--modes", nargs="+", type=_listed(MODES), metavar="MODE", default=list(modes), help=", ".join(MODES))
    add(
        "--inputs",
        nargs="+",
        type=_listed(tuple(INPUTS)),
        metavar="INPUTS",
        default=list(inputs),
        help=", ".join(INPUTS),
    )
    add("--providers", nargs="+", type=_listed(tuple(PROVIDERS)), metavar="NAME", help=", ".join(PROVIDERS))
    harness.common_options(parser, rounds=25)
    add("--roofline", metavar="FILE.png", help="draw each provider's bandwidth over the bytes of a call there")
    add("--heatmap", metavar="FILE.png", help="draw how many times faster than eager ours are, over D and B x N, there")
    add("--cold", action="store_true", help="rotate through buffers larger than the cache (a GPU always starts cold)")
    add("--quick", action="store_true", help=quick)
    return parser


COLUMNS = (
    Column("mode", "mode", 8),
    Column("inputs", "inputs", 10),
    Column("size", "B,N,D", 13),
    Column("dtype", "dtype", 6),
    Column("cache", "cache", 5),
    Column("provider", "provider", 10),
    Column("ms", "ms", 9, number(3)),
    Column("wall_ms", "wall ms", 9, number(3)),
    Column("gbps", "GB/s", 7, number(1)),
    Column("roof_percent", "% roof", 7, number(0)),
    Column("speedup_eager", "x eager", 8, number(2)),
    Column("speedup_compile", "x compile", 9, number(2)),
    Column("uncertainty", "+-%", 5, number(1)),
    Column("peak_mb", "peak MB", 8, number(2)),
)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the table shows it: with a size, MB, and half the wider confidence interval in percent."""
    ratios = [(row[f"speedup_{b}"], row[f"speedup_{b}_ci95"]) for b in ("eager", "compile") if row["provider"] != b]
    half = [50 * (ci[1] - ci[0]) / median for median, ci in ratios if median]
    peak = row["peak_extra_bytes"]
    return row | {
        "size": f"{row['B']},{row['N']},{row['D']}",
        "uncertainty": max(half, default=None),
        "peak_mb": None if peak is None else peak / 1e6,
    }


MODE_NAMES = {
    "fwd": "forward",
    "fwd_grad": "forward, gradients recorded",
    "bwd": "backward",
    "fwd_bwd": "forward + backward",
}


def plot(path: str, title: str, rows: list[dict[str, Any]], host: bool = False) -> None:
    """Draw the rows' times: a panel for each operator, mode and inputs, a group of bars for each size and dtype."""
    panels: dict[str, list[Group]] = {}
    one_size = len({(r["B"], r["N"], r["D"], r["dtype"]) for r in rows}) == 1
    factor = 1e3 if host else 1.0
    one_case = itertools.groupby(
        rows, key=lambda r: tuple(r[k] for k in ("op", "mode", "inputs", "B", "N", "D", "dtype"))
    )
    for (op, mode, inputs, *size, dtype), cases in one_case:
        timed = {r["provider"]: r for r in cases if r["ms"] is not None}
        bars = {name: r["ms"] * factor for name, r in timed.items() if name != "copy"}
        notes = {
            name: f"{r['speedup_eager']:.1f}x" for name, r in timed.items() if name != "eager" and r["speedup_eager"]
        }
        panel, label = f"{op}, {MODE_NAMES[mode]}", "x".join(map(str, size)) + f"\n{dtype}"
        if one_size:
            label = f"given {inputs}\n{label}"
        else:
            panel += f", given {inputs}"
        mark = timed["copy"]["ms"] if "copy" in timed else None
        panels.setdefault(panel, []).append(Group(label, bars, notes, mark))
    if not any(group.bars for groups in panels.values() for group in groups):
        harness.progress(f"nothing was timed: no plot in {path}")
        return
    clock = "GPU time" if rows[0]["device"] == "cuda" else "CPU time, one thread"
    footer = f"{clock}, {rows[0]['cache']} cache; over the bars: times faster than eager. "
    footer += harness.describe(harness.machine())
    harness.plot_bars(path, title, "us" if host else "ms", panels, footer)


def main(
    benchmark: str,
    op: str | Sequence[str],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    sizes: Sequence[tuple[int, int, int]] = SIZES,
    quick_sizes: Sequence[tuple[int, int, int]] = SIZES[:1],
    dtypes: Sequence[str] = DEFAULT_DTYPES,
    modes: Sequence[str] = DEFAULT_MODES,
    inputs: Sequence[str] = DEFAULT_INPUTS,
    quick_inputs: Sequence[str] = ("x+f",),
    providers: Callable[[str], Sequence[str]] = default_providers,
    host: bool = False,
) -> int:
    """Run an operator benchmark's command line; returns 1 when a result was wrong, else 0.

    `host`: what is measured is the host's time of tiny calls, in microseconds, where bytes and threads say nothing.
    """
    ops = [op] if isinstance(op, str) else list(op)
    quick = f"few rounds, only {', '.join('x'.join(map(str, s)) for s in quick_sizes)} with {', '.join(quick_inputs)}"
    parser = _parser(benchmark, description, sizes, dtypes, modes, inputs, quick)
    args = parser.parse_args(argv)
    harness.check_common(parser, args)
    if args.quick:
        harness.change_defaults(
            parser, args, sizes=list(quick_sizes), inputs=list(quick_inputs), rounds=9, no_wall=True
        )
    sizes = list(GRID) if args.grid else args.sizes
    if args.max_mib is not None:
        itemsize = DTYPES[args.dtypes[0]].x.itemsize
        sizes = [(B, N, D) for B, N, D in sizes if B * N * D * itemsize <= args.max_mib << 20]
    names = args.providers or list(providers(args.device))
    settings = Settings(
        device=args.device,
        rounds=args.rounds,
        wall_rounds=0 if args.no_wall or host else min(10, args.rounds),
        cold=args.cold,
        roof=not host,
        min_sample_s=20e-3 if host else harness.MIN_SAMPLE_S,
    )
    cases = [
        Case(op, mode, given, *size, dtype)
        for op in ops
        for mode in args.modes
        for given in args.inputs
        for dtype in args.dtypes
        for size in sizes
    ]
    allocator = harness.pin_allocator()
    print(f"{benchmark}: {harness.describe(harness.machine())}")
    columns = (Column("op", "operator", 13), *COLUMNS) if len(ops) > 1 else COLUMNS
    if host:
        left_out = ("cache", "wall_ms", "gbps", "roof_percent", "speedup_compile")
        columns = tuple(c for c in columns if c.key not in left_out)
        columns = tuple(c._replace(heading="us", text=_microseconds) if c.key == "ms" else c for c in columns)
    harness.print_header(columns)
    rows = []
    start = time.perf_counter()
    for done, case in enumerate(cases, 1):
        harness.progress(f"[{done}/{len(cases)}, {time.perf_counter() - start:.0f} s] {case}")
        found = run_case(case, names, settings)
        for row in found:
            harness.print_row(columns, _shown(row))
        rows += found
        if args.json:  # after each case: a run that is cut off leaves what it has
            described = settings._asdict() | {"allocator": allocator, "quick": args.quick}
            harness.write_json(args.json, benchmark, described, rows)
    _summary(rows)
    if args.plot:
        plot(args.plot, description.rstrip("."), rows, host)
    timed = [row for row in rows if row["ms"] is not None]
    if args.roofline and timed:
        plots.roofline(args.roofline, timed, harness.describe(harness.machine()))
    if args.heatmap and timed:
        plots.heatmap(args.heatmap, timed, harness.describe(harness.machine()))
    return harness.exit_code(rows)


def _microseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.1f}"


def _summary(rows: list[dict[str, Any]]) -> None:
    """Say for each of ours in which case it gains least over eager and over torch.compile."""
    print()
    for op, mode, name in sorted(
        {(r["op"], r["mode"], r["provider"]) for r in rows if r["provider"] in mk.backends.BACKENDS}
    ):
        mine = [r for r in rows if (r["op"], r["mode"], r["provider"]) == (op, mode, name)]
        for baseline in ("eager", "compile"):
            key = f"speedup_{baseline}"
            worst = min((r for r in mine if r.get(key)), key=lambda r: r[key], default=None)
            if worst:
                at = f"{worst['inputs']} ({worst['B']},{worst['N']},{worst['D']}) {worst['dtype']}"
                print(f"{name}, {op} {mode}: at least {worst[key]:.2f}x {baseline} (least at {at})")
