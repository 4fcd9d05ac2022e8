// Kernels of pe_chain:  out[l] = LN(v_l; w_l, b_l),  v_0 = pos,  v_{l+1} = out[l] or, not hierarchical, pos.
//
// Forward. A row's layers come one after the other, rows are independent: a row group takes one row through all layers, in registers and
// unrounded. What a layer reads from memory does not depend on the layer before, and is asked for ahead of the row's sums.
//
// Backward. With r_l all that arrives at out[l] and g = r_l * w_l, from the last layer to the first:
//
//   r_l = dout[l] + dv_{l+1}     dv_l = rstd_l * (g - mean(g) - vhat_l * mean(g * vhat_l))     dpos = dv_0
//   dw_l = sum_k r_l * vhat_l    db_l = sum_k r_l
//
// The rows vhat_l are found in the forward's order and needed in the other one: L of them (32 of 8192 columns are 1 MB) fit in no shared
// memory, so they go to scratch memory and come back from cache. r_l goes there too, for sums_kernel, a second launch: sums over rows
// without atomics need an end of all of them. Not hierarchical, there is one vhat, r_l is dout[l], and dpos the gradient for
// g = sum_l r_l * w_l.
#pragma once

#include "sums.cuh"

namespace mpvg::cuda {

struct Chain {
  int L, K, D, lanes;
  float eps;
  bool hierarchical;
  Operand pos, weight, bias;
  Operand out, dout, dpos;
  Operand vhat, r;  // (L, K, D), vhat with a step of 0 between layers where it has one; absent: not wanted
  Operand dweight, dbias;
  float* rstd;  // (L, K)
  float* rows;  // (K, D), for the loops: what the others have in registers
};

// A block is a warp, or as many as a row takes: there are but K rows to spread over the device. 16 elements a lane leave registers for the
// four rows that a step of the backward has in hand, and reach Rules::widest columns.
constexpr int kChainElements = 16, kChainThreads = Rules::widest / kChainElements;
using ChainLayout = Layout<kChainElements, 4, false>;

#define MPVG_CHAIN_KERNEL __global__ void __launch_bounds__(kChainThreads, 1)

// A lane's part of row (l, k) of a tensor; zeros where there is none.
__device__ __forceinline__ void chain_row(const RowGroup& at, const Operand& o, int64_t l, int64_t k, bool there,
                                          float (&v)[kChainElements]) {
#pragma unroll
  for (int i = 0; i < kChainElements; ++i) v[i] = 0;
  if (o && there) ChainLayout::chunks(at, [&](int c, int column) { ChainLayout::read(o, o.row(l, k), column, at.D, v + 4 * c); });
}

template <bool hierarchical>
MPVG_CHAIN_KERNEL pe_chain_fwd_kernel(const __grid_constant__ Chain a) {
  using L = ChainLayout;
  RowGroup at(a.lanes, a.D, reinterpret_cast<float*>(shared_memory()));
  const int64_t k = int64_t(blockIdx.x) * (blockDim.x / at.lanes) + at.row;
  const bool live = k < a.K;
  float v[L::P], w[L::P], b[L::P];
  Moments<float> m = L::pos_row(at, a.pos, k, live, a.eps, v);
  for (int l = 0; l < a.L; ++l) {
    chain_row(at, a.weight, 0, l, true, w);
    chain_row(at, a.bias, 0, l, true, b);
    if (hierarchical && l) m = L::row_moments(at, v, a.eps);
    if (live) L::chunks(at, [&](int c, int column) {
      float y[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        y[e] = fma(normalised(v[4 * c + e], m), w[4 * c + e], b[4 * c + e]);
        if (hierarchical) v[4 * c + e] = y[e];
      }
      L::write(a.out, a.out.row(l, k), column, a.D, y);
    });
  }
}

template <bool hierarchical>
MPVG_CHAIN_KERNEL pe_chain_bwd_kernel(const __grid_constant__ Chain a) {
  using L = ChainLayout;
  RowGroup at(a.lanes, a.D, reinterpret_cast<float*>(shared_memory()));
  const int64_t k = int64_t(blockIdx.x) * (blockDim.x / at.lanes) + at.row;
  const bool live = k < a.K;
  float v[L::P], w[L::P], vhat[L::P];
  Moments<float> m = L::pos_row(at, a.pos, k, live, a.eps, v);
  for (int l = 0; l < (hierarchical ? a.L : 1); ++l) {
    float b[L::P];
    if (hierarchical) chain_row(at, a.weight, 0, l, true, w), chain_row(at, a.bias, 0, l, true, b);
    if (hierarchical && l) m = L::row_moments(at, v, a.eps);
    L::chunks(at, [&](int c, int column) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        vhat[4 * c + e] = normalised(v[4 * c + e], m);
        if (hierarchical) v[4 * c + e] = fma(vhat[4 * c + e], w[4 * c + e], b[4 * c + e]);
      }
      if (live && a.vhat) L::write(a.vhat, a.vhat.row(l, k), column, a.D, vhat + 4 * c);
    });
    if (hierarchical && live && at.lane == 0) a.rstd[l * int64_t(a.K) + k] = m.rstd;
  }
  if (hierarchical) __syncthreads();  // rstd is read by all lanes

  float r[L::P] = {}, dout[L::P];
  // r = dv for g, from the row vhat and its rstd
  const auto step_back = [&](const float (&g)[L::P], float rstd) {
    float sums[2] = {};
    L::chunks(at, [&](int c, int column) {
      L::elements(at, column, [&](int e) {
        sums[0] += g[4 * c + e];
        sums[1] = fma(g[4 * c + e], vhat[4 * c + e], sums[1]);
      });
    });
    at.sum(sums);
    const Moments<float> of_row{0, 0, rstd};
    const GradMeans<float> means{sums[0] * at.inv_D, sums[1] * at.inv_D};
#pragma unroll
    for (int i = 0; i < L::P; ++i) r[i] = input_gradient(g[i], vhat[i], of_row, means);
  };
  for (int l = a.L - 1; l >= 0; --l) {
    chain_row(at, a.dout, l, k, live, dout);
    chain_row(at, a.weight, 0, l, true, w);
    if (!hierarchical) {
#pragma unroll
      for (int i = 0; i < L::P; ++i) r[i] = fma(dout[i], w[i], r[i]);
      continue;
    }
    chain_row(at, a.vhat, l, k, live, vhat);
    const float rstd = live ? a.rstd[l * int64_t(a.K) + k] : 0.0f;
#pragma unroll
    for (int i = 0; i < L::P; ++i) r[i] += dout[i], w[i] *= r[i];
    if (live && a.r) L::chunks(at, [&](int c, int column) { L::write(a.r, a.r.row(l, k), column, a.D, r + 4 * c); });
    step_back(w, rstd);
  }
  if (!hierarchical) step_back(r, m.rstd);
  if (live && a.dpos) L::chunks(at, [&](int c, int column) { L::write(a.dpos, a.dpos.row(0, k), column, a.D, r + 4 * c); });
}

