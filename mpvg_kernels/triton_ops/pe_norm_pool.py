"""Triton kernels of `pe_norm_pool`: out[b] = mean_n( LN(h[b, n]; w, b) + LN(pos[n]; w', b') ), h = x + s[b] f.

Forward. The mean goes through both affine parts, so all that a sample needs is the mean of its normalised rows:

    out[b] = w * s[b] + b + w' * s' + b'      s[b] = mean_n hhat[b, n]      s' = mean_n phat[n]

Without w', pos is normalised already, and its mean takes the place of the last two terms.
One read of x, nothing of its size written. A program owns a chunk of one sample's tokens; `pool_kernel` adds up their
normalised rows, and runs once more on pos, as on a batch of one. `output_kernel` adds up the chunks and applies the
formula.

Backward. From the same line, without any sum over tokens (K pooled tokens a sample):

    dw = sum_b dout[b] * s[b]      db = sum_b dout[b]      dp'[n] = db / K for every n      g[b] = dout[b] * w / K
    dh[b, n] = rstd * (g[b] - mean(g[b]) - hhat * mean(g[b] * hhat))      0 for prefix rows

One read of h, one write of dx. As dp' is the same row everywhere, `pos_grad_kernel` of pe_layer_norm gets it with a row
stride of 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.common import GRAD_BIAS, GRAD_BRANCH, GRAD_WEIGHT, GRAD_X
from .pe_layer_norm import POS_GRADS, pos_grads, stream_dtype, sum_columns, sum_stages
from .tiles import (
    RULES,
    add,
    columns,
    kept,
    launch,
    layer_norm_grad,
    load,
    load_scale,
    load_stream,
    load_vector,
    mul,
    row_statistics,
    saved_statistics,
    scaled,
    shifted,
    store,
    store_column_sums,
    tile_rows,
    zeros,
)


@triton.jit(do_not_specialize=["B", "N", "K", "tiles"])
def pool_kernel(
    x_BND, branch_BND, scale_B, h_BND, stats_2BN, partial_BCD, B, N, K, tiles, x_b, x_n, branch_b, branch_n, eps,
    PREFIX: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each chunk's share of mean_n hhat, or of mean_n h without eps. Prefix rows take part in h and stats alone."""
    cols = columns(WIDTH, BLOCKS)
    b = tl.cast(tl.program_id(0), tl.int64)
    scale = load_scale(scale_B, b, B)
    total = zeros(T, cols)
    shift = tl.zeros([T, 1], tl.float32)
    first = tl.program_id(1) * tiles
    for tile in tl.range(first, tl.minimum(first + tiles, tl.cdiv(N, T)), num_stages=STAGES):
        n = tile_rows(tile, T)
        live = n < N
        row = b * N + n
        branch_row = b * branch_b + n * branch_n
        h = load_stream(x_BND + b * x_b, n * x_n, branch_BND, branch_row, scale_B, scale, live, cols, D)
        if h_BND is not None:
            store(h_BND, row * D, live, cols, D, h)
        if eps is None:
            total = add(total, h)
        else:
            c, m1, m2, rstd = row_statistics(h, cols, D, eps)
            if stats_2BN is not None:
                tl.store(stats_2BN + row, m1, mask=live)
                tl.store(stats_2BN + (B + b) * N + n, rstd, mask=live)
            # hhat = c * rstd - m2 * rstd: the second term is one number a row. A row past the end has c = 0, no share.
            pooled = live & (n >= N - K)
            shift -= tl.where(pooled, m2 * rstd, 0.0)
            share = scaled(c, tl.where(live, rstd, 0.0))
            if PREFIX:
                share = kept(share, pooled)
            total = add(total, share)
    chunk = b * tl.num_programs(1) + tl.program_id(1)
    mean = scaled(shifted(total, shift), tl.div_rn(1.0, tl.cast(K, tl.float32)))
    store_column_sums(partial_BCD + chunk * D, cols, D, mean)


