// Kernels of pe_layer_norm:  h = x + s[b] * f;  y = LN(h; w, b) + LN(p; wp, bp).
//
// Both directions walk over units: a tile of token positions x a slice of the batch. What all samples share for the tile (forward: the
// table of p' + b; backward: the running sums of dy) stays in cache while the samples of the slice go by. Tiles and slices depend on
// shapes alone, so results do not depend on the number of threads.
#pragma once

namespace mpvg::MPVG_ISA {

#ifndef MPVG_TILE_BYTES
#define MPVG_TILE_BYTES 65536
#endif

// A few rows of one sample; rows == 0: there is none.
struct Block {
  int64_t b, n;
  int rows;
};

struct Tiling {
  Shape shape;
  int64_t tile, tiles, slice, slices;

  Tiling(const Shape& s, int64_t row_bytes) : shape(s) {
    tiles = max(1, ceil_div(s.N * row_bytes, MPVG_TILE_BYTES));
    tile = max(1, ceil_div(s.N, tiles));
    tiles = ceil_div(s.N, tile);
    slice = 16;
    slices = ceil_div(s.B, slice);
  }
  int64_t units() const { return tiles * slices; }
  int64_t elements_each(int64_t Dp) const { return tile * min(slice, shape.B) * Dp; }
  int64_t slice_of(int64_t unit) const { return unit % slices; }
  int64_t first_row(int64_t unit) const { return unit / slices * tile; }
  int64_t rows(int64_t unit) const { return min(shape.N, first_row(unit) + tile) - first_row(unit); }

  // f(block, next) for the blocks of a unit, sample by sample: `next` is there to be prefetched. Crossing from one sample to the next
  // is where the hardware's own prefetching stops.
  template <class F>
  MPVG_INLINE void visit(int64_t unit, F f) const {
    const int64_t n0 = first_row(unit), n1 = n0 + rows(unit), b0 = slice_of(unit) * slice, b1 = min(shape.B, b0 + slice);
    Block block{b0, n0, int(min(kRows, n1 - n0))};
    while (block.rows) {
      Block next{block.b, block.n + kRows, 0};
      if (next.n >= n1) next.b += 1, next.n = n0;
      if (next.b < b1) next.rows = int(min(kRows, n1 - next.n));
      f(block, next);
      block = next;
    }
  }
};

template <class T>
void pe_layer_norm_fwd(const Inputs& in, const PELayerNormOutputs& out, ParallelFor parallel_for) {
  const auto [B, N, D, k] = in.shape;
  const int64_t Dp = padded<T>(D);
  Scratch<T> scratch(4 + (in.pos ? N - k : 0), Dp);
  const T* w = parameter(scratch, in.weight, D);
  const T* bias = parameter(scratch, in.bias, D);
  T* table = nullptr;
  if (in.pos) {
    table = scratch.take(N - k);
    pos_forward(in, out.pos_out, bias, table, scratch, parallel_for);
  }

  const Stream<T> stream(in, out.h);
  T* m1 = static_cast<T*>(out.stats.data);
  T* rstd = m1 + B * N;
  const auto write = find_affine<T>(out.y.dtype);
  const Tiling tiling(in.shape, Dp * sizeof(T));
  run_parallel(parallel_for, tiling.units(), tiling.elements_each(Dp), [&](int64_t begin, int64_t end) {
    Scratch<T> local(kRows, Dp);
    T* buffer = local.take(kRows);
    for (int64_t unit = begin; unit < end; ++unit) tiling.visit(unit, [&](Block at, Block next) {
      for (int r = 0; r < next.rows; ++r) {
        stream.prefetch_row(next.b, next.n + r);
        prefetch<true>(out.y.at(next.b, next.n + r), D * bytes(out.y.dtype));
      }
      const T *h[kRows], *addend[kRows];
      Moments<T> m[kRows];
      stream.get(at.rows, at.b, at.n, scale_of<T>(in.scale, at.b), T(in.eps), buffer, h, m);
      for (int r = 0; r < at.rows; ++r) addend[r] = table && at.n + r >= k ? table + (at.n + r - k) * Dp : bias;
      write(at.rows, out.y, at.b, at.n, h, m, w, addend, D);
      for (int r = 0; out.stats && r < at.rows; ++r) m1[at.b * N + at.n + r] = m[r].m1, rstd[at.b * N + at.n + r] = m[r].rstd;
    });
  });
}

// One pass over the rows (dx, df, and for each unit the sums of dy and dy * hhat), then one over the sums (the backward of p').
template <class T>
void pe_layer_norm_bwd(const Saved& in, View dy_BND, View dh_BND, View dpos_out, const Gradients& grad, ParallelFor parallel_for) {
  const auto [B, N, D, k] = in.shape;
  const int64_t Dp = padded<T>(D);
  const Tiling tiling(in.shape, Dp * sizeof(T));
  const int64_t units = tiling.units(), blocks = ceil_div(N, kPosRows);
  // The sums of dy are kept token by token, (slices, N) rows, if p' asks for them; else one row a unit does.
  const bool by_token = grad.pos || grad.pos_weight || grad.pos_bias;
  const bool sums = by_token || grad.bias;
  Scratch<T> scratch(2 + units + (by_token ? tiling.slices * N + 3 * blocks : units), Dp);
  const T* w = parameter(scratch, in.weight, D);
  T* dw_units = grad.weight ? scratch.take(units) : nullptr;
  T* dy_sums = sums ? scratch.take(by_token ? tiling.slices * N : units) : nullptr;

  const T* m1 = static_cast<const T*>(in.stats.data);
  const T* rstd = m1 + B * N;
  const auto first_pass = find_grad_means<T>(dy_BND.dtype, in.h.dtype);
  const auto write_dx = find_input_gradients<T>(grad.x.dtype, dh_BND.dtype);
  const auto write_df = find_input_gradients<T>(grad.branch.dtype, dh_BND.dtype);
  const bool dy_in_place = in_place<T>(dy_BND, D), h_in_place = in_place<T>(in.h, D);

  run_parallel(parallel_for, units, tiling.elements_each(Dp), [&](int64_t begin, int64_t end) {
    Scratch<T> local(2 * kRows + 2, Dp);
    T *dy_buffer = local.take(kRows), *h_buffer = local.take(kRows);
    T *dw_sample = local.take(), *sum_sample = local.take();  // of one sample's rows: sums in two levels are the more accurate ones
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n0 = tiling.first_row(unit), rows = tiling.rows(unit);
      T* dw = dw_units ? dw_units + unit * Dp : nullptr;
      T* sum = !sums ? nullptr : dy_sums + (by_token ? tiling.slice_of(unit) * N + n0 : unit) * Dp;
      if (dw) zero_rows(dw, 1, Dp);
      if (sum) zero_rows(sum, by_token ? rows : 1, Dp);
      tiling.visit(unit, [&](Block at, Block next) {
        for (int r = 0; r < next.rows; ++r) {
          prefetch(dy_BND.at(next.b, next.n + r), D * bytes(dy_BND.dtype));
          prefetch(in.h.at(next.b, next.n + r), D * bytes(in.h.dtype));
          if (dh_BND) prefetch(dh_BND.at(next.b, next.n + r), D * bytes(dh_BND.dtype));
          if (grad.x) prefetch<true>(grad.x.at(next.b, next.n + r), D * bytes(grad.x.dtype));
        }
        if (at.n == n0) {
          if (dw) zero_rows(dw_sample, 1, Dp);
          if (sum && !by_token) zero_rows(sum_sample, 1, Dp);
        }
        const void *dy_rows[kRows], *h_rows[kRows];
        const T *dy[kRows], *h[kRows];
        Moments<T> m[kRows];
        GradMeans<T> means[kRows];
        for (int r = 0; r < at.rows; ++r) {
          dy_rows[r] = dy_BND.at(at.b, at.n + r), h_rows[r] = in.h.at(at.b, at.n + r);
          dy[r] = dy_in_place ? static_cast<const T*>(dy_rows[r]) : dy_buffer + r * Dp;
          h[r] = h_in_place ? static_cast<const T*>(h_rows[r]) : h_buffer + r * Dp;
          m[r] = {m1[at.b * N + at.n + r], T(0), rstd[at.b * N + at.n + r]};
        }
        first_pass(at.rows, dy_in_place ? nullptr : dy_buffer, dy_rows, h_in_place ? nullptr : h_buffer, h_rows, w, m, means, D);
        accumulate(at.rows, dy, h, m, dw ? dw_sample : nullptr, by_token ? sum + (at.n - n0) * Dp : sum ? sum_sample : nullptr,
                   by_token ? Dp : 0, Dp);
        if (grad.x) write_dx(at.rows, grad.x, dh_BND, at.b, at.n, dy, w, h, m, means, T(1), D);
        if (grad.branch) write_df(at.rows, grad.branch, dh_BND, at.b, at.n, dy, w, h, m, means, scale_of<T>(in.scale, at.b), D);
        if (at.n + at.rows == n0 + rows) {
          if (dw) add_row(dw, dw_sample, Dp);
          if (sum && !by_token) add_row(sum, sum_sample, Dp);
        }
      });
    }
  });
  column_sums(grad.weight, dw_units, units, Dp, D);
  if (!by_token) return column_sums(grad.bias, dy_sums, units, Dp, D);

