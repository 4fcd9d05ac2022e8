// Kernels of pe_norm_pool:  out[b] = w * S[b] + b + mean_n p'[n],  S[b] = mean_n hhat[b, n]  (n runs over the rows after the prefix).
//
// The forward reads x once; the backward needs no sum over B * N, so it reads and writes each row once. Work is split over samples, and
// within a sample too when there are few of them.
#pragma once

namespace mpvg::MPVG_ISA {

// Rows whose hhat are added up before they join the sample's sum: sums in two levels are the more accurate ones.
constexpr int64_t kPoolRows = 32;
// With fewer samples than this a sample is split, into pieces of at least kPoolRows rows.
constexpr int64_t kPoolUnits = 32;

// What counts as more than the last-level cache keeps in the forward, whose only large output is the h of a joined stream, which the backward
// reads again: streamed out at 14 MB in all, forward and backward took 1.2 to 1.3 times as long.
constexpr int64_t kPoolStreamBytes = 20 << 20;

// addend = b + mean_n p'[n] = b + wp * mean_n phat[n] + bp. Without a wp, p is p' already: phat = p, wp = 1.
template <class T>
const T* pool_addend(const Inputs& in, Scratch<T>& scratch, ParallelFor parallel_for) {
  const int64_t D = in.shape.D, Dp = padded<T>(D), P = in.shape.N - in.shape.prefix, blocks = ceil_div(P, kPosRows);
  T* addend = parameter(scratch, in.bias, D);
  if (!in.pos) return addend;
  T* wp = parameter(scratch, in.pos_weight, D);
  for (int64_t i = 0; !in.pos_weight && i < D; ++i) wp[i] = T(1);
  const T* bp = parameter(scratch, in.pos_bias, D);
  T* mean = scratch.take();
  T* phat_sums = scratch.take(blocks);
  const Stream<T> stream = pos_stream<T>(in.pos, D);
  const auto add = choose_add_normalised<T>(in.pos.dtype);
  run_parallel(parallel_for, blocks, kPosRows * Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local(1, Dp);
    T* row = local.take();
    for (int64_t block = begin; block < end; ++block) {
      T* sum = phat_sums + block * Dp;
      zero_rows(sum, 1, Dp);
      const int64_t n0 = block * kPosRows, n1 = min(P, n0 + kPosRows);
      for (int64_t n = n0; !in.pos_weight && n < n1; ++n) read_row(row, in.pos, n, D), add_row(sum, row, Dp);
      if (in.pos_weight) visit_tokens<T>(n0, n1, D, [&](Group at, auto together) {
        constexpr int R = together.rows;
        RowMoments<T, R> m;
        const T one[R] = {};
        const Rows p = stream.get(at, together, false, one, T(in.pos_eps), nullptr, m);
        add.with(together)(sum, p, m, D);
      });
    }
  });
  column_sums({mean, arithmetic_dtype<T>}, phat_sums, blocks, Dp, Dp);
  over_padded<T>(Dp, [&](int64_t i) {
    const Vec<T> phat = load<T>(mean + i) * Vec<T>(T(1) / T(P));
    store(addend + i, load<T>(addend + i) + fma(load<T>(wp + i), phat, load<T>(bp + i)));
  });
  return addend;
}

template <class T>
void pe_norm_pool_fwd(const Inputs& in, const PENormPoolOutputs& out, ParallelFor parallel_for) {
  const auto [B, N, D, k] = in.shape;
  const int64_t Dp = padded<T>(D);
  const int64_t pieces = B >= kPoolUnits ? 1 : min(ceil_div(kPoolUnits, max(B, 1)), ceil_div(N, kPoolRows));
  const int64_t piece = ceil_div(ceil_div(N, pieces), kPoolRows) * kPoolRows;
  Scratch<T> scratch(5 + ceil_div(N, kPosRows) + (pieces > 1 ? B * pieces : 0), Dp);
  const T* w = parameter(scratch, in.weight, D);
  const T* addend = pool_addend(in, scratch, parallel_for);
  T* partials = pieces > 1 ? scratch.take(B * pieces) : nullptr;

  const auto finish = [&](int64_t b, T* sum) {
    const Vec<T> share(T(1) / T(N - k));
    over_padded<T>(Dp, [&](int64_t i) { store(sum + i, load<T>(sum + i) * share); });  // s = sum / (N - k)
    if (out.s) write_row(out.s, 0, b, sum, D);
    over_padded<T>(Dp, [&](int64_t i) { store(sum + i, fma(load<T>(w + i), load<T>(sum + i), load<T>(addend + i))); });
    write_row(out.out, 0, b, sum, D);  // out = w * s + addend
  };

  const Stream<T> stream(in, out.h);
  const auto add = choose_add_normalised<T>(stream.dtype);
  T* const mean = static_cast<T*>(out.stats.data);
  T* const rstd = mean ? mean + B * N : nullptr;
  const bool streaming = Streaming(in.shape).reads(in.x).reads(in.branch).writes(out.h).pays(kPoolStreamBytes);
  run_parallel(parallel_for, B * pieces, piece * Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local(kTogether + 2, Dp);
    T *buffer = local.take(kTogether), *block_sum = local.take(), *sample_sum = local.take();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / pieces, n0 = unit % pieces * piece, n1 = min(N, n0 + piece);
      T s[kTogether];
      for (T& s_r : s) s_r = scale_of<T>(in.scale, b);
      T* sum = partials ? partials + unit * Dp : sample_sum;
      zero_rows(sum, 1, Dp);
      for (int64_t n = n0; n < n1; n += kPoolRows) {
        zero_rows(block_sum, 1, Dp);
        const auto step = [&](Group at, auto together) MPVG_LAMBDA {
          constexpr int R = together.rows;
          RowMoments<T, R> m;
          const Rows h = stream.get(at, together, streaming, s, T(in.eps), buffer, m);
          if (at.n >= k) add.with(together)(block_sum, h, m, D);
          if (mean) save_moments(m, at, N, mean, rstd);
        };
        visit<T>(b, b + 1, n, min(n1, n + kPoolRows), k, D, step, [] {});
        add_row(sum, block_sum, Dp);
      }
      if (!partials) finish(b, sum);
    }
    end_stream();
  });
  for (int64_t b = 0; partials && b < B; ++b) {
    T* sum = partials + b * pieces * Dp;
    for (int64_t i = 1; i < pieces; ++i) add_row(sum, sum + i * Dp, Dp);
    finish(b, sum);
  }
}