// dw_l = sum_k r_l * vhat_l and db_l = sum_k r_l: a block a strip of a layer's columns.
MPVG_FINISH_KERNEL pe_chain_sums_kernel(const __grid_constant__ Chain a) {
  const int strips = (a.D + Rules::strip - 1) / Rules::strip, l = blockIdx.x / strips;
  Strip at(blockIdx.x % strips);
  float db = 0, dw = 0;
  if (at.column < a.D)
    for (int64_t k = at.row; k < a.K; k += Rules::strip_rows) {
      const float r = read_one(a.r, a.r.row(l, k), at.column);
      db += r;
      if (a.dweight) dw = fma(r, read_one(a.vhat, a.vhat.row(l, k), at.column), dw);
    }
  db = at.sum(db), dw = at.sum(dw);
  if (at.column >= a.D || at.row) return;
  if (a.dbias) write_one(a.dbias, a.dbias.row(0, l), at.column, db);
  if (a.dweight) write_one(a.dweight, a.dweight.row(0, l), at.column, dw);
}

// The same for rows of any width, by a block a row: each thread comes back to its own columns.

MPVG_FINISH_KERNEL pe_chain_fwd_loop_kernel(const __grid_constant__ Chain a) {
  RowGroup at = whole_block(a.D);
  const int64_t k = blockIdx.x;
  float* const v = a.rows + k * a.D;
  over_columns(a.D, [&](int64_t d) { v[d] = read_one(a.pos, a.pos.row(0, k), d); });
  Moments<float> m;
  for (int l = 0; l < a.L; ++l) {
    if (a.hierarchical || l == 0) m = loop_moments(at, a.eps, [&](int64_t d) { return v[d]; });
    over_columns(a.D, [&](int64_t d) {
      const float b = a.bias ? read_one(a.bias, a.bias.row(0, l), d) : 0.0f;
      const float y = fma(normalised(v[d], m), read_one(a.weight, a.weight.row(0, l), d), b);
      write_one(a.out, a.out.row(l, k), d, y);
      if (a.hierarchical) v[d] = y;
    });
  }
}