  // dp'[n] = dpos_out[n] + sum_b dy[b, n], and on through LN'. Each block of rows leaves its terms of db, dwp and dbp.
  const T* wp = parameter(scratch, in.pos_weight, D);
  T* block_sums = scratch.take(3 * blocks);
  run_parallel(parallel_for, blocks, kPosRows * Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local(3, Dp);
    T *dp = local.take(), *row = local.take(), *pos_buffer = local.take();
    for (int64_t block = begin; block < end; ++block) {
      T *db = block_sums + 3 * block * Dp, *dwp = db + Dp, *dbp = dwp + Dp;
      zero_rows(db, 3, Dp);
      for (int64_t n = block * kPosRows; n < min(N, (block + 1) * kPosRows); ++n) {
        zero_rows(dp, 1, Dp);
        for (int64_t slice = 0; slice < tiling.slices; ++slice) add_row(dp, dy_sums + (slice * N + n) * Dp, Dp);
        add_row(db, dp, Dp);
        if (n < k) continue;
        if (dpos_out) {
          zero_rows(row, 1, Dp);
          read_row(row, dpos_out, n - k, D);
          add_row(dp, row, Dp);
        }
        pos_backward(in, grad.pos, wp, n - k, dp, pos_buffer, dwp, dbp);
      }
    }
  });
  column_sums(grad.bias, block_sums, blocks, 3 * Dp, D);
  column_sums(grad.pos_weight, block_sums + Dp, blocks, 3 * Dp, D);
  column_sums(grad.pos_bias, block_sums + 2 * Dp, blocks, 3 * Dp, D);
}

}  // namespace mpvg::MPVG_ISA
