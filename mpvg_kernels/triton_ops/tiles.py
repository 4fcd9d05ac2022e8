"""Row tiles: the launch choices and the device functions that the Triton kernels of both operators are written in.

A program works on a tile of T token positions by D columns, in which each thread has elements of one row only. Triton's
tensors have powers of two for sides, ViT widths are often three or five times one, so a tile is a tuple of equal column
blocks (192 = 3 * 64, 1280 = 5 * 256): no lane idles, all blocks have the same layout, and a row's sum is the blocks'
sum, lane by lane, and then one reduction. Only the functions here know that; the kernels read as formulas on whole
rows. Columns and rows past the end are loaded as zero and never stored.

Shape suffixes on names: B batch, N tokens, D width, K positions (N less the prefix tokens), T rows of a tile, S slices
of the batch. Arithmetic is fp32. Row offsets are int64, as tensors can pass 2^31 elements.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import tuned


@dataclass(frozen=True)
class LoopRules:
    """The choices for one of the four kernels that pass over the tokens; what `triton_ops/tune.py` times."""

    threads: int
    """Threads on a multiprocessor, whose 65536 registers the compiler is told to divide among them. A grid is cut to
    whole waves of them, as a partly filled one takes as long as a full one."""
    elements_per_thread: int = 24
    """Of one row. 24 holds a row of 768 columns in one warp, so that no reduction up to there needs a barrier, and
    leaves the backward, with its two accumulators, at 168 registers and without spills."""
    warps: int = 4
    """Of a program: 16 rows of 192 columns, 4 of 768. Fewer where that would leave many rows past the end idle."""
    stages: int | None = None
    """Depth of the loop's pipeline, 1 for none; None: as deep as `LaunchRules.bytes_in_flight` asks for."""


@dataclass(frozen=True)
class LaunchRules:
    """What every launch depends on: chosen from compiled code (registers, barriers, bytes in flight), not yet timed on
    a GPU. benchmarks/results/resources.md has the compiled code's figures.
    """

    # By registers a thread: 128 and 168, in the pool 80 and 96.
    pe_layer_norm_fwd: LoopRules = field(default=LoopRules(threads=512))
    pe_layer_norm_bwd: LoopRules = field(default=LoopRules(threads=384))
    pe_norm_pool_fwd: LoopRules = field(default=LoopRules(threads=768))
    pe_norm_pool_bwd: LoopRules = field(default=LoopRules(threads=640))
    # The finishing kernels and pe_chain's run on N rows, not B*N: small programs spread them over more multiprocessors.
    finishing: LoopRules = field(default=LoopRules(threads=384, warps=1))
    # Their loops are short and have little work in them: latency is all that counts.
    finishing_stages: int = 6
    # pe_chain's loop over layers: a layer's work takes about as long as its loads, so that two ahead are enough; each
    # more takes a second to compile. What is ahead stays within so much shared memory: one layer of 8192 columns.
    chain_stages: int = 3
    chain_bytes: int = 96 << 10
    # Rows that don't start at a multiple of 16 elements are read one element at a time, by an address for each.
    unaligned_elements_per_thread: int = 8
    # Rows shorter than a warp: 4 lanes of 16 bytes read 64 bytes of one at a time, two whole sectors.
    fewest_lanes: int = 4
    # A tile takes fewer rows rather than have more than this part of all rows be past the end.
    most_idle_rows: float = 1 / 16
    # 512 threads a row serve 12288 columns; wider rows get more elements a thread, and spill: right, but slower.
    max_warps: int = 16
    # The loop over samples (or tiles) is software-pipelined: loads of later rounds are under way while this one
    # computes. By Little's law an H100 (3.35 TB/s, 132 multiprocessors, some 700 ns under load) has to have 18 KB under
    # way on each, a B200 (8 TB/s, 148) 38 KB. As many stages as bring that, and no more: each takes as much of the L1
    # cache as shared memory.
    bytes_in_flight: int = 40 << 10
    most_stages: int = 4
    # What a slice costs before its first sample, in samples: the tile of pos and its LayerNorm, the pipeline's filling,
    # in the backward its partial sums.
    slice_overhead: int = 1
    # fp32 partials of S batch slices are 8*S*N*D bytes written and read, the kernel itself moves 6*B*N*D or more: S <=
    # B/8 keeps them below a sixth of that ...
    samples_per_slice: int = 8
    # ... except where all of them stay in the L2 cache anyway, and more programs are worth more.
    cached_partial_bytes: int = 4 << 20
    # Columns a program of a column sum: 64 bytes of fp32, two sectors, for as many programs as possible.
    sum_columns: int = 16
    sum_rows: int = 128
    sum_warps: int = 4
    # Chunks of a sample's tokens in the pool's forward: the second stage walks over them one by one.
    most_chunks: int = 32
    # The pool's second stage: samples and columns of a program; all of it is a few hundred kilobytes.
    output_rows: int = 8
    output_columns: int = 64


