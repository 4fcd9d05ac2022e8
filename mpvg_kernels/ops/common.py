"""What the operators share: the `mpvg` library, the gradient mask, pieces of the plain formula and of the Functions.

A raw operator exists once for each kernel backend (`pe_layer_norm_fwd_cpp`, `pe_layer_norm_fwd_triton`, ...) with one
schema and one fake. It is functional: it never changes an input, and its results never alias one. What it does not
compute (a gradient that nobody asked for, say) it returns as None, and its schema says so with `Tensor?`: AOTInductor
takes no None in place of a `Tensor`.

Shape suffixes on tensor names: B batch, N tokens, D width, K positions (N less the prefix tokens).
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.utils import get_layout_constraint_tag

KERNEL_BACKENDS = ("cpp", "triton", "cuda")

LIBRARY = torch.library.Library("mpvg", "DEF")

# Which gradients a raw backward operator computes: the bits of its `grad_mask`.
GRAD_X, GRAD_BRANCH, GRAD_WEIGHT, GRAD_BIAS, GRAD_POS, GRAD_POS_WEIGHT, GRAD_POS_BIAS = (1 << i for i in range(7))

FORWARD_ARGS = (
    "Tensor x, Tensor? branch, Tensor? branch_scale, Tensor weight, Tensor? bias, Tensor? pos, Tensor? pos_weight, "
    "Tensor? pos_bias, float eps, float pos_eps, int num_prefix_tokens, ScalarType out_dtype, bool save"
)
BACKWARD_ARGS = (
    "Tensor weight, Tensor? branch_scale, Tensor? pos, Tensor? pos_weight, float pos_eps, int num_prefix_tokens, "
    "ScalarType x_dtype, ScalarType branch_dtype, int grad_mask"
)
GRADS = (
    "(Tensor? dx, Tensor? dbranch, Tensor? dweight, Tensor? dbias, Tensor? dpos, Tensor? dpos_weight, "
    "Tensor? dpos_bias)"
)


class Options(NamedTuple):
    """Everything about a call that is not a tensor."""

    eps: float
    pos_eps: float
    num_prefix_tokens: int
    out_dtype: torch.dtype
    backend: str


def define(name: str, schema: str, fake: Callable) -> dict[str, torch._ops.OpOverload]:
    """Define the raw operator `name` for every kernel backend; returns backend -> operator."""
    overloads = {}
    for backend in KERNEL_BACKENDS:
        LIBRARY.define(f"{name}_{backend}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        overload = overloads[backend] = getattr(torch.ops.mpvg, f"{name}_{backend}").default
        known = _known_to_inductor(overload, fake) if torch.__version__ < (2, 14) else fake
        torch.library.register_fake(f"mpvg::{name}_{backend}", known, lib=LIBRARY)
    return overloads


def _known_to_inductor(operator: torch._ops.OpOverload, fake: Callable) -> Callable:
    """`fake`, which also says to Inductor, where that is at work, that it has no other code for the operator.

    Inductor finds out by itself too, but before 2.14 it then writes down all that leads to the operator, for a log that
    is off. That text is some six times as long with every layer, and the pool comes behind all of them: four layers
    cost 8 s, twelve never end.
    """

    def run(*args):
        lowering = sys.modules.get("torch._inductor.lowering")
        if lowering is not None and operator not in lowering.lowerings:
            constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator))
            lowering.make_fallback(operator, layout_constraint=constraint)
        return fake(*args)

    return run


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and saved statistics: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake_grads(
    h_BND: Tensor,
    weight_D: Tensor,
    pos_KD: Tensor | None,
    pos_weight_D: Tensor | None,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    mask: int,
) -> tuple[Tensor | None, ...]:
    """The seven gradients of both operators' backward, uninitialised: what their fakes return."""
    params = ((weight_D, GRAD_WEIGHT), (weight_D, GRAD_BIAS), (pos_KD, GRAD_POS))
    params += ((pos_weight_D, GRAD_POS_WEIGHT), (pos_weight_D, GRAD_POS_BIAS))
    return (
        h_BND.new_empty(h_BND.shape, dtype=x_dtype) if mask & GRAD_X else None,
        h_BND.new_empty(h_BND.shape, dtype=branch_dtype) if mask & GRAD_BRANCH else None,
        *(p.new_empty(p.shape) if p is not None and mask & bit else None for p, bit in params),
    )


def join(x_BND: Tensor, branch_BND: Tensor, branch_scale_B: Tensor | None) -> Tensor:
    """The plain formula of the residual add, h = x + s[b] * f, in the promoted dtype of x and f; any token axes."""
    if branch_scale_B is None:
        return x_BND + branch_BND
    h_BND = x_BND + branch_BND * branch_scale_B.view(-1, *[1] * (x_BND.dim() - 1))
    return h_BND.to(torch.promote_types(x_BND.dtype, branch_BND.dtype))


def layer_norm(v: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    """The plain LayerNorm over the last axis, in v's dtype, or the weight's where that is the wider one."""
    dtype = torch.promote_types(v.dtype, weight_D.dtype)
    bias_D = None if bias_D is None else bias_D.to(dtype)
    return F.layer_norm(v.to(dtype), v.shape[-1:], weight_D.to(dtype), bias_D, eps)


def dense_rows(t: Tensor) -> Tensor:
    """`t` with a last axis that kernels can read in steps of one: itself, where it has that."""
    return t if t.stride(-1) == 1 else t.contiguous()


def dense_gradient(g: Tensor) -> Tensor:
    """The same for a gradient that arrives in a backward; Dynamo, tracing one, does not know its strides yet."""
    return g.contiguous() if torch.compiler.is_compiling() else dense_rows(g)


def wanted_gradients(needs: tuple[bool, ...], x_dtype: torch.dtype, branch_dtype: torch.dtype, scaled: bool) -> int:
    """The grad_mask of a backward; `needs` is `ctx.needs_input_grad`, in the order of the Functions' arguments.

    The gradient of an unscaled branch is x's own, unless it needs another dtype: then GRAD_X stands for both.
    """
    x, branch, _, weight, bias, pos, pos_weight, pos_bias, _ = needs
    own = branch and (scaled or x_dtype != branch_dtype)
    return (
        GRAD_X * (x or (branch and not own))
        + GRAD_BRANCH * own
        + GRAD_WEIGHT * weight
        + GRAD_BIAS * bias
        + GRAD_POS * pos
        + GRAD_POS_WEIGHT * pos_weight
        + GRAD_POS_BIAS * pos_bias
    )


class _OnceOnly(torch.autograd.Function):
    """Gives gradients a history whose backward is an error: the kernels have no second derivative.

    `once_differentiable` is no substitute: with `allow_unused=True` it yields None, a wrong answer in silence.
    """

    @staticmethod
    def forward(ctx, name: str, grads: tuple[Tensor | None, ...], *sources: Tensor | None):
        ctx.name = name
        return grads

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.name}: double backward is not supported by the fused kernels; "
            "run the forward under mpvg_kernels.use_backend('reference') to differentiate twice"
        )


def run_backward(name: str, operator: torch._ops.OpOverload, *args) -> tuple[Tensor | None, ...]:
    """Call a raw backward operator; under create_graph its results refuse to be differentiated again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return operator(*args)
    with torch.no_grad():
        grads = operator(*args)
    return _OnceOnly.apply(name, tuple(grads), *(a for a in args if isinstance(a, Tensor)))
