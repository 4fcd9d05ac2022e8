// Kernels of pe_norm_pool:  out[b] = w * s[b] + b + wp * s' + bp,  s[b] = mean_n hhat[b, n],  s' = mean_n phat[n]  (rows after the prefix).
// Without wp, pos is normalised already: out[b] = w * s[b] + b + mean_n pos[n].
//
// Forward. A block owns a chunk of a sample's tokens and adds up their normalised rows in registers; pos is one more sample. output_kernel
// adds up the chunks and applies the formula: two launches, because a sum over blocks without atomics needs an end of all of them.
//
// Backward. g[b] = dout[b] * w / K is the same for all K tokens of a sample, so dh needs one read of h and one write, and no sum over B * N
// is left: dw = sum_b dout * s, db = sum_b dout, dp'[n] = db / K for every n. These are three sums after one another (over the batch, over
// a row of dp' * wp, over the tokens for dpos_weight), hence sums_kernel and finish_kernel (sums.cuh), where they are asked for.
#pragma once

#include "sums.cuh"

namespace mpvg::cuda {

struct PoolForward {
  int B, N, D, prefix;
  Share share;  // tiles: chunks of a sample; samples: steps of a block's rows in a chunk
  float eps, pos_eps;
  Operand x, branch, scale, pos, h;
  bool norm_pos;  // else pos is p' itself
  float* stats;
  float* partial;      // (B, chunks, D)
  float* pos_partial;  // (chunks, D)
};

template <class T, int P>
MPVG_ROW_KERNEL(T, P) pe_norm_pool_fwd_kernel(const __grid_constant__ PoolForward a) {
  using L = Layout<P, T::E, T::whole>;
  float* const exchange = reinterpret_cast<float*>(shared_memory());
  char* const ring = reinterpret_cast<char*>(exchange + kExchange);
  char* memory = ring;
  RowGroup at(a.share.lanes, a.D, exchange);
  const int rows = blockDim.x / at.lanes, K = a.N - a.prefix;
  const int b = blockIdx.x / a.share.tiles, chunk = blockIdx.x % a.share.tiles, n0 = chunk * a.share.samples * rows + at.row;
  float sum[P] = {};

  if (b == a.B) {  // pos, whose type is looked up
    for (int i = 0, n = n0; i < a.share.samples; ++i, n += rows) {
      float p[P];
      Moments<float> m = L::pos_row(at, a.pos, n, n < K, a.pos_eps, p);
      if (!a.norm_pos) m = kAsItIs;
      if (n < K) L::chunks(at, [&](int c, int) {
#pragma unroll
        for (int e = 0; e < L::E; ++e) sum[c * L::E + e] += normalised(p[c * L::E + e], m);
      });
    }
    return L::block_sum(at, sum, reinterpret_cast<float*>(ring), a.pos_partial + int64_t(chunk) * a.D, 1.0f / float(K));
  }

  const bool live = n0 < a.N;  // else this group has no row at all
  RowStream<typename T::X, L> x(at, a.x, memory, a.share.stage_bytes, a.share.stages, live);
  RowStream<typename T::F, L> f(at, a.branch, memory, a.share.stage_bytes, a.share.stages,
                                live);
  const char *x_row = a.x.row(b, n0), *f_row = a.branch.row(b, n0);  // to be fetched next
  const auto fetch = [&](int i, int stage) {
    if (i < a.share.samples && n0 + i * rows < a.N) {
      x.fetch(at, stage, x_row);
      if (a.branch) f.fetch(at, stage, f_row);
    }
    x_row += rows * a.x.stride_n;
    f_row += rows * a.branch.stride_n;
    __pipeline_commit();
  };
  for (int stage = 0; stage < a.share.stages; ++stage) fetch(stage, stage);
  const float s = a.scale ? read_one(a.scale, a.scale.data, b) : 1.0f;
  char* h_row = a.h.row(b, n0);
  for (int i = 0, n = n0, stage = 0; i < a.share.samples; ++i, n += rows, stage = stage + 1 == a.share.stages ? 0 : stage + 1) {
    wait_for_oldest(a.share.stages);
    float h[P] = {};
    L::chunks(at, [&](int c, int column) {
      float v[L::E];
      x.read(stage, c, v);
      if (a.branch) {
        float branch[L::E];
        f.read(stage, c, branch);
#pragma unroll
        for (int e = 0; e < L::E; ++e) v[e] = Storage<typename T::H, L::E>::rounded(a.h, fma(s, branch[e], v[e]));
        if (a.h.data && n < a.N) Storage<typename T::H, L::E>::write(a.h, h_row, column, a.D, v);
      }
#pragma unroll
      for (int e = 0; e < L::E; ++e) h[c * L::E + e] = v[e];
    });
    float total[1] = {L::lane_sum(at, h)};
    at.sum(total);
    fetch(i + a.share.stages, stage);  // the slots of this stage have been read: the sum needed all of them
    const Moments<float> m = L::statistics(at, h, total[0] * at.inv_D, a.eps);
    if (n < a.N && n >= a.prefix) L::chunks(at, [&](int c, int) {
#pragma unroll
      for (int e = 0; e < L::E; ++e) sum[c * L::E + e] += normalised(h[c * L::E + e], m);
    });
    if (a.stats && n < a.N && at.lane == 0) {
      const int64_t row = int64_t(b) * a.N + n;
      a.stats[row] = m.m1;
      a.stats[int64_t(a.B) * a.N + row] = m.rstd;
    }
    h_row += rows * a.h.stride_n;
  }
  __pipeline_wait_prior(0);
  L::block_sum(at, sum, reinterpret_cast<float*>(ring), a.partial + int64_t(blockIdx.x) * a.D, 1.0f / float(K));
}

struct PoolOutput {
  int B, D, chunks;
  const float *partial, *pos_partial;
  Operand weight, bias, pos_weight, pos_bias, out;
  float* s;
};

// Samples that a thread of output_kernel goes through, so that what pos adds is summed up for all of them at once.
constexpr int kOutputSamples = 4;

// A thread a column.
MPVG_FINISH_KERNEL pe_norm_pool_output_kernel(const __grid_constant__ PoolOutput a) {
  const int strips = (a.D + blockDim.x - 1) / blockDim.x;
  const int64_t d = int64_t(blockIdx.x % strips) * blockDim.x + threadIdx.x, first = int64_t(blockIdx.x / strips) * kOutputSamples;
  if (d >= a.D) return;
  const float w = read_one(a.weight, a.weight.data, d);
  float addend = a.bias ? read_one(a.bias, a.bias.data, d) : 0.0f;
  if (a.pos_partial) {
    const float wp = a.pos_weight ? read_one(a.pos_weight, a.pos_weight.data, d) : 1.0f;
    addend = fma(strided_sum(a.pos_partial + d, a.chunks, a.D), wp, addend);
    if (a.pos_bias) addend += read_one(a.pos_bias, a.pos_bias.data, d);
  }
  for (int64_t b = first; b < min(int64_t(a.B), first + kOutputSamples); ++b) {
    const float s = strided_sum(a.partial + b * a.chunks * a.D + d, a.chunks, a.D);
    if (a.s && a.s != a.partial) a.s[b * a.D + d] = s;
    write_one(a.out, a.out.row(0, b), d, fma(w, s, addend));
  }
}

struct PoolBackward {
  int B, N, D, prefix;
  Share share;  // as in the forward
  float pos_eps;
  Operand dout, h, scale, weight, dx, dbranch;
  const float* stats;
};

template <class T, int P>
MPVG_ROW_KERNEL(T, P) pe_norm_pool_bwd_kernel(const __grid_constant__ PoolBackward a) {
  using L = Layout<P, T::E, T::whole>;
  float* const exchange = reinterpret_cast<float*>(shared_memory());
  char* memory = reinterpret_cast<char*>(exchange + kExchange);
  RowGroup at(a.share.lanes, a.D, exchange);
  const int rows = blockDim.x / at.lanes;
  const int b = blockIdx.x / a.share.tiles, chunk = blockIdx.x % a.share.tiles, n0 = chunk * a.share.samples * rows + at.row;

  RowStream<typename T::H, L> h(at, a.h, memory, a.share.stage_bytes, a.share.stages, n0 < a.N);
  const char* h_row = a.h.row(b, n0);  // to be fetched next
  const auto fetch = [&](int i, int stage) {
    if (i < a.share.samples && n0 + i * rows < a.N) h.fetch(at, stage, h_row);
    h_row += rows * a.h.stride_n;
    __pipeline_commit();
  };
  for (int stage = 0; stage < a.share.stages; ++stage) fetch(stage, stage);

  float g[P] = {}, sum_g[1];
  const float share = 1.0f / float(a.N - a.prefix);
  L::chunks(at, [&](int c, int column) {
    float w[L::E];
    L::read(a.dout, a.dout.row(0, b), column, a.D, g + c * L::E);
    L::read(a.weight, a.weight.data, column, a.D, w);
#pragma unroll
    for (int e = 0; e < L::E; ++e) g[c * L::E + e] *= w[e] * share;
  });
  sum_g[0] = L::lane_sum(at, g);
  at.sum(sum_g);
  const float s = a.scale ? read_one(a.scale, a.scale.data, b) : 1.0f;
  const float* const stats = a.stats + int64_t(b) * a.N;
  const int64_t all_rows = int64_t(a.B) * a.N;
  char *dx_row = a.dx.row(b, n0), *df_row = a.dbranch.row(b, n0);

  for (int i = 0, n = n0, stage = 0; i < a.share.samples; ++i, n += rows, stage = stage + 1 == a.share.stages ? 0 : stage + 1) {
    Moments<float> m{};
    if (n < a.N) m.m1 = stats[n], m.rstd = stats[all_rows + n];
    wait_for_oldest(a.share.stages);
    float centred[P] = {}, sums[2] = {};  // of c and of g * c
    L::chunks(at, [&](int c, int column) {
      float v[L::E];
      h.read(stage, c, v);
      L::elements(at, column, [&](int e) {
        const float c_e = v[e] - m.m1;
        centred[c * L::E + e] = v[e];
        sums[0] += c_e;
        sums[1] = fma(g[c * L::E + e], c_e, sums[1]);
      });
    });
    at.sum(sums);
    fetch(i + a.share.stages, stage);
    m.m2 = sums[0] * at.inv_D;
    const GradMeans<float> means = grad_means(m, sum_g[0], sums[1], at.inv_D);
    if (n < a.N) L::chunks(at, [&](int c, int column) {
      float grad[L::E];
#pragma unroll
      for (int e = 0; e < L::E; ++e) {
        const float dh = input_gradient(g[c * L::E + e], normalised(centred[c * L::E + e], m), m, means);
        grad[e] = n < a.prefix ? 0.0f : dh;
      }
      if (a.dx) Storage<typename T::X, L::E>::write(a.dx, dx_row, column, a.D, grad);
      if (a.dbranch) {
#pragma unroll
        for (int e = 0; e < L::E; ++e) grad[e] *= s;
        Storage<typename T::F, L::E>::write(a.dbranch, df_row, column, a.D, grad);
      }
    });
    dx_row += rows * a.dx.stride_n;
    df_row += rows * a.dbranch.stride_n;
  }
}

struct PoolSums {
  int B, D, K;
  float pos_eps;
  Operand dout, s, pos, dweight, dbias, dpos_bias;
  float* dp;                // db / K; null: not wanted
  Moments<float>* moments;  // of the rows of pos; null: not wanted
};

// A block does a strip of dw, db and dp', or the moments of a row of pos.
static __global__ void __launch_bounds__(Rules::finish_threads, 1) pe_norm_pool_sums_kernel(const __grid_constant__ PoolSums a) {
  const int strips = (a.D + Rules::strip - 1) / Rules::strip;
  if (blockIdx.x < strips) {
    Strip at(blockIdx.x);
    float db = 0, dw = 0;
    if (at.column < a.D)
      for (int64_t b = at.row; b < a.B; b += Rules::strip_rows) {
        const float dout = read_one(a.dout, a.dout.row(0, b), at.column);
        db += dout;
        dw = fma(dout, read_one(a.s, a.s.row(0, b), at.column), dw);
      }
    db = at.sum(db), dw = at.sum(dw);
    if (at.column >= a.D) return;
    at.write(a.dbias, db), at.write(a.dpos_bias, db), at.write(a.dweight, dw);
    if (a.dp && at.row == 0) a.dp[at.column] = db / float(a.K);
    return;
  }
  RowGroup at = whole_block(a.D);
  const int64_t k = blockIdx.x - strips;
  const Moments<float> m = loop_moments(at, a.pos_eps, [&](int64_t d) { return read_one(a.pos, a.pos.row(0, k), d); });
  if (threadIdx.x == 0) a.moments[k] = m;
}

// The same for rows of any width and type, by a block a sample: each thread comes back to its own columns.

MPVG_FINISH_KERNEL pe_norm_pool_fwd_loop_kernel(const __grid_constant__ PoolForward a) {
  RowGroup at = whole_block(a.D);
  const int64_t b = blockIdx.x;
  const bool is_pos = b == a.B;
  const float s = a.scale && !is_pos ? read_one(a.scale, a.scale.data, b) : 1.0f, share = 1.0f / float(a.N - a.prefix);
  float* const sum = is_pos ? a.pos_partial : a.partial + b * a.D;
  over_columns(a.D, [&](int64_t d) { sum[d] = 0; });
  for (int64_t n = is_pos ? a.prefix : 0; n < a.N; ++n) {
    const auto h = [&](int64_t d) {
      if (is_pos) return read_one(a.pos, a.pos.row(0, n - a.prefix), d);
      const float v = read_one(a.x, a.x.row(b, n), d);
      return a.branch ? Storage<any, 4>::rounded(a.h, fma(s, read_one(a.branch, a.branch.row(b, n), d), v)) : v;
    };
    Moments<float> m = loop_moments(at, is_pos ? a.pos_eps : a.eps, h);
    if (is_pos && !a.norm_pos) m = kAsItIs;
    over_columns(a.D, [&](int64_t d) {
      if (a.h.data && !is_pos) write_one(a.h, a.h.row(b, n), d, h(d));
      if (n >= a.prefix) sum[d] += normalised(h(d), m) * share;
    });
    if (a.stats && !is_pos && threadIdx.x == 0) a.stats[b * a.N + n] = m.m1, a.stats[(a.B + b) * a.N + n] = m.rstd;
  }
}

MPVG_FINISH_KERNEL pe_norm_pool_bwd_loop_kernel(const __grid_constant__ PoolBackward a) {
  RowGroup at = whole_block(a.D);
  const int64_t b = blockIdx.x;
  const float s = a.scale ? read_one(a.scale, a.scale.data, b) : 1.0f, share = 1.0f / float(a.N - a.prefix);
  const auto g = [&](int64_t d) { return read_one(a.dout, a.dout.row(0, b), d) * read_one(a.weight, a.weight.data, d) * share; };
  for (int64_t n = 0; n < a.N; ++n) {
    Moments<float> m{a.stats[b * a.N + n], 0, a.stats[(a.B + b) * a.N + n]};
    const auto h = [&](int64_t d) { return read_one(a.h, a.h.row(b, n), d); };
    const GradMeans<float> means = loop_grad_means(at, m, h, g);
    over_columns(a.D, [&](int64_t d) {
      const float grad = n < a.prefix ? 0.0f : input_gradient(g(d), normalised(h(d), m), m, means);
      if (a.dx) write_one(a.dx, a.dx.row(b, n), d, grad);
      if (a.dbranch) write_one(a.dbranch, a.dbranch.row(b, n), d, grad * s);
    });
  }
}

}  // namespace mpvg::cuda
