// The PE side of both operators: p' = LN(p; wp, bp) on the N - k rows of p, and its backward. p is shared by the batch, so this is 1/B of
// an operator's work; it runs in parallel all the same, for small batches.
#pragma once

namespace mpvg::MPVG_ISA {

// Rows of p that make one unit of parallel work.
constexpr int64_t kPosRows = 16;

// Row n of p, in place or in `buffer`, and its moments.
template <class T>
MPVG_INLINE const T* pos_row(const View& pos, int64_t n, int64_t D, T eps, T* buffer, Moments<T>* m) {
  const T* p = static_cast<const T*>(pos.at(0, n));
  if (!in_place<T>(pos, D)) {
    read_row(buffer, pos, n, D);
    p = buffer;
  }
  Sum<T> sum;
  over_padded<T>(padded<T>(D), [&](int64_t i) { sum.add(load<T>(p + i)); });
  const T total = sum.total();
  find_moments(1, &p, p == buffer ? buffer : nullptr, &total, D, eps, m);
  return p;
}

// table[n] = p'[n] + b, the addend of y;  pos_out[n] = p'[n] rounded
template <class T>
void pos_forward(const Inputs& in, const View& pos_out, const T* b, T* table, Scratch<T>& scratch, ParallelFor parallel_for) {
  const int64_t D = in.shape.D, Dp = padded<T>(D), P = in.shape.N - in.shape.prefix;
  const T* wp = parameter(scratch, in.pos_weight, D);
  const T* bp = parameter(scratch, in.pos_bias, D);
  run_parallel(parallel_for, P, Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local(1, Dp);
    T* buffer = local.take();
    for (int64_t n = begin; n < end; ++n) {
      Moments<T> m;
      const T* p = pos_row(in.pos, n, D, T(in.pos_eps), buffer, &m);
      T* t = table + n * Dp;
      void* t_row = t;
      affine_rows<T, T>(1, &t_row, false, &p, &m, wp, &bp, Dp);
      write_row(pos_out, n, t, D);
      add_row(t, b, Dp);
    }
  });
}

// Backward of p' = LN(p; wp, bp):  row n of dp, and the row's terms of dwp and dbp (null: not wanted), from row n of dp'.
template <class T>
MPVG_INLINE void pos_backward(const Saved& in, const View& dpos, const T* wp, int64_t n, const T* dp_out, T* buffer, T* dwp, T* dbp) {
  const int64_t D = in.shape.D;
  Moments<T> m;
  const T* p = pos_row(in.pos, n, D, T(in.pos_eps), buffer, &m);
  accumulate(1, &dp_out, &p, &m, dwp, dbp, padded<T>(D));
  if (!dpos) return;
  GradMeans<T> k;
  const T one(1);
  void *dp_row = const_cast<T*>(dp_out), *p_row = const_cast<T*>(p), *dpos_row = dpos.at(0, n), *no_row = nullptr;
  find_grad_means<T, T, T>(1, nullptr, &dp_row, nullptr, &p_row, wp, &m, &k, D);
  choose_input_gradients<T>(dpos.dtype, Dtype::absent)(1, &dpos_row, false, &no_row, &dp_out, wp, &p, &m, &k, &one, nullptr, nullptr, D);
}

// out = the sum of `count` rows, `stride` apart. In double: the number of terms has no bound.
template <class T>
void column_sums(const View& out, const T* rows, int64_t count, int64_t stride, int64_t D) {
  if (!out) return;
  constexpr int64_t lanes = Vec<T>::lanes;
  over_row<T>(D, [&](int64_t i, auto size) {
    double sum[lanes] = {};
    for (int64_t u = 0; u < count; ++u)
      for (int64_t j = 0; j < lanes; ++j) sum[j] += double(rows[u * stride + i + j]);
    T rounded[lanes];
    for (int64_t j = 0; j < lanes; ++j) rounded[j] = T(sum[j]);
    with_dtype<T>(out.dtype, [&](auto e) {
      store(static_cast<typename decltype(e)::type*>(out.data) + i, load<T>(rounded), size);
    });
  });
}

}  // namespace mpvg::MPVG_ISA