// dv = rstd * (g - mean(g) - vhat * mean(g * vhat)) of R rows of a sample, which share g and sum(g);  df = s * dv, unless DF is None.
template <class T, class V, class DF, int R, bool SideBySide>
void pool_gradients(Rows dv_rows, Rows df_rows, bool streaming, const T* g, T sum_g, Rows v_rows, RowMoments<T, R> m, T scale, int64_t D) {
  constexpr bool has_df = !__is_same(DF, None);
  using DF_ = typename Promote<DF, None>::type;
  by_centre(m, [&](auto centring) MPVG_LAMBDA {
    constexpr bool Centre = centring.value;
    const auto dv = each<R, V>(dv_rows);
    const auto df = each<R, DF_>(df_rows);
    const auto v = each<R, const V>(v_rows);
    const auto m1 = m.m1, rstd = m.rstd;
    const T inv_D = T(1) / T(D);
    Sum<T> s_c[R], s_gc[R];
    over<T, R, false>(D, [&](int64_t i, auto size, int r) MPVG_LAMBDA {
      const Vec<T> c = centre<Centre>(load<T>(v[r] + i, size, at(m1, r)), at(m1, r));  // ends are padded so that c is 0
      if constexpr (Centre) s_c[r].add(c);      // sum(c)
      s_gc[r].add_product(load<T>(g + i), c);  // sum(g * c)
    });
    if constexpr (Centre) m.m2 = m1 == T(0) ? m.m2 : totals<T, R>(s_c) * inv_D;
    const GradRow<pack<T, R>> grad = grad_row<pack<T, R>>(m, grad_means<pack<T, R>>(m, pack<T, R>{} + sum_g, totals<T, R>(s_gc), inv_D));
    const auto q = grad.q, k = grad.k;
    over<T, R, SideBySide>(D, [&](int64_t i, auto size, int r) MPVG_LAMBDA {
      const Vec<T> c = centre<Centre>(load<T>(v[r] + i, size), at(m1, r));
      const Vec<T> d = Vec<T>(at(rstd, r)) * fma(c, Vec<T>(at(k, r)), load<T>(g + i) - Vec<T>(at(q, r)));
      put(dv[r] + i, d, size, streaming);
      if constexpr (has_df) put(df[r] + i, Vec<T>(scale) * d, size, streaming);
    });
  });
}
// Rows are written side by side where a group of them is more than a page. (Tried: row after row there, and side by side for short
// rows, are 1.05 to 1.15 times slower.)
template <class T>
auto choose_pool_gradients(Dtype v, Dtype df, int64_t D) {
  return with_dtype<T>(v, [&](auto v) {
    return with_optional_dtype<T>(df, [&](auto f) {
      using V = typename decltype(v)::type;
      using DF = typename BranchOf<T, V, typename decltype(f)::type>::type;
      const bool wide = kTogether * D * int64_t(sizeof(V)) > 4096;
      const auto group = wide ? &pool_gradients<T, V, DF, kTogether, true> : &pool_gradients<T, V, DF, kTogether, false>;
      return ByRows{&pool_gradients<T, V, DF, 1, false>, group, group};
    });
  });
}