MPVG_FINISH_KERNEL pe_chain_bwd_loop_kernel(const __grid_constant__ Chain a) {
  RowGroup at = whole_block(a.D);
  const int64_t k = blockIdx.x;
  float* const v = a.rows + k * a.D;
  over_columns(a.D, [&](int64_t d) { v[d] = read_one(a.pos, a.pos.row(0, k), d); });
  for (int l = 0; l < (a.hierarchical ? a.L : 1); ++l) {
    const Moments<float> m = loop_moments(at, a.eps, [&](int64_t d) { return v[d]; });
    over_columns(a.D, [&](int64_t d) {
      const float b = a.bias ? read_one(a.bias, a.bias.row(0, l), d) : 0.0f, vhat = normalised(v[d], m);
      write_one(a.vhat, a.vhat.row(l, k), d, vhat);
      v[d] = fma(vhat, read_one(a.weight, a.weight.row(0, l), d), b);
    });
    if (threadIdx.x == 0) a.rstd[l * int64_t(a.K) + k] = m.rstd;
  }
  __syncthreads();  // rstd is read by all threads

  float* const r = v;
  over_columns(a.D, [&](int64_t d) { r[d] = 0; });
  for (int l = a.L - 1; l >= 0; --l) {
    const auto w = [&](int64_t d) { return read_one(a.weight, a.weight.row(0, l), d); };
    over_columns(a.D, [&](int64_t d) {
      const float dout = read_one(a.dout, a.dout.row(l, k), d);
      r[d] += a.hierarchical ? dout : dout * w(d);
      if (a.hierarchical && a.r) write_one(a.r, a.r.row(l, k), d, r[d]);
    });
    if (l && !a.hierarchical) continue;
    const auto vhat = [&](int64_t d) { return read_one(a.vhat, a.vhat.row(l, k), d); };
    const auto g = [&](int64_t d) { return a.hierarchical ? r[d] * w(d) : r[d]; };
    Moments<float> m{0, 0, 1};  // vhat's own
    const GradMeans<float> means = loop_grad_means(at, m, vhat, g);
    m.rstd = a.rstd[l * int64_t(a.K) + k];
    over_columns(a.D, [&](int64_t d) { r[d] = input_gradient(g(d), vhat(d), m, means); });
  }
  if (a.dpos) over_columns(a.D, [&](int64_t d) { write_one(a.dpos, a.dpos.row(0, k), d, r[d]); });
}

}  // namespace mpvg::cuda
