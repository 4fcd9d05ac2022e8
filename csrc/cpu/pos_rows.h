// The PE side of both operators: p' = LN(p; wp, bp) on the N - k rows of p, and its backward. p is shared by the batch, so this is 1/B of
// an operator's work; it runs in parallel all the same, for small batches.
#pragma once

namespace mpvg::MPVG_ISA {

// Rows of p that make one unit of parallel work.
constexpr int64_t kPosRows = 16;

// p as a stream without a branch: one sample of tokens.
template <class T>
Stream<T> pos_stream(const View& pos, int64_t D) {
  Inputs p{};
  p.shape.D = D, p.x = pos;
  return Stream<T>(p, View{});
}

// step(group, together) over tokens [n0, n1) of p.
template <class T, class Step>
MPVG_INLINE void visit_tokens(int64_t n0, int64_t n1, int64_t D, Step step) {
  visit<T>(0, 1, n0, n1, 0, D, step, [] {});
}

// table[n] = p'[n] + b, the addend of y;  pos_out[n] = p'[n] rounded. Without a wp, p is p' already.
template <class T>
void pos_forward(const Inputs& in, const View& pos_out, const T* b, T* table, Scratch<T>& scratch, ParallelFor parallel_for) {
  const int64_t D = in.shape.D, Dp = padded<T>(D), P = in.shape.N - in.shape.prefix;
  if (!in.pos_weight)
    return run_parallel(parallel_for, P, Dp, [&](int64_t n0, int64_t n1) {
      for (int64_t n = n0; n < n1; ++n) read_row(table + n * Dp, in.pos, n, D), add_row(table + n * Dp, b, Dp);
    });
  const T* wp = parameter(scratch, in.pos_weight, D);
  const T* bp = parameter(scratch, in.pos_bias, D);
  T* both = scratch.take();
  over_padded<T>(Dp, [&](int64_t i) { store(both + i, load<T>(b + i) + load<T>(bp + i)); });
  const Stream<T> stream = pos_stream<T>(in.pos, D);
  const auto to_table = choose_affine<T>(arithmetic_dtype<T>, in.pos.dtype), to_out = choose_affine<T>(pos_out.dtype, in.pos.dtype);
  run_parallel(parallel_for, ceil_div(P, kPosRows), kPosRows * Dp, [&](int64_t begin, int64_t end) {
    visit_tokens<T>(begin * kPosRows, min(P, end * kPosRows), D, [&](Group at, auto together) {
      constexpr int R = together.rows;
      RowMoments<T, R> m;
      const T one[R] = {};
      const Rows p = stream.get(at, together, false, one, T(in.pos_eps), nullptr, m);  // no branch, no buffer
      to_table.with(together)(at.of(table, 0, Dp), false, p, m, wp, both, D);
      to_out.with(together)(at.of(pos_out), false, p, m, wp, bp, D);
    });
  });
}

// Backward of p' = LN(p; wp, bp), or of p' = p, on tokens [n0, n1): dpos (may be absent) and these rows' terms of dwp and dbp, from dp',
// `dp_step` bytes a token.
template <class T>
void pos_backward(const Saved& in, const View& dpos, const T* wp, int64_t n0, int64_t n1, const T* dp_out, int64_t dp_step, T* dwp, T* dbp) {
  const int64_t D = in.shape.D;
  const auto dp_row = [&](int64_t n) { return reinterpret_cast<const T*>(reinterpret_cast<const char*>(dp_out) + (n - n0) * dp_step); };
  if (!in.pos_weight) {
    for (int64_t n = n0; n < n1; ++n) write_row(dpos, 0, n, dp_row(n), D);
    return;
  }
  const Stream<T> stream = pos_stream<T>(in.pos, D);
  const auto find = choose_grad_means<T>(arithmetic_dtype<T>, in.pos.dtype);
  const auto accumulate = choose_accumulate<T>(arithmetic_dtype<T>, in.pos.dtype);
  const InputGradients<T, true> write_dpos(arithmetic_dtype<T>, in.pos.dtype, Dtype::absent, false);
  visit_tokens<T>(n0, n1, D, [&](Group at, auto together) {
    constexpr int R = together.rows;
    RowMoments<T, R> m;
    GradRow<pack<T, R>> k;
    const T one[R] = {};
    const Rows p = stream.get(at, together, false, one, T(in.pos_eps), nullptr, m);  // no branch, no buffer
    const Rows dp{const_cast<T*>(dp_row(at.n)), dp_step};
    if (!dpos) {
      for (int r = 0; r < R; ++r) accumulate(dp[r], p[r], m.of(r), dwp, dbp, D);
      return;
    }
    find.with(together)(dp, p, {}, wp, m, k, D, T(1) / T(D));
    write_dpos(together, at.of(dpos), {}, false, {}, dp, wp, p, m, k, one, dwp, {dbp}, D);
  });
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
