// Kernels of pe_chain:  out[l] = LN(v_l; w_l, b_l),  v_0 = p, and v_{l+1} = out[l] unrounded, or p for every layer without the hierarchy.
//
// A few rows at a time go through all layers and stay in L1 on the way. The backward takes them through again and keeps every v_l, L * D
// numbers a row, then goes back from the last layer to the first. Work is split over blocks of rows, which depend on shapes alone.
#pragma once

namespace mpvg::MPVG_ISA {

// The L rows of weights or biases as T, padded.
template <class T>
const T* layer_parameters(Scratch<T>& scratch, const View& v, const PEChainInputs& in) {
  const T* first = nullptr;
  for (int64_t l = 0; l < in.L; ++l) {
    const T* row = parameter(scratch, v ? View{v.at(0, l), v.dtype} : v, in.D);
    if (!l) first = row;
  }
  return first;
}

// The group's rows of v as T: where they lie, or copied to `buffer`.
template <class T, int R>
Rows wide_rows(const View& v, Group at, T* buffer, int64_t D) {
  if (v.dtype == arithmetic_dtype<T>) return at.of(v);
  const int64_t Dp = padded<T>(D);
  const View sample{v.at(at.b, 0), v.dtype, 0, v.stride_n};
  for (int r = 0; r < R; ++r) read_row(buffer + r * Dp, sample, at.n + r, D);
  return {buffer, Dp * int64_t(sizeof(T))};
}

template <class T>
void pe_chain_fwd(const PEChainInputs& in, View out, ParallelFor parallel_for) {
  constexpr Dtype wide = arithmetic_dtype<T>;
  const int64_t L = in.L, D = in.D, Dp = padded<T>(D);
  Scratch<T> scratch(2 * L, Dp);
  const T *w = layer_parameters(scratch, in.weight, in), *b = layer_parameters(scratch, in.bias, in);
  const auto pos_to_out = choose_affine<T>(out.dtype, in.pos.dtype), to_out = choose_affine<T>(out.dtype, wide);
  const auto pos_to_next = choose_affine<T>(wide, in.pos.dtype), to_next = choose_affine<T>(wide, wide);
  const bool next_is_out = out.dtype == wide;  // the result is the unrounded row, so the next layer reads it there
  run_parallel(parallel_for, ceil_div(in.K, kPosRows), kPosRows * L * Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local(kTogether, Dp);
    T* buffer = local.take(kTogether);
    const Rows buffered{buffer, Dp * int64_t(sizeof(T))};
    const Stream<T> pos = pos_stream<T>(in.pos, D);
    const Stream<T> next = pos_stream<T>(next_is_out ? out : View{buffer, wide, 0, Dp}, D);
    visit_tokens<T>(begin * kPosRows, min(in.K, end * kPosRows), D, [&](Group at, auto together) {
      constexpr int R = together.rows;
      RowMoments<T, R> m;
      const T one[R] = {};
      Rows v = pos.get(at, together, false, one, T(in.eps), nullptr, m);
      for (int64_t l = 0; l < L; ++l) {
        const Group layer{l, at.n, false};
        const bool from_pos = !in.hierarchical || l == 0;
        (from_pos ? pos_to_out : to_out).with(together)(layer.of(out), false, v, m, w + l * Dp, b + l * Dp, D);
        if (!in.hierarchical || l + 1 == L) continue;
        if (!next_is_out) (from_pos ? pos_to_next : to_next).with(together)(buffered, false, v, m, w + l * Dp, b + l * Dp, D);
        v = next.get(next_is_out ? layer : Group{0, 0, false}, together, false, one, T(in.eps), nullptr, m);
      }
    });
  });
}

