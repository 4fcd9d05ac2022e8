"""Triton kernels of `pe_layer_norm`: h = x + s[b] f, y = LN(h; w, b) + p' with p' = LN(pos; w', b').

Forward. A program owns a tile of token positions and a slice of the batch. It loads w, b and its tile of pos once,
keeps p' + b in registers and walks over its samples: x in, y out, nothing else touches memory.

Backward. With vhat = (v - mean(v)) * rstd(v) and g = dy * w, LayerNorm's Jacobian is I less the projections on 1 and on
vhat:

    dv = rstd * (g - mean(g) - vhat * mean(g * vhat))

so a row of dh needs its own row of dy and h and no other. What crosses rows are the parameters' gradients,

    dw = sum_{b,n} dy * hhat      db = sum_{b,n} dy      dp'[n] = dp'_next[n] + sum_b dy[b, n]

and with the forward's tiling all of them are sums over the loop: dy and dy * hhat are added up in registers. At its end
a program writes sum_b dy (T, D) to partials (S, N, D), one for each of the S batch slices, or only its column sum where
no gradient of pos is asked for; of dy * hhat always the column sum. `pos_grad_kernel` adds the S slices up and takes
dp' back through LN'; `column_sums_kernel` adds up what is left. No atomics, and tiles and slices come from shapes: the
same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.common import (
    GRAD_BIAS,
    GRAD_BRANCH,
    GRAD_POS,
    GRAD_POS_BIAS,
    GRAD_POS_WEIGHT,
    GRAD_WEIGHT,
    GRAD_X,
)
from .tiles import (
    RULES,
    Launch,
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
    normalized,
    row_statistics,
    row_tile,
    saved_statistics,
    scaled,
    store,
    store_column_sums,
    tile_rows,
    zeros,
)

POS_GRADS = GRAD_POS | GRAD_POS_WEIGHT | GRAD_POS_BIAS


@triton.jit(do_not_specialize=["B", "N", "K", "samples"])
def forward_kernel(
    x_BND, branch_BND, scale_B, w_D, b_D, pos_KD, pos_w_D, pos_b_D, y_BND, h_BND, pos_out_KD, stats_2BN,
    B, N, K, samples, x_b, x_n, branch_b, branch_n, eps, pos_eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = columns(WIDTH, BLOCKS)
    n = tile_rows(tl.program_id(0), T)
    live = n < N
    w = load_vector(w_D, T, cols, D)
    shift = load_vector(b_D, T, cols, D)
    if pos_KD is not None:
        prefix = N - K
        has_pos = live & (n >= prefix)
        pos = load(pos_KD, (n - prefix) * D, has_pos, cols, D)
        if pos_w_D is not None:
            c, _, m2, rstd = row_statistics(pos, cols, D, pos_eps)
            pos = mul(normalized(c, m2, rstd), load_vector(pos_w_D, T, cols, D))
            pos = add(pos, load_vector(pos_b_D, T, cols, D))
            if tl.program_id(1) == 0:
                store(pos_out_KD, (n - prefix) * D, has_pos, cols, D, pos)
        shift = add(shift, kept(pos, has_pos))
    first = tl.cast(tl.program_id(1), tl.int64) * samples
    next_scale = load_scale(scale_B, first, B)  # a round ahead: it is not part of the loop's pipeline
    for b in tl.range(first, tl.minimum(first + samples, B), num_stages=STAGES):
        row = b * N + n
        scale = next_scale
        next_scale = load_scale(scale_B, b + 1, B)
        branch_row = b * branch_b + n * branch_n
        h = load_stream(x_BND + b * x_b, n * x_n, branch_BND, branch_row, scale_B, scale, live, cols, D)
        if h_BND is not None:
            store(h_BND, row * D, live, cols, D, h)
        c, m1, m2, rstd = row_statistics(h, cols, D, eps)
        if stats_2BN is not None:
            tl.store(stats_2BN + row, m1, mask=live)
            tl.store(stats_2BN + (B + b) * N + n, rstd, mask=live)
        store(y_BND, row * D, live, cols, D, add(mul(normalized(c, m2, rstd), w), shift))


@triton.jit(do_not_specialize=["B", "N", "samples"])
def backward_kernel(
    dy_BND, dh_BND, h_BND, stats_2BN, w_D, scale_B, dx_BND, dbranch_BND, dy_partial, dw_partial,
    B, N, samples, dy_b, dy_n, dh_b, dh_n, h_b, h_n,
    ROW_PARTIALS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = columns(WIDTH, BLOCKS)
    n = tile_rows(tl.program_id(0), T)
    live = n < N
    w = load_vector(w_D, T, cols, D)
    sum_dy = zeros(T, cols)
    sum_dy_hhat = zeros(T, cols)
    first = tl.cast(tl.program_id(1), tl.int64) * samples
    for b in tl.range(first, tl.minimum(first + samples, B), num_stages=STAGES):
        row = b * N + n
        scale = load_scale(scale_B, b, B)  # not needed before the end: no reason to load it a round ahead
        dy = load(dy_BND + b * dy_b, n * dy_n, live, cols, D)
        if dy_partial is not None:
            sum_dy = add(sum_dy, dy)
        h = load(h_BND + b * h_b, n * h_n, live, cols, D)
        m1 = tl.load(stats_2BN + row, mask=live, other=0.0)
        rstd = tl.load(stats_2BN + (B + b) * N + n, mask=live, other=0.0)
        c, m2 = saved_statistics(h, m1, cols, D)
        if dw_partial is not None:
            sum_dy_hhat = add(sum_dy_hhat, mul(dy, normalized(c, m2, rstd)))
        if dx_BND is not None or dbranch_BND is not None:
            grad = layer_norm_grad(mul(dy, w), c, m2, rstd, D)
            if dh_BND is not None:
                grad = add(grad, load(dh_BND + b * dh_b, n * dh_n, live, cols, D))
            if dx_BND is not None:
                store(dx_BND, row * D, live, cols, D, grad)
            if dbranch_BND is not None:
                if scale_B is not None:
                    grad = scaled(grad, scale)
                store(dbranch_BND, row * D, live, cols, D, grad)
    program = tl.cast(tl.program_id(1), tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if dw_partial is not None:
        store_column_sums(dw_partial + program * D, cols, D, sum_dy_hhat)
    if dy_partial is not None:
        if ROW_PARTIALS:
            store(dy_partial, (tl.cast(tl.program_id(1), tl.int64) * N + n) * D, live, cols, D, sum_dy)
        else:
            store_column_sums(dy_partial + program * D, cols, D, sum_dy)


@triton.jit(do_not_specialize=["S", "N", "K"])
def pos_grad_kernel(
    dy_partial, dpos_out_KD, pos_KD, pos_w_D, dpos_KD, sums_3FD, S, N, K, partial_s, partial_n, pos_eps,
    BIAS_SUM: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dp' = dp'_next + the sum of the S slices, taken back through LN'; column sums for db, dw' and db'.

    Without pos_w_D, pos is p' itself.
    """
    cols = columns(WIDTH, BLOCKS)
    n = tile_rows(tl.program_id(0), T)
    live = n < N
    dp = zeros(T, cols)
    for s in tl.range(S, num_stages=STAGES):
        dp = add(dp, load(dy_partial, tl.cast(s, tl.int64) * partial_s + n * partial_n, live, cols, D))
    F = tl.num_programs(0)
    sums = sums_3FD + tl.cast(tl.program_id(0), tl.int64) * D
    if BIAS_SUM:
        store_column_sums(sums, cols, D, dp)
    prefix = N - K
    has_pos = live & (n >= prefix)
    dp = kept(dp, has_pos)
    offset = (n - prefix) * D
    if dpos_out_KD is not None:
        dp = add(dp, load(dpos_out_KD, offset, has_pos, cols, D))
    if pos_w_D is None:
        if dpos_KD is not None:
            store(dpos_KD, offset, has_pos, cols, D, dp)
    else:
        c, _, m2, rstd = row_statistics(load(pos_KD, offset, has_pos, cols, D), cols, D, pos_eps)
        phat = kept(normalized(c, m2, rstd), has_pos)
        store_column_sums(sums + F * D, cols, D, mul(dp, phat))
        store_column_sums(sums + 2 * F * D, cols, D, dp)
        if dpos_KD is not None:
            grad = layer_norm_grad(mul(dp, load_vector(pos_w_D, T, cols, D)), c, m2, rstd, D)
            store(dpos_KD, offset, has_pos, cols, D, grad)


