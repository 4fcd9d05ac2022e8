// Kernels of pe_layer_norm:  h = x + s[b] * f;  y = LN(h; w, b) + LN(p; wp, bp).
//
// Both directions walk over units: a tile of token positions x a slice of the batch. What all samples share for the tile (forward: the
// table of p' + b; backward: the running sums of dy) stays in cache while the samples of the slice go by. Tiles and slices depend on
// shapes alone, so results do not depend on the number of threads.
#pragma once

namespace mpvg::MPVG_ISA {

// A tile's rows of T share the L2 with the streams that go by. Longer is better for the hardware's prefetching, which stops where a
// sample's part of the tile ends, shorter for the number of units. (Tried: 16 KB cost 1.5x the time of 256 KB; with software prefetching
// 128 KB costs no more than 256 KB.)
constexpr int64_t kTileBytes = 128 << 10;
// Samples in a slice. The backward's partial sums are 8 / kBackwardSlice bytes read and written per element of x, and plain fp32 sums.
constexpr int64_t kForwardSlice = 4, kBackwardSlice = 8;

struct Tiling {
  Shape shape;
  int64_t tile, tiles, slice, slices;

  Tiling(const Shape& s, int64_t row_bytes, int64_t slice) : shape(s), slice(slice) {
    tiles = max(1, ceil_div(s.N * row_bytes, kTileBytes));
    tile = max(1, ceil_div(s.N, tiles));
    tiles = ceil_div(s.N, tile);
    slices = ceil_div(s.B, slice);
  }
  int64_t units() const { return tiles * slices; }
  int64_t elements_each(int64_t Dp) const { return tile * min(slice, shape.B) * Dp; }
  int64_t slice_of(int64_t unit) const { return unit % slices; }
  int64_t first_row(int64_t unit) const { return unit / slices * tile; }
  int64_t rows(int64_t unit) const { return min(shape.N, first_row(unit) + tile) - first_row(unit); }