RULES = LaunchRules()

# The kernels' tuples of column blocks have up to this many members.
MOST_BLOCKS = 16


class RowTile(NamedTuple):
    """How a program covers rows: its column blocks and their width, its number of rows, its warps."""

    width: int
    blocks: int
    rows: int
    num_warps: int

    @property
    def elements_per_thread(self) -> int:
        """At least one: of a tile with fewer elements than threads, several threads have the same."""
        return max(1, self.width * self.blocks * self.rows // (32 * self.num_warps))


class Launch(NamedTuple):
    """A grid of `tiles` (or samples, in the pool) by `slices` programs, each with a loop of `length` rounds."""

    tile: RowTile
    tiles: int
    slices: int
    length: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        tile = self.tile
        sizes = dict(WIDTH=tile.width, BLOCKS=tile.blocks, T=tile.rows, STAGES=self.stages)
        return sizes | dict(num_warps=tile.num_warps, enable_fp_fusion=True, maxnreg=self.registers)


@functools.cache
def row_tile(D: int, N: int, itemsize: int, rules: LoopRules) -> RowTile:
    """The tile for N rows of D columns of `itemsize` bytes."""
    aligned = D % 16 == 0
    per_thread = rules.elements_per_thread if aligned else RULES.unaligned_elements_per_thread
    lanes = triton.next_power_of_2(triton.cdiv(D, per_thread))
    lanes = min(max(lanes, RULES.fewest_lanes if aligned else 32), 32 * RULES.max_warps)
    # A load of 16 bytes a lane, or of 8 where that leaves fewer columns idle (1280 bf16 columns: 5 * 256, not 3 * 512).
    vectors = (16 // itemsize, 8 // itemsize) if aligned else (1,)
    width = min((lanes * v for v in vectors), key=lambda width: triton.cdiv(D, width) * width)
    while triton.cdiv(D, width) > MOST_BLOCKS:
        width *= 2
    rows = min(max(1, 32 * rules.warps // lanes), triton.next_power_of_2(max(N, 1)))
    while rows * lanes > 32 and rows > 1 and -N % rows > RULES.most_idle_rows * N:
        rows //= 2
    return RowTile(width, triton.cdiv(D, width), rows, max(1, rows * lanes // 32))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """A GPU's; an H100's for ahead-of-time compilation; for the interpreter few, which still make several slices."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 2


def slices(count: int, programs: int, wave: int, at_most: int) -> tuple[int, int]:
    """(slices, rounds a slice): how to cut the loops over `count` rounds of `programs` programs for more programs.

    Counts the time as waves of programs, each as long as a slice and what comes before it, and takes the fewest slices
    of the best.
    """

    def time(length: int) -> int:
        return triton.cdiv(triton.cdiv(count, length) * programs, wave) * (length + RULES.slice_overhead)

    if count < 1:
        return 1, 1
    lengths = {triton.cdiv(count, number) for number in range(1, max(1, min(at_most, count)) + 1)}
    length = min(sorted(lengths, reverse=True), key=time)
    return triton.cdiv(count, length), length


def stages(tile: RowTile, read_bytes: int, rounds: int, rules: LoopRules) -> int:
    """How deep to pipeline a loop of `rounds` rounds that reads `read_bytes` of each element."""
    deep = rules.stages
    if deep is None:
        one_stage = rules.threads * tile.elements_per_thread * read_bytes
        deep = min(1 + triton.cdiv(RULES.bytes_in_flight, one_stage), RULES.most_stages)
    return min(deep, max(rounds, 1))


@functools.lru_cache(maxsize=4096)
def launch(
    kernel: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], read_bytes: int, partials: bool
) -> Launch:
    """The launch of one of the four kernels for a stream of `dtype` and `shape`.

    Args:
        read_bytes: what it reads of each element of the stream, over all tensors of that shape.
        partials: it writes fp32 sums of the size of pos for each slice.
    """
    B, N, D = shape
    rules = tuned.loop_rules(getattr(RULES, kernel), kernel, device, dtype, D)
    tile = row_tile(D, N, dtype.itemsize, rules)
    tiles = triton.cdiv(N, tile.rows)
    wave = _multiprocessors(device) * max(1, rules.threads // (32 * tile.num_warps))
    if kernel.startswith("pe_norm_pool"):
        number, length = slices(tiles, B, wave, RULES.most_chunks)
    else:
        most = B
        if partials:
            most = max(B // RULES.samples_per_slice, RULES.cached_partial_bytes // (4 * max(N, 1) * D))
        number, length = slices(B, tiles, wave, most)
    # Left alone, the compiler may trade a few spilled bytes for one more program. Unaligned rows need what they need.
    registers = min(65536 // max(rules.threads, 32 * tile.num_warps) // 8 * 8, 255) if D % 16 == 0 else None
    return Launch(tile, tiles, number, length, stages(tile, read_bytes, length, rules), registers)


# Where blocks of several tuples meet, a loop that the compiler unrolls builds the result: Triton's comprehensions run
# over one tuple, and in 3.6 (PyTorch 2.11) what a function returns is no index.
@triton.jit
def columns(WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """The column indices (1, WIDTH) of each block."""
    out = ()
    for i in tl.static_range(BLOCKS):
        out = out + (i * WIDTH + tl.arange(0, WIDTH)[None, :],)
    return out


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
def load_vector(ptr, T: tl.constexpr, cols, D: tl.constexpr):
    """A parameter (D,) in each of T rows, fp32; zero where there is none.

    T rows rather than one, which is a register no more: a load of the tile's shape gets the tile's layout, and nothing
    that meets it has to be moved from thread to thread.
    """
    if ptr is None:
        return zeros(T, cols)
    else:
        return load(ptr, tl.zeros([T, 1], tl.int32), True, cols, D)


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
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def mul(a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] * b[i],)
    return out


@triton.jit
def scaled(v, factor):
    return [x * factor for x in v]


@triton.jit
def shifted(v, shift):
    return [x + shift for x in v]


@triton.jit
def kept(v, keep_T):
    """The rows where `keep_T`, zero elsewhere: a product with 0 would let NaN through."""
    return [tl.where(keep_T, x, 0.0) for x in v]


@triton.jit
def row_sum(v):
    """The blocks are added up first: lane by lane, and one reduction is left for all of them."""
    total = v[0]
    for i in tl.static_range(1, len(v)):
        total += v[i]
    return tl.sum(total, axis=1, keep_dims=True)


@triton.jit
def centered(v, m1_T, cols, D: tl.constexpr):
    """v - m1, and zero in the columns past the end, which must not count in sums."""
    out = ()
    for i in tl.static_range(len(v)):
        out = out + (tl.where(cols[i] < D, v[i] - m1_T, 0.0),)
    return out


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
    if D == 1:  # exactly zero, where g = dy * w fused into g - mean(g) would leave the product's rounding, times rstd
        rstd_T = rstd_T * 0.0
    sum_g = row_sum(g)
    slope = rstd_T * rstd_T * (row_sum(mul(g, c)) - m2_T * sum_g) * (1.0 / D)
    shift = rstd_T * (m2_T * slope - sum_g * (1.0 / D))
    slope = rstd_T * slope
    out = ()
    for i in tl.static_range(len(g)):
        out = out + (g[i] * rstd_T + (shift - c[i] * slope),)
    return out


@triton.jit
def load_scale(scale_B, b, B):
    """A sample's scale; any number where there are none, as what goes from round to round has to be a value."""
    if scale_B is None:
        return tl.full([], 1.0, tl.float32)
    else:
        return tl.load(scale_B + b, mask=b < B, other=0.0).to(tl.float32)


@triton.jit
def load_stream(x_ptr, x_offset_T, branch_ptr, branch_offset_T, scale_B, scale, live_T, cols, D: tl.constexpr):
    """h = x + s * f in fp32, rounded to the promoted dtype of x and f as it is stored; x itself without a branch."""
    v = load(x_ptr, x_offset_T, live_T, cols, D)
    if branch_ptr is not None:
        f = load(branch_ptr, branch_offset_T, live_T, cols, D)
        if scale_B is not None:
            f = scaled(f, scale)
        v = add(v, f)
        if x_ptr.dtype == branch_ptr.dtype:  # else they promote to fp32
            v = [a.to(x_ptr.dtype.element_ty).to(tl.float32) for a in v]
    return v