// With r_l = dout[l] + dv_{l+1}, or dout[l] without the hierarchy:  dv_l = LN backward of r_l;  dw_l = sum_k r_l * vhat_l;  db_l = sum_k r_l.
template <class T>
void pe_chain_bwd(const PEChainInputs& in, View dout, const PEChainGradients& grad, ParallelFor parallel_for) {
  constexpr Dtype wide = arithmetic_dtype<T>;
  const int64_t L = in.L, D = in.D, Dp = padded<T>(D), blocks = ceil_div(in.K, kPosRows), row_bytes = Dp * sizeof(T);
  const int64_t depth = in.hierarchical ? L : 1;  // how many v_l there are
  Scratch<T> scratch(2 * L * (1 + blocks), Dp);
  const T *w = layer_parameters(scratch, in.weight, in), *b = layer_parameters(scratch, in.bias, in);
  T* const sums = scratch.take(2 * L * blocks);  // of each block: dw of all layers, then db
  const auto affine = choose_affine<T>(wide, wide);
  const auto find = choose_grad_means<T>(wide, wide);
  const auto accumulate = choose_accumulate<T>(wide, wide);
  const InputGradients<T, true> write_alone(wide, wide, Dtype::absent, false), write_added(wide, wide, Dtype::absent, true);
  run_parallel(parallel_for, blocks, kPosRows * L * Dp, [&](int64_t begin, int64_t end) {
    Scratch<T> local((depth + 3) * kTogether, Dp), statistics(2 * depth, kTogether);
    T *const chain = local.take(depth * kTogether), *const dy_buffer = local.take(kTogether), *const dh_buffer = local.take(kTogether);
    T *const dv_buffer = local.take(kTogether), *const mean = statistics.take(depth), *const rstd = statistics.take(depth);
    const View chain_view{chain, wide, kTogether * Dp, Dp};
    const Stream<T> pos = pos_stream<T>(in.pos, D), next = pos_stream<T>(chain_view, D);
    for (int64_t block = begin; block < end; ++block) {
      T *const dw = sums + 2 * L * block * Dp, *const db = dw + L * Dp;
      zero_rows(dw, 2 * L, Dp);
      visit_tokens<T>(block * kPosRows, min(in.K, (block + 1) * kPosRows), D, [&](Group at, auto together) {
        constexpr int R = together.rows;
        constexpr Together<R, (R > 1)> side_by_side;  // as rows that share w, dw and db go, all from L1
        constexpr Group first{0, 0, false};
        RowMoments<T, R> m;
        const T one[R] = {};
        pos.get(at, together, false, one, T(in.eps), nullptr, m);
        const Rows p = wide_rows<T, R>(in.pos, at, chain, D);
        save_moments(m, first, 0, mean, rstd);
        for (int64_t l = 1; l < depth; ++l) {
          const Group row{l, 0, false};
          const Rows before = l == 1 ? p : Group{l - 1, 0, false}.of(chain_view);
          affine.with(together)(row.of(chain_view), false, before, m, w + (l - 1) * Dp, b + (l - 1) * Dp, D);
          next.get(row, together, false, one, T(in.eps), nullptr, m);
          save_moments(m, first, 0, mean + l * kTogether, rstd + l * kTogether);
        }

        const Rows dv{dv_buffer, row_bytes};
        for (int64_t l = L; l-- > 0;) {
          const int64_t at_l = in.hierarchical ? l : 0;
          const Rows v = at_l ? Group{at_l, 0, false}.of(chain_view) : p;
          RowMoments<T, R> m = saved_moments<T, R>(first, 0, mean + at_l * kTogether, rstd + at_l * kTogether);
          GradRow<pack<T, R>> k;
          const Rows dy = in.hierarchical && l + 1 < L ? dv : wide_rows<T, R>(dout, {l, at.n, false}, dy_buffer, D);
          find.with(side_by_side)(dy, v, {}, w + l * Dp, m, k, D, T(1) / T(D));
          if (!grad.pos && at_l == 0) {
            for (int r = 0; r < R; ++r) accumulate(dy[r], v[r], m.of(r), dw + l * Dp, db + l * Dp, D);
            continue;
          }
          // What is added to dv_l: the next dout down the chain, or the other layers' dv.
          Rows dh;
          if (in.hierarchical && l) dh = wide_rows<T, R>(dout, {l - 1, at.n, false}, dh_buffer, D);
          if (!in.hierarchical && l + 1 < L) dh = dv;
          const bool to_dpos = l == 0 && grad.pos.dtype == wide;
          (dh ? write_added : write_alone)(side_by_side, to_dpos ? at.of(grad.pos) : dv, {}, false, dh, dy, w + l * Dp, v, m, k, one,
                                           dw + l * Dp, {db + l * Dp}, D);
          if (l || to_dpos) continue;
          for (int r = 0; r < R; ++r) write_row(grad.pos, 0, at.n + r, dv_buffer + r * Dp, D);
        }
      });
    }
  });
  for (int64_t l = 0; l < L; ++l) {
    const auto row = [&](const View& v) { return v ? View{v.at(0, l), v.dtype} : v; };
    column_sums(row(grad.weight), sums + l * Dp, blocks, 2 * L * Dp, D);
    column_sums(row(grad.bias), sums + (L + l) * Dp, blocks, 2 * L * Dp, D);
  }
}

}  // namespace mpvg::MPVG_ISA
