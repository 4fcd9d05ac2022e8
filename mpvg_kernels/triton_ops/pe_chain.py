"""Triton kernels of `pe_chain`: out[l] = LN_l(v_l), v_0 = pos, v_{l+1} = out[l] or, not hierarchical, pos.

Rows are independent, a row's layers are not: a program owns a tile of rows and takes them through all layers. Between
layers they stay in registers, in fp32. What a layer loads (its parameters, in the backward dout too) does not depend on
the layer before: pipelining brings it in ahead.

Backward. Let r_l be all that arrives at out[l] and g = r_l * w_l; from the last layer to the first

    r_l = dout[l] + dv_{l+1}     dv_l = rstd_l * (g - mean(g) - vhat_l * mean(g * vhat_l))     dpos = dv_0
    dw_l = sum_k r_l * vhat_l    db_l = sum_k r_l

The rows vhat_l are found in the forward's order and needed in the other one. L of them (32 of 8192 columns are 1 MB)
fit in no shared memory: they go to a scratch tensor and come back from cache. r_l goes to another one, from which
`layer_sums_kernel`, a second launch, forms the parameters' gradients in an order that no tile or program changes. Not
hierarchical, there is one vhat, r_l is dout[l], and dpos is the gradient for g = sum_l r_l * w_l.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.pe_chain import GRAD_BIAS, GRAD_POS, GRAD_WEIGHT
from .pe_layer_norm import sum_stages
from .tiles import (
    RULES,
    Launch,
    add,
    columns,
    layer_norm_grad,
    load,
    load_vector,
    mul,
    normalized,
    row_statistics,
    row_tile,
    scaled,
    store,
    store_column_sums,
    tile_rows,
    zeros,
)


@triton.jit
def load_layer(ptr, layer, T: tl.constexpr, cols, D: tl.constexpr):
    """A layer's row of a parameter (L, D); zero where there is none."""
    if ptr is None:
        return zeros(T, cols)
    else:
        return load_vector(ptr + layer * D, T, cols, D)


@triton.jit
def affine(vhat, w_LD, b_LD, layer, T: tl.constexpr, cols, D: tl.constexpr):
    return add(mul(vhat, load_layer(w_LD, layer, T, cols, D)), load_layer(b_LD, layer, T, cols, D))


@triton.jit
def row_norm(v, cols, D: tl.constexpr, eps):
    """(vhat, rstd); anything in rows past the end, which are in no sum."""
    c, _, m2, rstd = row_statistics(v, cols, D, eps)
    return normalized(c, m2, rstd), rstd