@triton.jit(do_not_specialize=["B", "chunks", "pos_chunks"])
def output_kernel(
    partial_BCD, pos_partial_CD, w_D, b_D, pos_w_D, pos_b_D, out_BD, s_BD, B, chunks, pos_chunks,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, MOST_CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds up the chunks and writes s and out = w * s + b + w' * s' + b'; R samples by C columns a program."""
    b = tile_rows(tl.program_id(0), R)
    cols = (tl.program_id(1) * C + tl.arange(0, C)[None, :],)
    live = b < B
    s = zeros(R, cols)
    for chunk in tl.range(chunks, num_stages=STAGES):
        s = add(s, load(partial_BCD, (b * chunks + chunk) * D, live, cols, D))
    if s_BD is not None:
        store(s_BD, b * D, live, cols, D, s)
    out = add(mul(s, load_vector(w_D, 1, cols, D)), load_vector(b_D, 1, cols, D))
    if pos_partial_CD is not None:
        chunk = tl.arange(0, MOST_CHUNKS)[:, None]
        pos = load(pos_partial_CD, chunk * D, chunk < pos_chunks, cols, D)
        pos = (tl.sum(pos[0], axis=0, keep_dims=True),)
        if pos_w_D is not None:
            pos = add(mul(pos, load_vector(pos_w_D, 1, cols, D)), load_vector(pos_b_D, 1, cols, D))
        out = add(out, pos)
    store(out_BD, b * D, live, cols, D, out)


@triton.jit(do_not_specialize=["B", "N", "K", "tiles"])
def backward_kernel(
    dout_BD, h_BND, stats_2BN, w_D, scale_B, dx_BND, dbranch_BND, B, N, K, tiles, dout_b, h_b, h_n,
    PREFIX: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = columns(WIDTH, BLOCKS)
    b = tl.cast(tl.program_id(0), tl.int64)
    scale = load_scale(scale_B, b, B)
    g = mul(load(dout_BD, b * dout_b + tl.zeros([T, 1], tl.int64), True, cols, D), load_vector(w_D, T, cols, D))
    g = scaled(g, tl.div_rn(1.0, tl.cast(K, tl.float32)))
    first = tl.program_id(1) * tiles
    for tile in tl.range(first, tl.minimum(first + tiles, tl.cdiv(N, T)), num_stages=STAGES):
        n = tile_rows(tile, T)
        live = n < N
        row = b * N + n
        h = load(h_BND + b * h_b, n * h_n, live, cols, D)
        m1 = tl.load(stats_2BN + row, mask=live, other=0.0)
        rstd = tl.load(stats_2BN + (B + b) * N + n, mask=live, other=0.0)
        c, m2 = saved_statistics(h, m1, cols, D)
        grad = layer_norm_grad(g, c, m2, rstd, D)
        if PREFIX:
            grad = kept(grad, n >= N - K)
        if dx_BND is not None:
            store(dx_BND, row * D, live, cols, D, grad)
        if dbranch_BND is not None:
            if scale_B is not None:
                grad = scaled(grad, scale)
            store(dbranch_BND, row * D, live, cols, D, grad)


@triton.jit(do_not_specialize=["B", "K"])
def batch_sums_kernel(
    dout_BD, s_BD, dw_D, db_D, dp_D, B, K, dout_b,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dw = sum_b dout * s, db = sum_b dout and dp' = db / K, for this program's columns."""
    cols = (tl.program_id(0) * C + tl.arange(0, C)[None, :],)
    sum_dout = zeros(R, cols)
    sum_dout_s = zeros(R, cols)
    for first in tl.range(0, B, R, num_stages=STAGES):
        b = tl.cast(tl.arange(0, R)[:, None] + first, tl.int64)
        dout = load(dout_BD, b * dout_b, b < B, cols, D)
        sum_dout = add(sum_dout, dout)
        if dw_D is not None:
            sum_dout_s = add(sum_dout_s, mul(dout, load(s_BD, b * D, b < B, cols, D)))
    if dw_D is not None:
        store_column_sums(dw_D, cols, D, sum_dout_s)
    if db_D is not None:
        store_column_sums(db_D, cols, D, sum_dout)
    if dp_D is not None:
        store_column_sums(dp_D, cols, D, scaled(sum_dout, tl.div_rn(1.0, tl.cast(K, tl.float32))))


def _mean_rows(
    x: Tensor,
    branch: Tensor | None,
    branch_scale: Tensor | None,
    h: Tensor | None,
    stats: Tensor | None,
    K: int,
    eps: float | None,
) -> Tensor:
    """Launch `pool_kernel`: partials (B, C, D) fp32 that add up to the mean of a sample's last K normalised rows.

    Without eps of its rows as they are, which then are K.
    """
    B, N, D = x.shape
    read_bytes = x.itemsize + (0 if branch is None else branch.itemsize)
    launched = launch("pe_norm_pool_fwd", x.device, x.dtype, (B, N, D), read_bytes, False)
    partial = x.new_empty((B, launched.slices, D), dtype=torch.float32)
    pool_kernel[(B, launched.slices)](
        x, branch, branch_scale, h, stats, partial, B, N, K, launched.length, *x.stride()[:2],
        *((0, 0) if branch is None else branch.stride()[:2]), eps,
        PREFIX=K < N, D=D, **launched.options,
    )  # fmt: skip
    return partial


def forward(
    x: Tensor,
    branch: Tensor | None,
    branch_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    pos: Tensor | None,
    pos_weight: Tensor | None,
    pos_bias: Tensor | None,
    eps: float,
    pos_eps: float,
    num_prefix_tokens: int,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`mpvg::pe_norm_pool_fwd_triton`: (out, h, stats, s), see `mpvg_kernels.ops.pe_norm_pool`."""
    B, N, D = x.shape
    K = N - num_prefix_tokens
    out = x.new_empty((B, D), dtype=out_dtype)
    h = x.new_empty((B, N, D), dtype=stream_dtype(x, branch)) if save and branch is not None else None
    stats = x.new_empty((2, B, N), dtype=torch.float32) if save else None
    with torch.cuda.device_of(x):
        partial = _mean_rows(x, branch, branch_scale, h, stats, K, eps)
        if pos_weight is None:
            pos_eps = None
        pos_partial = None if pos is None else _mean_rows(pos[None], None, None, None, None, K, pos_eps)
        chunks = partial.shape[1]
        # A single chunk's partial is s: then it is what the backward gets, and no second copy is written.
        s = x.new_empty((B, D), dtype=torch.float32) if save and chunks > 1 else None
        output_kernel[(triton.cdiv(B, RULES.output_rows), triton.cdiv(D, RULES.output_columns))](
            partial, pos_partial, weight, bias, pos_weight, pos_bias, out, s, B, chunks,
            0 if pos is None else pos_partial.shape[1],
            D=D, R=RULES.output_rows, C=RULES.output_columns, MOST_CHUNKS=RULES.most_chunks,
            STAGES=min(RULES.finishing_stages, chunks), num_warps=RULES.sum_warps, enable_fp_fusion=True,
        )  # fmt: skip
    if save and chunks == 1:
        s = partial.view(B, D)
    return out, h, stats, s


def backward(
    dout: Tensor,
    h: Tensor,
    stats: Tensor,
    s: Tensor,
    weight: Tensor,
    branch_scale: Tensor | None,
    pos: Tensor | None,
    pos_weight: Tensor | None,
    pos_eps: float,
    num_prefix_tokens: int,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    grad_mask: int,
) -> tuple[Tensor | None, ...]:
    """`mpvg::pe_norm_pool_bwd_triton`: the seven gradients, see `mpvg_kernels.ops.pe_norm_pool`."""
    B, N, D = h.shape
    K = N - num_prefix_tokens
    dx = h.new_empty((B, N, D), dtype=x_dtype) if grad_mask & GRAD_X else None
    dbranch = h.new_empty((B, N, D), dtype=branch_dtype) if grad_mask & GRAD_BRANCH else None
    dweight = torch.empty_like(weight) if grad_mask & GRAD_WEIGHT else None
    dbias = torch.empty_like(weight) if grad_mask & GRAD_BIAS else None
    dpos = dpos_weight = dpos_bias = dp = None
    if pos is not None and grad_mask & POS_GRADS:
        dp = h.new_empty(D, dtype=torch.float32)

    with torch.cuda.device_of(h):
        if dx is not None or dbranch is not None:
            launched = launch("pe_norm_pool_bwd", h.device, h.dtype, (B, N, D), h.itemsize, False)
            backward_kernel[(B, launched.slices)](
                dout, h, stats, weight, branch_scale, dx, dbranch,
                B, N, K, launched.length, dout.stride(0), *h.stride()[:2],
                PREFIX=K < N, D=D, **launched.options,
            )  # fmt: skip
        if dweight is not None or dbias is not None or dp is not None:
            batch_sums_kernel[(triton.cdiv(D, RULES.sum_columns),)](
                dout, s, dweight, dbias, dp, B, K, dout.stride(0),
                D=D, R=RULES.sum_rows, C=RULES.sum_columns, STAGES=sum_stages(B),
                num_warps=RULES.sum_warps, enable_fp_fusion=True,
            )  # fmt: skip
        if dp is not None:
            sums, dpos, dpos_weight, dpos_bias = pos_grads(
                dp.expand(1, K, D), None, pos, pos_weight, pos_eps, K, grad_mask, bias_sum=False
            )
            if dpos_weight is not None or dpos_bias is not None:
                F = sums.shape[1]
                sum_columns(D, (None, 0, None), (None, 0, None), (sums[1], F, dpos_weight), (sums[2], F, dpos_bias))
    return dx, dbranch, dweight, dbias, dpos, dpos_weight, dpos_bias