@triton.jit
def column_sum(src, rows, dst, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr):
    """dst[c] = sum of src[:, c] over `rows` rows, for this program's columns."""
    if dst is not None:
        c = tl.program_id(0) * C + tl.arange(0, C)[None, :]
        total = tl.zeros([R, C], tl.float32)
        for first in tl.range(0, rows, R, num_stages=STAGES):
            r = tl.arange(0, R)[:, None] + first
            total += tl.load(src + tl.cast(r, tl.int64) * D + c, mask=(r < rows) & (c < D), other=0.0)
        tl.store(dst + c, tl.sum(total, axis=0, keep_dims=True), mask=c < D)


@triton.jit(do_not_specialize=["dw_rows", "db_rows", "pos_rows"])
def column_sums_kernel(
    dw_partial, dw_D, db_partial, db_D, dpos_w_partial, dpos_w_D, dpos_b_partial, dpos_b_D, dw_rows, db_rows, pos_rows,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The last step of every parameter gradient, one for each value of the second program index."""
    which = tl.program_id(1)
    if which == 0:
        column_sum(dw_partial, dw_rows, dw_D, D, R, C, STAGES)
    elif which == 1:
        column_sum(db_partial, db_rows, db_D, D, R, C, STAGES)
    elif which == 2:
        column_sum(dpos_w_partial, pos_rows, dpos_w_D, D, R, C, STAGES)
    else:
        column_sum(dpos_b_partial, pos_rows, dpos_b_D, D, R, C, STAGES)


def stream_dtype(x: Tensor, branch: Tensor) -> torch.dtype:
    """The dtype of h = x + f."""
    return x.dtype if x.dtype == branch.dtype else torch.float32


def sum_stages(rows: int) -> int:
    """How deep to pipeline a sum over so many rows."""
    return max(1, min(RULES.finishing_stages, triton.cdiv(rows, RULES.sum_rows)))


def sum_columns(D: int, *sums: tuple[Tensor | None, int, Tensor | None]) -> None:
    """Launch `column_sums_kernel` for up to four (partials, rows, result), in its order; a result may be None."""
    args, rows = [], []
    for partial, count, result in sums:
        args += [partial, result]
        rows.append(count)
    missing = 4 - len(sums)
    grid = triton.cdiv(D, RULES.sum_columns), len(sums)
    column_sums_kernel[grid](
        *args, *[None] * (2 * missing), *rows[:2], rows[2] if missing < 2 else 0,
        D=D, R=RULES.sum_rows, C=RULES.sum_columns, STAGES=sum_stages(max(rows)),
        num_warps=RULES.sum_warps, enable_fp_fusion=True,
    )  # fmt: skip


def pos_grads(
    dy_partial: Tensor,
    dpos_out: Tensor | None,
    pos: Tensor,
    pos_weight: Tensor | None,
    pos_eps: float,
    N: int,
    grad_mask: int,
    bias_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Launch `pos_grad_kernel` on partials (S, N, D) of any strides but the last.

    Returns (sums (3, F, D), dpos, dpos_weight, dpos_bias): the last two still empty, `sums[1]` and `sums[2]` sum up to
    them and, with `bias_sum`, `sums[0]` to the column sum of the partials.
    """
    D = pos.shape[-1]
    tile = row_tile(D, N, dy_partial.itemsize, RULES.finishing)
    programs = triton.cdiv(N, tile.rows)
    launched = Launch(tile, programs, 1, dy_partial.shape[0], min(RULES.finishing_stages, dy_partial.shape[0]))
    sums = pos.new_empty((3, programs, D), dtype=torch.float32)
    dpos = torch.empty_like(pos) if grad_mask & GRAD_POS else None
    dpos_weight = dpos_bias = None
    if pos_weight is not None:
        dpos_weight = torch.empty_like(pos_weight) if grad_mask & GRAD_POS_WEIGHT else None
        dpos_bias = torch.empty_like(pos_weight) if grad_mask & GRAD_POS_BIAS else None
    pos_grad_kernel[(programs,)](
        dy_partial, dpos_out, pos, pos_weight, dpos, sums, dy_partial.shape[0], N, pos.shape[0],
        *dy_partial.stride()[:2], pos_eps,
        BIAS_SUM=bias_sum, D=D, **launched.options,
    )  # fmt: skip
    return sums, dpos, dpos_weight, dpos_bias


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
    """`mpvg::pe_layer_norm_fwd_triton`: (y, h, pos_out, stats), see `mpvg_kernels.ops.pe_layer_norm`."""
    B, N, D = x.shape
    y = x.new_empty((B, N, D), dtype=out_dtype)
    h = None if branch is None else x.new_empty((B, N, D), dtype=stream_dtype(x, branch))
    pos_out = None if pos_weight is None else torch.empty_like(pos)
    stats = x.new_empty((2, B, N), dtype=torch.float32) if save else None
    read_bytes = x.itemsize + (0 if branch is None else branch.itemsize)
    launched = launch("pe_layer_norm_fwd", x.device, x.dtype, (B, N, D), read_bytes, False)
    with torch.cuda.device_of(x):
        forward_kernel[(launched.tiles, launched.slices)](
            x, branch, branch_scale, weight, bias, pos, pos_weight, pos_bias, y, h, pos_out, stats,
            B, N, N - num_prefix_tokens, launched.length, *x.stride()[:2],
            *((0, 0) if branch is None else branch.stride()[:2]), eps, pos_eps,
            D=D, **launched.options,
        )  # fmt: skip
    return y, h, pos_out, stats


def backward(
    dy: Tensor,
    dh: Tensor | None,
    dpos_out: Tensor | None,
    h: Tensor,
    stats: Tensor,
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
    """`mpvg::pe_layer_norm_bwd_triton`: the seven gradients, see `mpvg_kernels.ops.pe_layer_norm`."""
    B, N, D = h.shape
    dx = h.new_empty((B, N, D), dtype=x_dtype) if grad_mask & GRAD_X else None
    dbranch = h.new_empty((B, N, D), dtype=branch_dtype) if grad_mask & GRAD_BRANCH else None
    dweight = torch.empty_like(weight) if grad_mask & GRAD_WEIGHT else None
    dbias = torch.empty_like(weight) if grad_mask & GRAD_BIAS else None
    dpos = dpos_weight = dpos_bias = None
    rows = pos is not None and bool(grad_mask & POS_GRADS)

    read_bytes = dy.itemsize + h.itemsize + (0 if dh is None else dh.itemsize)
    launched = launch("pe_layer_norm_bwd", h.device, h.dtype, (B, N, D), read_bytes, rows)
    S = launched.slices
    programs = launched.tiles * S
    dw_partial = None if dweight is None else h.new_empty((programs, D), dtype=torch.float32)
    dy_partial = None
    if rows or dbias is not None:
        dy_partial = h.new_empty((S, N, D) if rows else (programs, D), dtype=torch.float32)

    with torch.cuda.device_of(h):
        backward_kernel[(launched.tiles, S)](
            dy, dh, h, stats, weight, branch_scale, dx, dbranch, dy_partial, dw_partial,
            B, N, launched.length, *dy.stride()[:2], *((0, 0) if dh is None else dh.stride()[:2]), *h.stride()[:2],
            ROW_PARTIALS=rows, D=D, **launched.options,
        )  # fmt: skip
        if rows:
            sums, dpos, dpos_weight, dpos_bias = pos_grads(
                dy_partial, dpos_out, pos, pos_weight, pos_eps, N, grad_mask, bias_sum=dbias is not None
            )
            F = sums.shape[1]
            if (dweight, dbias, dpos_weight, dpos_bias) != (None,) * 4:
                sum_columns(
                    D,
                    (dw_partial, programs, dweight),
                    (sums[0], F, dbias),
                    (sums[1], F, dpos_weight),
                    (sums[2], F, dpos_bias),
                )
        elif dweight is not None or dbias is not None:
            sum_columns(D, (dw_partial, programs, dweight), (dy_partial, programs, dbias))
    return dx, dbranch, dweight, dbias, dpos, dpos_weight, dpos_bias