  // f(block, next) for the blocks of a unit, two samples at a time. `next` is there to be prefetched (it has no rows after the last one);
  // next.b != block.b says that these samples are done.
  template <class F>
  MPVG_INLINE void visit(int64_t unit, F f) const {
    const int64_t n0 = first_row(unit), n1 = n0 + rows(unit), b0 = slice_of(unit) * slice, b1 = min(shape.B, b0 + slice);
    const auto block_at = [&](int64_t b, int64_t n) {
      if (b + 1 < b1) return Block{b, n, 2, int(min(kRows, 2 * (n1 - n)))};
      return Block{b, n, 1, b < b1 ? int(min(kRows, n1 - n)) : 0};
    };
    for (Block block = block_at(b0, n0); block.rows;) {
      const int64_t n = block.n_of(block.rows);
      const Block next = n < n1 ? block_at(block.b, n) : block_at(block.b + block.pair, n0);
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
  T* const m1 = static_cast<T*>(out.stats.data);
  T* const rstd = m1 ? m1 + B * N : nullptr;
  const auto write = with_dtype<T>(out.y.dtype, [](auto y) { return &affine_rows<T, typename decltype(y)::type>; });
  const bool streaming = Streaming(in.shape).reads(in.x).reads(in.branch).writes(out.h).writes(out.y).pays();
  const Tiling tiling(in.shape, Dp * sizeof(T), kForwardSlice);
  run_parallel(parallel_for, tiling.units(), tiling.elements_each(Dp), [&](int64_t begin, int64_t end) {
    Scratch<T> local(kRows, Dp);
    T* buffer = local.take(kRows);
    for (int64_t unit = begin; unit < end; ++unit) tiling.visit(unit, [&](Block at, Block next) {
      if (streaming) next.prefetch(in.x, D), next.prefetch(in.branch, D);
      const T *h[kRows], *addend[kRows];
      void* y_rows[kRows];
      Moments<T> m[kRows];
      T s[kRows];
      for (int r = 0; r < at.rows; ++r) {
        const int64_t n = at.n_of(r);
        s[r] = scale_of<T>(in.scale, at.b_of(r));
        addend[r] = table && n >= k ? table + (n - k) * Dp : bias;
      }
      stream.get(at, streaming, s, T(in.eps), buffer, h, m);
      at.pointers(out.y, y_rows);
      write(at.rows, y_rows, streaming, h, m, w, addend, D);
      int64_t index[kRows];
      at.offsets(N, 1, index);
      for (int r = 0; out.stats && r < at.rows; ++r) m1[index[r]] = m[r].m1, rstd[index[r]] = m[r].rstd;
    });
    end_stream();
  });
}

// One pass over the rows (dx, df, and for each unit the sums of dy and dy * hhat), then one over the sums (the backward of p').
template <class T>
void pe_layer_norm_bwd(const Saved& in, View dy_BND, View dh_BND, View dpos_out, const Gradients& grad, ParallelFor parallel_for) {
  const auto [B, N, D, k] = in.shape;
  const int64_t Dp = padded<T>(D);
  const Tiling tiling(in.shape, Dp * sizeof(T), kBackwardSlice);
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
  const auto first_pass = choose_grad_means<T>(dy_BND.dtype, in.h.dtype);
  const auto write_dx = choose_input_gradients<T>(grad.x.dtype, dh_BND.dtype);
  const auto write_dx_and_sums = choose_input_gradients<T, true>(grad.x.dtype, dh_BND.dtype);
  const auto write_df = choose_input_gradients<T>(grad.branch.dtype, dh_BND.dtype);
  const bool streaming = Streaming(in.shape).reads(dy_BND).reads(dh_BND).reads(in.h).writes(grad.x).writes(grad.branch).pays();
  const bool dy_in_place = in_place<T>(dy_BND, D), h_in_place = in_place<T>(in.h, D);

  run_parallel(parallel_for, units, tiling.elements_each(Dp), [&](int64_t begin, int64_t end) {
    Scratch<T> local(2 * kRows + 2, Dp);
    T *dy_buffer = local.take(kRows), *h_buffer = local.take(kRows);
    T *dw_samples = local.take(), *sum_samples = local.take();  // of two samples' rows: sums in two levels are the more accurate ones
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n0 = tiling.first_row(unit), rows = tiling.rows(unit);
      T* dw = dw_units ? dw_units + unit * Dp : nullptr;
      T* sum = !sums ? nullptr : dy_sums + (by_token ? tiling.slice_of(unit) * N + n0 : unit) * Dp;
      if (dw) zero_rows(dw, 1, Dp);
      if (sum) zero_rows(sum, by_token ? rows : 1, Dp);
      if (dw) zero_rows(dw_samples, 1, Dp);
      if (sum) zero_rows(sum_samples, 1, Dp);
      tiling.visit(unit, [&](Block at, Block next) {
        if (streaming) next.prefetch(dy_BND, D), next.prefetch(in.h, D), next.prefetch(dh_BND, D);
        void *dy_rows[kRows], *h_rows[kRows], *dh_rows[kRows], *dx_rows[kRows], *df_rows[kRows];
        const T *dy[kRows], *h[kRows];
        Moments<T> m[kRows];
        GradMeans<T> means[kRows];
        T s[kRows], one[kRows];
        at.pointers(dy_BND, dy_rows), at.pointers(in.h, h_rows), at.pointers(dh_BND, dh_rows);
        at.pointers(grad.x, dx_rows), at.pointers(grad.branch, df_rows);
        int64_t index[kRows];
        at.offsets(N, 1, index);
        for (int r = 0; r < at.rows; ++r) {
          m[r] = {m1[index[r]], T(0), rstd[index[r]]};
          dy[r] = dy_in_place ? static_cast<const T*>(dy_rows[r]) : dy_buffer + r * Dp;
          h[r] = h_in_place ? static_cast<const T*>(h_rows[r]) : h_buffer + r * Dp;
          s[r] = scale_of<T>(in.scale, at.b_of(r)), one[r] = T(1);
        }
        first_pass(at.rows, dy_in_place ? nullptr : dy_buffer, dy_rows, h_in_place ? nullptr : h_buffer, h_rows, w, m, means, D);
        for (int r = 0; r < at.rows; r += at.pair) {  // a token at a time: its samples share a sum
          T* const dw_token = dw ? dw_samples : nullptr;
          T* const sum_token = by_token ? sum + (at.n_of(r) - n0) * Dp : sum ? sum_samples : nullptr;
          if (grad.x && dw && sum) {
            write_dx_and_sums(at.pair, dx_rows + r, streaming, dh_rows + r, dy + r, w, h + r, m + r, means + r, one, dw_token, sum_token,
                              D);
            continue;
          }
          accumulate(at.pair, dy + r, h + r, m + r, dw_token, sum_token, Dp);
          if (grad.x) write_dx(at.pair, dx_rows + r, streaming, dh_rows + r, dy + r, w, h + r, m + r, means + r, one, nullptr, nullptr, D);
        }
        if (grad.branch) write_df(at.rows, df_rows, streaming, dh_rows, dy, w, h, m, means, s, nullptr, nullptr, D);
        if (next.b == at.b) return;
        if (dw) add_row(dw, dw_samples, Dp), zero_rows(dw_samples, 1, Dp);
        if (sum && !by_token) add_row(sum, sum_samples, Dp), zero_rows(sum_samples, 1, Dp);
      });
    }
    end_stream();
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
