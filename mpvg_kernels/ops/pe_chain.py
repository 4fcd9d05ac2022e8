"""All layers' LN'_l(pos) at once: schema, fakes, plain formula and autograd Function.

MPVG (arXiv 2502.02919) and LaPE give layer l the position embedding pos_l = LN'_l(pos_{l-1}), pos_{-1} = pos, or,
without the hierarchy, pos_l = LN'_l(pos). None depends on the image: the L layers of a model have one (L, K, D) table.
With v_l the row that LN'_l reads, vhat_l the same normalised, rstd_l its reciprocal deviation and

    r_l = dout_l + dv_{l+1}    (r_l = dout_l without the hierarchy)        what arrives at pos_l
    g_l = r_l * w_l            dv_l = rstd_l * (g_l - mean(g_l) - vhat_l * mean(g_l * vhat_l))

the backward, from the last layer to the first, is

    dw_l = sum_k r_l * vhat_l    db_l = sum_k r_l    dpos = dv_0    (the sum of all dv_l without the hierarchy)

Rows are independent of one another, so a kernel takes one row through all layers. The backward finds the rows v_l
again: L * D numbers, which stay in cache, so that nothing is saved besides the inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import define, dense_gradient, layer_norm, run_backward

# Which gradients the raw backward operator computes: the bits of its `grad_mask`.
GRAD_POS, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4


class ChainOptions(NamedTuple):
    """Everything about a call that is not a tensor."""

    eps: float
    hierarchical: bool
    out_dtype: torch.dtype
    backend: str


def reference(pos_KD: Tensor, weight_LD: Tensor, bias_LD: Tensor | None, options: ChainOptions) -> Tensor:
    """The plain formula, (L, K, D): one LayerNorm after the other."""
    biases = [None] * weight_LD.shape[0] if bias_LD is None else bias_LD.unbind(0)
    tables, row_KD = [], pos_KD
    for weight_D, bias_D in zip(weight_LD.unbind(0), biases, strict=True):
        table_KD = layer_norm(row_KD, weight_D, bias_D, options.eps)
        tables.append(table_KD.to(options.out_dtype))
        if options.hierarchical:
            row_KD = table_KD
    return torch.stack(tables)


def _fake_forward(pos, weight, bias, eps, hierarchical, out_dtype):
    return pos.new_empty((weight.shape[0], *pos.shape), dtype=out_dtype)


def _fake_backward(dout, pos, weight, bias, eps, hierarchical, grad_mask):
    return (
        pos.new_empty(pos.shape) if grad_mask & GRAD_POS else None,
        weight.new_empty(weight.shape) if grad_mask & GRAD_WEIGHT else None,
        weight.new_empty(weight.shape) if grad_mask & GRAD_BIAS else None,
    )


_ARGS = "Tensor pos, Tensor weight, Tensor? bias, float eps, bool hierarchical"
FORWARD = define("pe_chain_fwd", f"({_ARGS}, ScalarType out_dtype) -> Tensor", _fake_forward)
BACKWARD = define(
    "pe_chain_bwd",
    f"(Tensor dout, {_ARGS}, int grad_mask) -> (Tensor? dpos, Tensor? dweight, Tensor? dbias)",
    _fake_backward,
)


def fused(pos: Tensor, weight: Tensor, bias: Tensor | None, options: ChainOptions) -> Tensor:
    """The same as `reference`, without gradients, by the kernels of `options.backend`."""
    return FORWARD[options.backend](pos, weight, bias, *options[:3])


class PEChainFunction(torch.autograd.Function):
    """`reference` with gradients, by the kernels of `options.backend`, in the forward and in the backward."""

    @staticmethod
    def forward(ctx, pos, weight, bias, options):
        ctx.options = options
        ctx.save_for_backward(pos, weight, bias)
        return FORWARD[options.backend](pos, weight, bias, *options[:3])

    @staticmethod
    def backward(ctx, dout):
        pos, weight, bias = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad
        mask = GRAD_POS * needs[0] + GRAD_WEIGHT * needs[1] + GRAD_BIAS * needs[2]
        grads = run_backward(
            "pe_chain",
            BACKWARD[options.backend],
            dense_gradient(dout),
            pos,
            weight,
            bias,
            options.eps,
            options.hierarchical,
            mask,
        )
        return *grads, None
