// Kernels of pe_layer_norm:  h = x + s[b] * f;  y = LN(h; w, b) + LN(p; wp, bp).
//
// Both directions walk over units: a tile of token positions x a slice of the batch. What all samples share for the tile (forward: the
// table of p' + b; backward: the running sums of dy) stays in cache while the samples of the slice go by. Tiles and slices depend on
// shapes alone, so results do not depend on the number of threads.
#pragma once

namespace mpvg::MPVG_ISA {

// A tile's rows of T share the L2 with the streams that go by. Longer is better for the hardware's prefetching, which stops where a
// sample's part of the tile ends, shorter for the number of units. (Tried: 16 KB cost 1.5x the time of 256 KB. Software
// prefetching costs 1.1 to 1.4x: it stalls on the line fill buffers, and the hardware does it without.)
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
};

// A unit's tokens [n0, n1) and samples [b0, b1).
struct Unit {
  int64_t slice, n0, n1, b0, b1;
  Unit(const Tiling& t, int64_t unit)
      : slice(unit % t.slices), n0(unit / t.slices * t.tile), n1(min(t.shape.N, n0 + t.tile)), b0(slice * t.slice),
        b1(min(t.shape.B, b0 + t.slice)) {}
};

template <class T>
void pe_layer_norm_fwd(const Inputs& in, const PELayerNormOutputs& out, ParallelFor parallel_for) {
  const auto [B, N, D, k] = in.shape;
  const int64_t Dp = padded<T>(D);
  Scratch<T> scratch(5 + (in.pos ? N - k : 0), Dp);
  const T* w = parameter(scratch, in.weight, D);
  T* bias = parameter(scratch, in.bias, D);
  T* table = nullptr;
  if (in.pos) {
    table = scratch.take(N - k);
    pos_forward(in, out.pos_out, bias, table, scratch, parallel_for);
  }

  const Stream<T> stream(in, out.h);
  T* const mean = static_cast<T*>(out.stats.data);
  T* const rstd = mean ? mean + B * N : nullptr;
  const auto affine = choose_affine<T>(out.y.dtype, stream.dtype);
  const bool streaming = Streaming(in.shape).reads(in.x).reads(in.branch).writes(out.h).writes(out.y).pays();
  const Tiling tiling(in.shape, Dp * sizeof(T), kForwardSlice);
  run_parallel(parallel_for, tiling.units(), tiling.elements_each(Dp), [&](int64_t begin, int64_t end) {
    Scratch<T> local(kTogether, Dp);
    T* buffer = local.take(kTogether);
    const auto step = [&](Group at, auto together) MPVG_LAMBDA {
      constexpr int R = together.rows;
      T s[R];
      for (int r = 0; r < R; ++r) s[r] = scale_of<T>(in.scale, at.sample(r));
      RowMoments<T, R> m;
      const Rows h = stream.get(at, together, streaming, s, T(in.eps), buffer, m), y = at.of(out.y);
      const Rows addend = table && at.n >= k ? at.of(table, k, Dp) : Rows{bias};
      if constexpr (together.samples) {
        affine.with(together)(y, streaming, h, m, w, static_cast<const T*>(addend.first), D);
      } else {
        for (int r = 0; r < R; ++r) affine.one(y.from(r), streaming, h.from(r), m.one(r), w, static_cast<const T*>(addend[r]), D);
      }
      if (mean) save_moments(m, at, N, mean, rstd);
    };
    for (int64_t i = begin; i < end; ++i) {
      const Unit u(tiling, i);
      visit<T>(u.b0, u.b1, u.n0, u.n1, k, D, step, [] {});
    }
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

  const T* const mean = static_cast<const T*>(in.stats.data);
  const T* const rstd = mean + B * N;
  const auto find = choose_grad_means<T>(dy_BND.dtype, in.h.dtype);
  const auto accumulate = choose_accumulate<T>(dy_BND.dtype, in.h.dtype);
  const InputGradients<T, false> gradients(dy_BND.dtype, in.h.dtype, grad.branch.dtype, bool(dh_BND));
  const InputGradients<T, true> gradients_and_sums(dy_BND.dtype, in.h.dtype, grad.branch.dtype, bool(dh_BND));
  // dx is written in h's dtype. Where x has a lower one, or wants no gradient, it goes to a buffer first.
  const bool dx_direct = grad.x.dtype == in.h.dtype;
  const bool streaming =
      dx_direct && Streaming(in.shape).reads(dy_BND).reads(dh_BND).reads(in.h).writes(grad.x).writes(grad.branch).pays();
  const int64_t row_bytes = Dp * sizeof(T);
  const T inv_D = T(1) / T(D);

  run_parallel(parallel_for, units, tiling.elements_each(Dp), [&](int64_t begin, int64_t end) {
    Scratch<T> local(kTogether + 2, Dp);
    T* const dx_buffer = local.take(kTogether);
    T *dw_samples = local.take(), *sum_samples = local.take();  // of a group's samples: sums in two levels are the more accurate ones
    for (int64_t unit = begin; unit < end; ++unit) {
      const Unit u(tiling, unit);
      T* dw = dw_units ? dw_units + unit * Dp : nullptr;
      T* sum = !sums ? nullptr : dy_sums + (by_token ? u.slice * N + u.n0 : unit) * Dp;
      if (dw) zero_rows(dw, 1, Dp);
      if (sum) zero_rows(sum, by_token ? u.n1 - u.n0 : 1, Dp);
      zero_rows(dw_samples, 1, Dp);
      zero_rows(sum_samples, 1, Dp);
      const auto step = [&](Group at, auto together) MPVG_LAMBDA {
        constexpr int R = together.rows;
        const Rows dy = at.of(dy_BND), h = at.of(in.h), dh = at.of(dh_BND), sum_rows = by_token ? at.of(sum, u.n0, Dp) : Rows{sum_samples};
        RowMoments<T, R> m = saved_moments<T, R>(at, N, mean, rstd);
        GradRow<pack<T, R>> k;
        find.with(together)(dy, h, dh, w, m, k, D, inv_D);
        if (!grad.x && !grad.branch) {
          for (int r = 0; r < R; ++r) accumulate(dy[r], h[r], m.of(r), dw_samples, static_cast<T*>(sum_rows[r]), D);
          return;
        }
        T s[R];
        for (int r = 0; r < R; ++r) s[r] = scale_of<T>(in.scale, at.sample(r));
        const Rows dx = dx_direct ? at.of(grad.x) : Rows{dx_buffer, row_bytes}, df = at.of(grad.branch);
        if (dw || sum) {
          gradients_and_sums(together, dx, df, streaming, dh, dy, w, h, m, k, s, dw_samples, sum_rows, D);
        } else {
          gradients(together, dx, df, streaming, dh, dy, w, h, m, k, s, nullptr, {}, D);
        }
        if (!grad.x || dx_direct) return;
        for (int r = 0; r < R; ++r) write_row(grad.x, at.sample(r), at.token(r), dx_buffer + r * Dp, D);
      };
      const auto done = [&] {
        if (dw) add_row(dw, dw_samples, Dp), zero_rows(dw_samples, 1, Dp);
        if (sum && !by_token) add_row(sum, sum_samples, Dp), zero_rows(sum_samples, 1, Dp);
      };
      visit<T>(u.b0, u.b1, u.n0, u.n1, 0, D, step, done);
    }
    end_stream();
  });
  column_sums(grad.weight, dw_units, units, Dp, D);
  if (!by_token) return column_sums(grad.bias, dy_sums, units, Dp, D);

  // dp'[n] = dpos_out[n] + sum_b dy[b, n], and on through LN'. Each block of rows leaves its terms of db, dwp and dbp.
  const T* wp = parameter(scratch, in.pos_weight, D);
  T* block_sums = scratch.take(3 * blocks);
  run_parallel(parallel_for, blocks, kPosRows * Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local(kPosRows, Dp);
    T* dp = local.take(kPosRows);
    for (int64_t block = begin; block < end; ++block) {
      T *db = block_sums + 3 * block * Dp, *dwp = db + Dp, *dbp = dwp + Dp;
      zero_rows(db, 3, Dp);
      const int64_t n0 = block * kPosRows, n1 = min(N, n0 + kPosRows), first = max(n0, k);
      for (int64_t n = n0; n < n1; ++n) {
        T* const row = dp + (n - n0) * Dp;
        const T* const parts = dy_sums + n * Dp;
        zero_rows(row, 1, Dp);
        if (dpos_out && n >= k) read_row(row, dpos_out, n - k, D);
        over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA {
          Vec<T> sum(T(0));
          for (int64_t slice = 0; slice < tiling.slices; ++slice) sum = sum + load<T>(parts + slice * N * Dp + i);
          store(db + i, load<T>(db + i) + sum);
          store(row + i, load<T>(row + i) + sum);
        });
      }
      if (first < n1) pos_backward(in, grad.pos, wp, first - k, n1 - k, dp + (first - n0) * Dp, row_bytes, dwp, dbp);
    }
  });
  column_sums(grad.bias, block_sums, blocks, 3 * Dp, D);
  column_sums(grad.pos_weight, block_sums + Dp, blocks, 3 * Dp, D);
  column_sums(grad.pos_bias, block_sums + 2 * Dp, blocks, 3 * Dp, D);
}

}  // namespace mpvg::MPVG_ISA
