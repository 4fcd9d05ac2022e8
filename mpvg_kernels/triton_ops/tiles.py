"""Row tiles: the launch choices and the device functions that the Triton kernels of both operators are written in.

A program works on a tile of T token positions by D columns. Triton's tensors have powers of two for sides, ViT widths
are often three times one, so a tile is a tuple of one or two column blocks (192 = 128 + 64). Only the functions here
know that; the kernels read as formulas on whole rows. Columns and rows past the end are loaded as zero and never
stored.

Shape suffixes on names: B batch, N tokens, D width, K positions (N less the prefix tokens), T rows of a tile, S slices
of the batch. Arithmetic is fp32. Row offsets are int64, as tensors can pass 2^31 elements.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class LaunchRules:
    """What every launch depends on: chosen from compiled code (registers, barriers), not yet timed on a GPU."""

    # Two accumulators, two loaded tiles and the weights are live in the backward: 16 elements a thread compile to about
    # 128 registers, 64 spill.
    elements_per_thread: int = 16
    # Rows that don't start at a multiple of 16 elements are read one element at a time: a thread then holds a column of
    # the tile instead of a piece of a row, and addresses and row values for each of its rows, so half as many.
    unaligned_elements_per_thread: int = 8
    # 4 warps of such threads, 2048 elements: several rows a program up to width 1024, and at width 192 no row spans two
    # warps, so that its reductions need no barrier.
    warps: int = 4
    # The finishing kernels run on N rows, not B*N: small programs spread them over more multiprocessors.
    finishing_warps: int = 1
    # Wider rows than 16 warps' worth (8192 columns) get more elements a thread and spill: right, but slower.
    max_warps: int = 16
    # Threads that one multiprocessor's 65536 registers hold, at the 128 registers of most backward kernels and the 80
    # of all others. Grids are cut to one wave of them: a second, partly filled one would take as long as the first.
    backward_threads: int = 512
    forward_threads: int = 768
    # fp32 partials of S batch slices are 8*S*N*D bytes written and read, the kernel itself moves 6*B*N*D or more: S <=
    # B/8 keeps them below a sixth of that ...
    samples_per_slice: int = 8
    # ... except where all of them stay in the L2 cache anyway, and more programs are worth more.
    cached_partial_bytes: int = 4 << 20
    # Columns a program of a column sum: 64 bytes of fp32, two sectors, for as many programs as possible.
    sum_columns: int = 16
    sum_rows: int = 128
    # Chunks of a sample's tokens in the pool's forward: the second stage walks over them one by one.
    most_chunks: int = 32
    # The pool's second stage: samples and columns of a program; all of it is a few hundred kilobytes.
    output_rows: int = 8
    output_columns: int = 64
    # A column block narrower than a warp leaves lanes idle that splitting was to save; in rows wider than 1024, which
    # take all of a program's warps, the second block's reductions cost more barriers and instructions than the idle
    # lanes (1280: 24 barriers a row against 6 in the backward).
    narrowest_split: int = 32
    widest_split: int = 1024


RULES = LaunchRules()


@dataclass(frozen=True)
class RowTile:
    """How a program covers rows: its column blocks, its number of rows, its warps."""

    blocks: tuple[int, ...]
    rows: int
    num_warps: int


def column_blocks(D: int) -> tuple[int, ...]:
    """One or two powers of two that cover D columns, two where that leaves fewer of them idle."""
    low = 1 << D.bit_length() - 1
    if low == D:
        return (D,)
    rest = max(triton.next_power_of_2(D - low), RULES.narrowest_split)
    return (low, rest) if rest < low and D <= RULES.widest_split else (2 * low,)


@functools.cache
def row_tile(D: int, N: int, warps: int = RULES.warps) -> RowTile:
    """The tile for N rows of D columns: as many rows as fit in `warps` warps, else one row and the warps it takes."""
    blocks = column_blocks(D)
    per_warp = 32 * (RULES.elements_per_thread if D % 16 == 0 else RULES.unaligned_elements_per_thread)
    fitting = max(1, warps * per_warp // sum(blocks))
    rows = min(1 << fitting.bit_length() - 1, triton.next_power_of_2(max(N, 1)))
    num_warps = triton.next_power_of_2(triton.cdiv(rows * sum(blocks), per_warp))
    return RowTile(blocks, rows, min(num_warps, RULES.max_warps))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """A GPU's; elsewhere (interpreter, ahead-of-time compilation) a small number that still makes several slices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def one_wave(device: torch.device, num_warps: int, threads: int = RULES.forward_threads) -> int:
    """How many programs of `num_warps` the device holds at a time, at `threads` a multiprocessor."""
    return _multiprocessors(device) * max(1, threads // (32 * num_warps))


def slices(count: int, at_most: int) -> tuple[int, int]:
    """(slices, items a slice) for `count` items in at most `at_most` equal slices, of which there is always one."""
    length = max(1, triton.cdiv(count, max(1, at_most)))
    return max(1, triton.cdiv(count, length)), length


@triton.jit
def columns(BLOCKS: tl.constexpr):
    """The column indices (1, block) of each block."""
    if len(BLOCKS) == 1:
        return (tl.arange(0, BLOCKS[0])[None, :],)
    else:
        return (tl.arange(0, BLOCKS[0])[None, :], BLOCKS[0] + tl.arange(0, BLOCKS[1])[None, :])


@triton.jit
def tile_rows(tile, T: tl.constexpr):
    """The row indices (T, 1) of a tile, int64."""
    return tl.cast(tile, tl.int64) * T + tl.arange(0, T)[:, None]


@triton.jit
def zeros(T: tl.constexpr, cols):
    return [tl.zeros([T, c.shape[1]], tl.float32) for c in cols]


@triton.jit
def load(ptr, offset_T, live_T, cols, D: tl.constexpr):
    """Rows at `offset_T` (T, 1), zero where not `live_T`, as fp32."""
    return [tl.load(ptr + offset_T + c, mask=live_T & (c < D), other=0.0).to(tl.float32) for c in cols]


@triton.jit
def load_vector(ptr, cols, D: tl.constexpr):
    """A parameter (D,) as one row, fp32; zero where there is none."""
    if ptr is None:
        return zeros(1, cols)
    else:
        return [tl.load(ptr + c, mask=c < D, other=0.0).to(tl.float32) for c in cols]


@triton.jit
def store(ptr, offset_T, live_T, cols, D: tl.constexpr, v):
    for i in tl.static_range(len(cols)):
        tl.store(ptr + offset_T + cols[i], v[i], mask=live_T & (cols[i] < D))


@triton.jit
def store_column_sums(ptr, cols, D: tl.constexpr, v):
    """The sum over the rows of a tile, in a fixed order, as one row."""
    for i in tl.static_range(len(cols)):
        tl.store(ptr + cols[i], tl.sum(v[i], axis=0, keep_dims=True), mask=cols[i] < D)


@triton.jit
def add(a, b):
    return [a[i] + b[i] for i in (0, 1)[: len(a)]]


@triton.jit
def mul(a, b):
    return [a[i] * b[i] for i in (0, 1)[: len(a)]]


@triton.jit
def scaled(v, factor):
    return [x * factor for x in v]


@triton.jit
def kept(v, keep_T):
    """The rows where `keep_T`, zero elsewhere: a product with 0 would let NaN through."""
    return [tl.where(keep_T, x, 0.0) for x in v]


@triton.jit
def row_sum(v):
    total = tl.sum(v[0], axis=1, keep_dims=True)
    if len(v) == 2:
        total += tl.sum(v[1], axis=1, keep_dims=True)
    return total


@triton.jit
def centered(v, m1_T, cols, D: tl.constexpr):
    """v - m1, and zero in the columns past the end, which must not count in sums."""
    return [tl.where(cols[i] < D, v[i] - m1_T, 0.0) for i in (0, 1)[: len(v)]]


@triton.jit
def normalized(c, m2_T, rstd_T):
    """(c - m2) * rstd, as one fused multiply-add an element."""
    shift = -m2_T * rstd_T
    return [x * rstd_T + shift for x in c]


@triton.jit
def row_statistics(v, cols, D: tl.constexpr, eps):
    """(c, m1, m2, rstd) with c = v - m1: the rounding error of the mean m1 is taken out again by m2 = mean(c)."""
    m1 = row_sum(v) * (1.0 / D)
    c = centered(v, m1, cols, D)
    m2 = row_sum(c) * (1.0 / D)
    var = tl.maximum(row_sum(mul(c, c)) * (1.0 / D) - m2 * m2, 0.0)
    # The hardware's reciprocal root is up to two ulps off, for a whole row: a Newton step takes that out, at a fraction
    # of what an exactly rounded root and quotient cost. Not where the variance has overflowed and rstd is 0.
    rstd = tl.rsqrt(var + eps)
    corrected = rstd + 0.5 * rstd * (1.0 - (var + eps) * rstd * rstd)
    return c, m1, m2, tl.where(rstd > 0.0, corrected, rstd)


@triton.jit
def saved_statistics(h, m1_T, cols, D: tl.constexpr):
    """(c, m2) from the saved m1. The sum for m2 runs beside those of the gradient: one pass, no traffic."""
    c = centered(h, m1_T, cols, D)
    return c, row_sum(c) * (1.0 / D)


@triton.jit
def layer_norm_grad(g, c, m2_T, rstd_T, D: tl.constexpr):
    """rstd * (g - mean(g) - vhat * mean(g * vhat)), the gradient of v for g = dy * w.

    mean(g * vhat) = rstd * (sum(g * c) - m2 * sum(g)) / D: sums that need no other row value first.
    """
    sum_g = row_sum(g)
    slope = rstd_T * rstd_T * (row_sum(mul(g, c)) - m2_T * sum_g) * (1.0 / D)
    shift = rstd_T * (m2_T * slope - sum_g * (1.0 / D))
    slope = rstd_T * slope
    return [g[i] * rstd_T + (shift - c[i] * slope) for i in (0, 1)[: len(g)]]


@triton.jit
def load_stream(x_ptr, x_offset_T, branch_ptr, branch_offset_T, scale_ptr, live_T, cols, D: tl.constexpr):
    """h = x + s * f in fp32, rounded to the promoted dtype of x and f as it is stored; x itself without a branch."""
    v = load(x_ptr, x_offset_T, live_T, cols, D)
    if branch_ptr is not None:
        f = load(branch_ptr, branch_offset_T, live_T, cols, D)
        if scale_ptr is not None:
            f = scaled(f, tl.load(scale_ptr).to(tl.float32))
        v = add(v, f)
        if x_ptr.dtype == branch_ptr.dtype:  # else they promote to fp32
            v = [a.to(x_ptr.dtype.element_ty).to(tl.float32) for a in v]
    return v