// g[b] = dout[b] * w / (N - k);  dh[b, n] = LN backward of g[b], 0 in the prefix.
template <class T>
void pool_input_gradients(const Saved& in, View dout_BD, const T* w, const Gradients& grad, ParallelFor parallel_for) {
  const auto [B, N, D, k] = in.shape;
  const int64_t Dp = padded<T>(D), pieces = ceil_div(N, kPoolRows);
  const T* const mean = static_cast<const T*>(in.stats.data);
  const T* const rstd = mean + B * N;
  const auto gradients = choose_pool_gradients<T>(in.h.dtype, grad.branch.dtype, D);
  const bool dx_direct = grad.x.dtype == in.h.dtype;  // see pe_layer_norm_bwd
  const bool streaming = dx_direct && Streaming(in.shape).reads(in.h).writes(grad.x).writes(grad.branch).pays();
  run_parallel(parallel_for, B * pieces, kPoolRows * Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local(kTogether + 1, Dp);
    T *dx_buffer = local.take(kTogether), *g = local.take();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / pieces, n0 = unit % pieces * kPoolRows, n1 = min(N, n0 + kPoolRows);
      const T s = scale_of<T>(in.scale, b);
      zero_rows(g, 1, Dp);
      read_row(g, dout_BD, b, D);
      Sum<T> sum_g;
      over_padded<T>(Dp, [&](int64_t i) {
        const Vec<T> g_i = load<T>(g + i) * Vec<T>(T(1) / T(N - k)) * load<T>(w + i);
        sum_g.add(g_i);
        store(g + i, g_i);
      });
      for (int64_t n = n0; n < min(n1, k); ++n) {
        if (grad.x) __builtin_memset(grad.x.at(b, n), 0, D * bytes(grad.x.dtype));
        if (grad.branch) __builtin_memset(grad.branch.at(b, n), 0, D * bytes(grad.branch.dtype));
      }
      const auto step = [&](Group at, auto together) MPVG_LAMBDA {
        constexpr int R = together.rows;
        const Rows dx = dx_direct ? at.of(grad.x) : Rows{dx_buffer, Dp * int64_t(sizeof(T))};
        gradients.with(together)(dx, at.of(grad.branch), streaming, g, sum_g.total(), at.of(in.h), saved_moments<T, R>(at, N, mean, rstd), s, D);
        if (!grad.x || dx_direct) return;
        for (int r = 0; r < R; ++r) write_row(grad.x, at.sample(r), at.token(r), dx_buffer + r * Dp, D);
      };
      visit<T>(b, b + 1, max(n0, k), n1, 0, D, step, [] {});
    }
    end_stream();
  });
}

// dw = sum_b dout * S;  db = sum_b dout;  dp'[n] = db / (N - k), the same for all n, and on through LN'.
template <class T>
void pe_norm_pool_bwd(const Saved& in, View dout_BD, View s_BD, const Gradients& grad, ParallelFor parallel_for) {
  const auto [B, N, D, k] = in.shape;
  const int64_t Dp = padded<T>(D), blocks = ceil_div(N - k, kPosRows);
  Scratch<T> scratch(6 + blocks, Dp);
  const T* w = parameter(scratch, in.weight, D);
  if (grad.x || grad.branch) pool_input_gradients(in, dout_BD, w, grad, parallel_for);
  if (!grad.weight && !grad.bias && !grad.pos && !grad.pos_weight && !grad.pos_bias) return;

  T *db = scratch.take(), *dw = scratch.take(), *dout = scratch.take(), *s = scratch.take();
  Scratch<double> sums(2, Dp);  // in double: the number of terms has no bound
  double *sum_db = sums.take(), *sum_dw = sums.take();
  zero_rows(sum_db, 2, Dp);
  for (int64_t b = 0; b < B; ++b) {
    read_row(dout, dout_BD, b, D);
    read_row(s, s_BD, b, D);
    for (int64_t i = 0; i < D; ++i) {
      sum_db[i] += double(dout[i]);                 // db = sum_b dout
      sum_dw[i] += double(dout[i]) * double(s[i]);  // dw = sum_b dout * S
    }
  }
  for (int64_t i = 0; i < Dp; ++i) db[i] = T(sum_db[i]), dw[i] = T(sum_dw[i]);
  if (grad.weight) write_row(grad.weight, 0, 0, dw, D);
  if (grad.bias) write_row(grad.bias, 0, 0, db, D);
  if (grad.pos_bias) write_row(grad.pos_bias, 0, 0, db, D);
  if (!grad.pos && !grad.pos_weight) return;

  T* dp = db;
  for (int64_t i = 0; i < Dp; ++i) dp[i] = T(sum_db[i] / double(N - k));
  const T* wp = parameter(scratch, in.pos_weight, D);
  T* dwp_blocks = scratch.take(blocks);
  run_parallel(parallel_for, blocks, kPosRows * Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local(1, Dp);
    T* unused = local.take();
    for (int64_t block = begin; block < end; ++block) {
      T* dwp = dwp_blocks + block * Dp;
      zero_rows(dwp, 1, Dp);
      zero_rows(unused, 1, Dp);
      pos_backward(in, grad.pos, wp, block * kPosRows, min(N - k, (block + 1) * kPosRows), dp, 0, dwp, unused);
    }
  });
  column_sums(grad.pos_weight, dwp_blocks, blocks, Dp, D);
}

}  // namespace mpvg::MPVG_ISA
