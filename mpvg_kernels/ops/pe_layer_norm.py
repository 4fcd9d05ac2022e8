"""Dual LayerNorm, y = LN(x + s f) + LN'(pos): schema, fakes, plain formula and autograd Function.

MPVG (arXiv 2502.02919) gives every layer LN_l(x) + pos_l with pos_l = LN'_l(pos_{l-1}). With h = x + s[b] f,
g = dy * w and hhat the normalised row, the backward is

    dh   += rstd * (g - mean(g) - hhat * mean(g * hhat))       dx = dh, df = s[b] * dh
    dp'   = dp'_next + sum_b dy[b]                             the only reduction over the batch besides dw
    dw    = sum_{b,n} dy * hhat            db = sum_{b,n} dy
    dpos, dw', db' = LayerNorm backward of dp' on N rows

pos without pos_weight is p' itself, normalised already (by pe_chain): pos' is then no result, and dpos = sum_b dy[b].
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .common import (
    BACKWARD_ARGS,
    FORWARD_ARGS,
    GRAD_BRANCH,
    GRADS,
    Options,
    accumulation_dtype,
    define,
    dense_gradient,
    fake_grads,
    join,
    layer_norm,
    run_backward,
    wanted_gradients,
)


def reference(
    x_BND: Tensor,
    branch_BND: Tensor | None,
    branch_scale_B: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None,
    pos_KD: Tensor | None,
    pos_weight_D: Tensor | None,
    pos_bias_D: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The plain formula: (y, stream, pos'). What eager PyTorch computes, and what torch.compile is given."""
    h_BND = x_BND if branch_BND is None else join(x_BND, branch_BND, branch_scale_B)
    y_BND = layer_norm(h_BND, weight_D, bias_D, options.eps)
    if pos_KD is None:
        return y_BND.to(options.out_dtype), h_BND, None
    pos_out_KD = pos_KD if pos_weight_D is None else layer_norm(pos_KD, pos_weight_D, pos_bias_D, options.pos_eps)
    y_BND = y_BND + pad(pos_out_KD, (0, 0, options.num_prefix_tokens, 0))
    return y_BND.to(options.out_dtype), h_BND, None if pos_weight_D is None else pos_out_KD.to(pos_KD.dtype)


def _fake_forward(
    x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, eps, pos_eps, num_prefix_tokens, out_dtype, save
):
    h_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        None if branch is None else x.new_empty(x.shape, dtype=h_dtype),
        None if pos_weight is None else pos.new_empty(pos.shape),
        x.new_empty((2, *x.shape[:2]), dtype=accumulation_dtype(x.dtype)) if save else None,
    )


def _fake_backward(
    dy,
    dh,
    dpos_out,
    h,
    stats,
    weight,
    branch_scale,
    pos,
    pos_weight,
    pos_eps,
    num_prefix_tokens,
    x_dtype,
    branch_dtype,
    grad_mask,
):
    return fake_grads(h, weight, pos, pos_weight, x_dtype, branch_dtype, grad_mask)


FORWARD = define(
    "pe_layer_norm_fwd", f"({FORWARD_ARGS}) -> (Tensor y, Tensor? h, Tensor? pos_out, Tensor? stats)", _fake_forward
)
BACKWARD = define(
    "pe_layer_norm_bwd",
    f"(Tensor dy, Tensor? dh, Tensor? dpos_out, Tensor h, Tensor stats, {BACKWARD_ARGS}) -> {GRADS}",
    _fake_backward,
)


def fused(*args) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same as `reference`, without gradients, by the kernels of `options.backend`."""
    *tensors, options = args
    y, h, pos_out, _ = FORWARD[options.backend](*tensors, *options[:4], False)
    return y, (tensors[0] if h is None else h), pos_out


class PELayerNormFunction(torch.autograd.Function):
    """`reference` with gradients, by the kernels of `options.backend`, in the forward and in the backward.

    The stream is an output also where it is x itself: its gradient then reaches the backward kernel, which adds it in
    registers, and autograd needs no pass of its own over (B, N, D) for that sum.
    """

    @staticmethod
    def forward(ctx, x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, options):
        y, h, pos_out, stats = FORWARD[options.backend](
            x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, *options[:4], True
        )
        if h is None:
            h = x
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.dtypes = x.dtype, x.dtype if branch is None else branch.dtype
        ctx.save_for_backward(h, stats, weight, branch_scale, pos, pos_weight)
        needs = ctx.needs_input_grad
        frozen = []
        if not (needs[0] or needs[1]):
            frozen.append(h)
        if pos_out is not None and not any(needs[5:8]):
            frozen.append(pos_out)
        if frozen:
            ctx.mark_non_differentiable(*frozen)
        return y, h, pos_out

    @staticmethod
    def backward(ctx, dy, dh, dpos_out):
        h, stats, weight, branch_scale, pos, pos_weight = ctx.saved_tensors
        # Only the stream or pos' was used: a zero that takes no memory stands for dy.
        dy = h.new_zeros(h.shape[-1]).expand(h.shape) if dy is None else dense_gradient(dy)
        needs, options = ctx.needs_input_grad, ctx.options
        x_dtype, branch_dtype = ctx.dtypes
        mask = wanted_gradients(needs, x_dtype, branch_dtype, branch_scale is not None)
        dx, dbranch, *dparams = run_backward(
            "pe_layer_norm",
            BACKWARD[options.backend],
            dy,
            None if dh is None else dense_gradient(dh),
            None if dpos_out is None else dpos_out.contiguous(),
            h,
            stats,
            weight,
            branch_scale,
            pos,
            pos_weight,
            options.pos_eps,
            options.num_prefix_tokens,
            x_dtype,
            branch_dtype,
            mask,
        )
        if needs[1] and not mask & GRAD_BRANCH:
            dbranch = dx
        return dx if needs[0] else None, dbranch, None, *dparams, None
