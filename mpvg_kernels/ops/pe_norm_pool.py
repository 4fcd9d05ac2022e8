"""The last LayerNorm with PE and global average pooling (GAP): schema, fakes, plain formula and autograd Function.

    out[b] = mean_n( LN(h[b,n]) + LN'(pos[n]) ) = w * S[b] + b + mean_n LN'(pos[n])     with S[b] = mean_n hhat[b,n]

MPVG's y = LN(x) + LN'(pos_0) followed by the mean over tokens (arXiv 2502.02919). Because the pool's gradient is the
same for every token, nothing in the backward is summed over B * N, given S:

    dw = sum_b dout[b] * S[b]     db = sum_b dout[b]     dp'[n] = sum_b dout[b] / N
    g[b] = dout[b] * w / N        dh[b,n] = rstd * (g - mean(g) - hhat * mean(g * hhat))

pos without pos_weight is p' itself, normalised already (by pe_chain): dpos = dp'.
"""

import torch
from torch import Tensor

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
) -> Tensor:
    """The plain formula, (B, D). What eager PyTorch computes, and what torch.compile is given."""
    h_BND = x_BND if branch_BND is None else join(x_BND, branch_BND, branch_scale_B)
    y_BKD = layer_norm(h_BND[:, options.num_prefix_tokens :], weight_D, bias_D, options.eps)
    if pos_KD is not None:
        y_BKD = y_BKD + (
            pos_KD if pos_weight_D is None else layer_norm(pos_KD, pos_weight_D, pos_bias_D, options.pos_eps)
        )
    return y_BKD.mean(1).to(options.out_dtype)


def _fake_forward(
    x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, eps, pos_eps, num_prefix_tokens, out_dtype, save
):
    B, N, D = x.shape
    h_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    statistics = accumulation_dtype(x.dtype)
    return (
        x.new_empty((B, D), dtype=out_dtype),
        x.new_empty((B, N, D), dtype=h_dtype) if save and branch is not None else None,
        x.new_empty((2, B, N), dtype=statistics) if save else None,
        x.new_empty((B, D), dtype=statistics) if save else None,
    )


def _fake_backward(
    dout,
    h,
    stats,
    s,
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
    "pe_norm_pool_fwd", f"({FORWARD_ARGS}) -> (Tensor out, Tensor? h, Tensor? stats, Tensor? s)", _fake_forward
)
BACKWARD = define(
    "pe_norm_pool_bwd",
    f"(Tensor dout, Tensor h, Tensor stats, Tensor s, {BACKWARD_ARGS}) -> {GRADS}",
    _fake_backward,
)


def fused(*args) -> Tensor:
    """The same as `reference`, without gradients, by the kernels of `options.backend`."""
    *tensors, options = args
    return FORWARD[options.backend](*tensors, *options[:4], False)[0]


class PENormPoolFunction(torch.autograd.Function):
    """`reference` with gradients, by the kernels of `options.backend`, in the forward and in the backward."""

    @staticmethod
    def forward(ctx, x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, options):
        out, h, stats, s = FORWARD[options.backend](
            x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, *options[:4], True
        )
        ctx.options = options
        ctx.dtypes = x.dtype, x.dtype if branch is None else branch.dtype
        ctx.save_for_backward(x if h is None else h, stats, s, weight, branch_scale, pos, pos_weight)
        return out

    @staticmethod
    def backward(ctx, dout):
        h, stats, s, weight, branch_scale, pos, pos_weight = ctx.saved_tensors
        needs, options = ctx.needs_input_grad, ctx.options
        x_dtype, branch_dtype = ctx.dtypes
        mask = wanted_gradients(needs, x_dtype, branch_dtype, branch_scale is not None)
        dx, dbranch, *dparams = run_backward(
            "pe_norm_pool",
            BACKWARD[options.backend],
            dense_gradient(dout),
            h,
            stats,
            s,
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