@triton.jit(do_not_specialize=["L", "K"])
def forward_kernel(
    pos_KD, w_LD, b_LD, out_LKD, L, K, eps,
    HIERARCHICAL: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = columns(WIDTH, BLOCKS)
    k = tile_rows(tl.program_id(0), T)
    live = k < K
    v = load(pos_KD, k * D, live, cols, D)
    if not HIERARCHICAL:
        v, _ = row_norm(v, cols, D, eps)
    for layer in tl.range(L, num_stages=STAGES):
        if HIERARCHICAL:
            vhat, _ = row_norm(v, cols, D, eps)
            v = affine(vhat, w_LD, b_LD, layer, T, cols, D)
            out = v
        else:
            out = affine(v, w_LD, b_LD, layer, T, cols, D)
        store(out_LKD, (tl.cast(layer, tl.int64) * K + k) * D, live, cols, D, out)


@triton.jit(do_not_specialize=["L", "K"])
def backward_kernel(
    dout_LKD, pos_KD, w_LD, b_LD, dpos_KD, vhat_LKD, rstd_LK, r_LKD, L, K, dout_l, dout_k, eps,
    HIERARCHICAL: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """vhat_LKD, with one layer where it is not hierarchical, and r_LKD are for the sums over rows, or None."""
    cols = columns(WIDTH, BLOCKS)
    k = tile_rows(tl.program_id(0), T)
    live = k < K
    v = load(pos_KD, k * D, live, cols, D)
    grad = zeros(T, cols)
    if HIERARCHICAL:
        for layer in tl.range(L, num_stages=STAGES):
            vhat, rstd = row_norm(v, cols, D, eps)
            row = tl.cast(layer, tl.int64) * K + k
            store(vhat_LKD, row * D, live, cols, D, vhat)
            tl.store(rstd_LK + row, rstd, mask=live)
            v = affine(vhat, w_LD, b_LD, layer, T, cols, D)
        tl.debug_barrier()  # a thread may read what another one of its program has written
        for step in tl.range(L, num_stages=STAGES):
            layer = L - 1 - step
            row = tl.cast(layer, tl.int64) * K + k
            grad = add(grad, load(dout_LKD + tl.cast(layer, tl.int64) * dout_l, k * dout_k, live, cols, D))
            if r_LKD is not None:
                store(r_LKD, row * D, live, cols, D, grad)
            vhat = load(vhat_LKD, row * D, live, cols, D)
            rstd = tl.load(rstd_LK + row, mask=live, other=0.0)
            g = mul(grad, load_layer(w_LD, layer, T, cols, D))
            grad = scaled(layer_norm_grad(g, vhat, 0.0, 1.0, D), rstd)  # of a row with mean 0 and rstd 1, then of v
    else:
        vhat, rstd = row_norm(v, cols, D, eps)
        if vhat_LKD is not None:
            store(vhat_LKD, k * D, live, cols, D, vhat)
        for layer in tl.range(L, num_stages=STAGES):
            dout = load(dout_LKD + tl.cast(layer, tl.int64) * dout_l, k * dout_k, live, cols, D)
            grad = add(grad, mul(dout, load_layer(w_LD, layer, T, cols, D)))
        grad = scaled(layer_norm_grad(grad, vhat, 0.0, 1.0, D), rstd)
    if dpos_KD is not None:
        store(dpos_KD, k * D, live, cols, D, grad)


@triton.jit(do_not_specialize=["K"])
def layer_sums_kernel(
    r_LKD, vhat_LKD, dw_LD, db_LD, K, r_l, r_k, vhat_l,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dw = sum_k r * vhat and db = sum_k r, for this program's layer and columns."""
    cols = (tl.program_id(0) * C + tl.arange(0, C)[None, :],)
    layer = tl.cast(tl.program_id(1), tl.int64)
    sum_r = zeros(R, cols)
    sum_r_vhat = zeros(R, cols)
    for first in tl.range(0, K, R, num_stages=STAGES):
        k = tl.cast(tl.arange(0, R)[:, None] + first, tl.int64)
        r = load(r_LKD + layer * r_l, k * r_k, k < K, cols, D)
        sum_r = add(sum_r, r)
        if dw_LD is not None:
            vhat = load(vhat_LKD + layer * vhat_l, k * D, k < K, cols, D)
            sum_r_vhat = add(sum_r_vhat, mul(r, vhat))
    if dw_LD is not None:
        store_column_sums(dw_LD + layer * D, cols, D, sum_r_vhat)
    if db_LD is not None:
        store_column_sums(db_LD + layer * D, cols, D, sum_r)


def plan(D: int, K: int, L: int, itemsize: int, row_bytes: int) -> Launch:
    """The launch for K rows through L layers, which reads `row_bytes` of each column of a tile in a layer."""
    tile = row_tile(D, K, itemsize, RULES.finishing)
    of_a_stage = row_bytes * tile.width * tile.blocks * tile.rows
    deep = min(RULES.chain_stages, 1 + RULES.chain_bytes // of_a_stage)
    return Launch(tile, triton.cdiv(K, tile.rows), 1, L, max(1, min(deep, L)))


def forward(
    pos: Tensor, weight: Tensor, bias: Tensor | None, eps: float, hierarchical: bool, out_dtype: torch.dtype
) -> Tensor:
    """`mpvg::pe_chain_fwd_triton`: (L, K, D), see `mpvg_kernels.ops.pe_chain`."""
    (K, D), L = pos.shape, weight.shape[0]
    out = pos.new_empty((L, K, D), dtype=out_dtype)
    launched = plan(D, K, L, out.itemsize, 2 * weight.itemsize)
    with torch.cuda.device_of(pos):
        forward_kernel[(launched.tiles,)](
            pos, weight, bias, out, L, K, eps, HIERARCHICAL=hierarchical, D=D, **launched.options
        )
    return out


def backward(
    dout: Tensor, pos: Tensor, weight: Tensor, bias: Tensor | None, eps: float, hierarchical: bool, grad_mask: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`mpvg::pe_chain_bwd_triton`: (dpos, dweight, dbias), see `mpvg_kernels.ops.pe_chain`."""
    L, K, D = dout.shape
    dpos = torch.empty_like(pos) if grad_mask & GRAD_POS else None
    dweight = torch.empty_like(weight) if grad_mask & GRAD_WEIGHT else None
    dbias = torch.empty_like(weight) if grad_mask & GRAD_BIAS else None
    sums = dweight is not None or dbias is not None

    def scratch(wanted: bool, *shape: int) -> Tensor | None:
        return pos.new_empty(shape, dtype=torch.float32) if wanted else None

    vhat = scratch(hierarchical or dweight is not None, L if hierarchical else 1, K, D)
    rstd = scratch(hierarchical, L, K)
    r = scratch(sums, L, K, D) if hierarchical else dout
    launched = plan(D, K, L, 4, dout.itemsize + weight.itemsize + 4)
    with torch.cuda.device_of(pos):
        backward_kernel[(launched.tiles,)](
            dout, pos, weight, bias, dpos, vhat, rstd, r, L, K, *dout.stride()[:2], eps,
            HIERARCHICAL=hierarchical, D=D, **launched.options,
        )  # fmt: skip
        if sums:
            layer_sums_kernel[(triton.cdiv(D, RULES.sum_columns), L)](
                r, vhat, dweight, dbias, K, *r.stride()[:2], vhat.stride(0) if hierarchical else 0,
                D=D, R=RULES.sum_rows, C=RULES.sum_columns, STAGES=sum_stages(K),
                num_warps=RULES.sum_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return dpos, dweight, dbias
