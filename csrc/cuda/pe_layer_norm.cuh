// Kernels of pe_layer_norm:  h = x + s[b] * f;  y = LN(h; w, b) + p';  p' = LN(pos; wp, bp), or pos itself without wp.
//
// Forward. A block owns a tile of token positions and a slice of the batch; each of its row groups owns one position. The group keeps p' +
// b of that position in registers while the slice's samples go by: x (and f) in, y (and h) out, and nothing else is moved.
//
// Backward. With g = dy * w a row of dh needs only its own rows of dy and h (see row_math.h). What crosses rows are sums over the batch and
// the tokens: dw = sum dy * hhat, db = sum dy, dp'[n] = dpos_out[n] + sum_b dy[b, n]. With the forward's tiling all three come from two
// accumulators in the group's registers; they are written once at its end, and finish_kernel (sums.cuh) adds them up.
#pragma once

#include "sums.cuh"

namespace mpvg::cuda {

struct NormForward {
  int B, N, D, prefix;
  Share share;
  float eps, pos_eps;
  Operand x, branch, scale, weight, bias, pos, pos_weight, pos_bias, y, h, pos_out;
  float* stats;
};

template <class T, int P>
MPVG_ROW_KERNEL(T, P) pe_layer_norm_fwd_kernel(const __grid_constant__ NormForward a) {
  using L = Layout<P, T::E, T::whole>;
  float* const w = reinterpret_cast<float*>(shared_memory());
  float* const exchange = w + padded(a.D);
  char* ring = reinterpret_cast<char*>(exchange + kExchange);
  RowGroup at(a.share.lanes, a.D, exchange);
  const int slice = blockIdx.x / a.share.tiles, n = blockIdx.x % a.share.tiles * (blockDim.x / at.lanes) + at.row;
  const int b0 = slice * a.share.samples, b1 = min(a.B, b0 + a.share.samples);
  const bool live = n < a.N;

  RowStream<typename T::X, L> x(at, a.x, ring, a.share.stage_bytes, a.share.stages, live);
  RowStream<typename T::F, L> f(at, a.branch, ring, a.share.stage_bytes, a.share.stages, live);
  const auto fetch = [&](int b, int stage) {
    if (live && b < b1) {
      x.fetch(at, stage, a.x.row(b, n));
      if (a.branch) f.fetch(at, stage, a.branch.row(b, n));
    }
    __pipeline_commit();
  };
  for (int stage = 0; stage < a.share.stages; ++stage) fetch(b0 + stage, stage);

  // While those come: w into shared memory, b + p' into registers.
  L::share(w, a.weight, a.D);
  float shift[P] = {};
  const int k = n - a.prefix;
  const bool there = a.pos && live && k >= 0;
  if (a.pos) {
    float p[P];
    Moments<float> m = L::pos_row(at, a.pos, k, there, a.pos_eps, p);
    if (!a.pos_weight) m = kAsItIs;
    if (there) L::chunks(at, [&](int c, int column) {
      float wp[L::E], bp[L::E] = {};
#pragma unroll
      for (int e = 0; e < L::E; ++e) wp[e] = 1;
      if (a.pos_weight) L::read(a.pos_weight, a.pos_weight.data, column, a.D, wp);
      if (a.pos_bias) L::read(a.pos_bias, a.pos_bias.data, column, a.D, bp);
#pragma unroll
      for (int e = 0; e < L::E; ++e) shift[c * L::E + e] = fma(normalised(p[c * L::E + e], m), wp[e], bp[e]);
      if (slice == 0 && a.pos_out) L::write(a.pos_out, a.pos_out.row(0, k), column, a.D, shift + c * L::E);
    });
  }
  if (a.bias) L::chunks(at, [&](int c, int column) {
    float bias[L::E];
    L::read(a.bias, a.bias.data, column, a.D, bias);
#pragma unroll
    for (int e = 0; e < L::E; ++e) shift[c * L::E + e] += bias[e];
  });
  __syncthreads();

  float s = 1, next_s = a.scale && b0 < b1 ? read_one(a.scale, a.scale.data, b0) : 1.0f;
  for (int b = b0, stage = 0; b < b1; ++b, stage = stage + 1 == a.share.stages ? 0 : stage + 1) {
    s = next_s;
    if (a.scale && b + 1 < b1) next_s = read_one(a.scale, a.scale.data, b + 1);
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
        if (live && a.h) Storage<typename T::H, L::E>::write(a.h, a.h.row(b, n), column, a.D, v);
      }
#pragma unroll
      for (int e = 0; e < L::E; ++e) h[c * L::E + e] = v[e];
    });
    float total[1] = {L::lane_sum(at, h)};
    at.sum(total);
    fetch(b + a.share.stages, stage);  // the slots of this stage have been read: the sum needed all of them
    const Moments<float> m = L::statistics(at, h, total[0] * at.inv_D, a.eps);
    if (live) {
      L::chunks(at, [&](int c, int column) {
        float v[L::E];
        L::shared_chunk(w, column, a.D, v);
#pragma unroll
        for (int e = 0; e < L::E; ++e) v[e] = fma(normalised(h[c * L::E + e], m), v[e], shift[c * L::E + e]);
        Storage<typename T::Y, L::E>::write(a.y, a.y.row(b, n), column, a.D, v);
      });
      if (a.stats && at.lane == 0) {
        const int64_t row = int64_t(b) * a.N + n;
        a.stats[row] = m.m1;
        a.stats[int64_t(a.B) * a.N + row] = m.rstd;
      }
    }
  }
}

struct NormBackward {
  int B, N, D, prefix;
  Share share;
  float pos_eps;
  Operand dy, dh, h, scale, weight, pos, dx, dbranch;
  const float* stats;
  float* dy_partial;        // sums of dy: (slices, N, D) if by_token, else (blocks, D)
  float* dw_partial;        // sums of dy * hhat (blocks, D)
  Moments<float>* moments;  // of pos, for finish_kernel; null: not wanted
  bool by_token;
};

// A row of one column has no gradient. Its g - mean(g) is zero, but g = dy * w fused into the difference would leave the product's
// rounding there, times rstd.
__device__ __forceinline__ float backward_rstd(const NormBackward& a, float rstd) { return a.D == 1 ? 0.0f : rstd; }

template <class T, int P>
MPVG_ROW_KERNEL(T, P) pe_layer_norm_bwd_kernel(const __grid_constant__ NormBackward a) {
  using L = Layout<P, T::E, T::whole>;
  float* const w = reinterpret_cast<float*>(shared_memory());
  float* const exchange = w + padded(a.D);
  char* const ring = reinterpret_cast<char*>(exchange + kExchange);
  char* memory = ring;
  RowGroup at(a.share.lanes, a.D, exchange);
  const int slice = blockIdx.x / a.share.tiles, n = blockIdx.x % a.share.tiles * (blockDim.x / at.lanes) + at.row;
  const int b0 = slice * a.share.samples, b1 = min(a.B, b0 + a.share.samples);
  const bool live = n < a.N;

  RowStream<typename T::Y, L> dy(at, a.dy, memory, a.share.stage_bytes, a.share.stages, live);
  RowStream<typename T::H, L> h(at, a.h, memory, a.share.stage_bytes, a.share.stages, live);
  RowStream<typename T::H, L> dh(at, a.dh, memory, a.share.stage_bytes, a.share.stages, live);
  const auto fetch = [&](int b, int stage) {
    if (live && b < b1) {
      dy.fetch(at, stage, a.dy.row(b, n));
      h.fetch(at, stage, a.h.row(b, n));
      if (a.dh) dh.fetch(at, stage, a.dh.row(b, n));
    }
    __pipeline_commit();
  };
  for (int stage = 0; stage < a.share.stages; ++stage) fetch(b0 + stage, stage);

  L::share(w, a.weight, a.D);
  if (a.moments && slice == 0) {
    const int k = n - a.prefix;
    const bool there = live && k >= 0;
    float p[P];
    const Moments<float> m = L::pos_row(at, a.pos, k, there, a.pos_eps, p);
    if (there && at.lane == 0) a.moments[k] = m;
  }
  __syncthreads();

  float sum_dy[P] = {}, sum_dy_hhat[P] = {};
  // A row's m1, rstd and scale are read one sample ahead.
  float m1 = 0, rstd = 0, s = 1;
  const auto look_ahead = [&](int b) {
    if (!live || b >= b1) return;
    const float* const stats = a.stats + int64_t(b) * a.N + n;
    m1 = stats[0], rstd = backward_rstd(a, stats[int64_t(a.B) * a.N]);
    if (a.scale) s = read_one(a.scale, a.scale.data, b);
  };
  look_ahead(b0);
  for (int b = b0, stage = 0; b < b1; ++b, stage = stage + 1 == a.share.stages ? 0 : stage + 1) {
    Moments<float> m{m1, 0, rstd};
    const float scale = s;
    look_ahead(b + 1);
    wait_for_oldest(a.share.stages);
    float sums[3] = {};  // of c = h - m1, g = dy * w, g * c
    L::chunks(at, [&](int c, int column) {
      float dy_c[L::E], h_c[L::E], w_c[L::E];
      dy.read(stage, c, dy_c);
      h.read(stage, c, h_c);
      L::shared_chunk(w, column, a.D, w_c);
      L::elements(at, column, [&](int e) {
        const float centred = h_c[e] - m.m1, g = dy_c[e] * w_c[e];
        sums[0] += centred;
        sums[1] += g;
        sums[2] = fma(g, centred, sums[2]);
      });
    });
    at.sum(sums);
    m.m2 = sums[0] * at.inv_D;
    const GradMeans<float> means = grad_means(m, sums[1], sums[2], at.inv_D);
    // dy and h are read from their slots again: kept in registers they would take as many as the two accumulators.
    asm volatile("" ::: "memory");
    if (live) L::chunks(at, [&](int c, int column) {
      float dy_c[L::E], h_c[L::E], grad[L::E];
      dy.read(stage, c, dy_c);
      h.read(stage, c, h_c);
      L::shared_chunk(w, column, a.D, grad);
#pragma unroll
      for (int e = 0; e < L::E; ++e) {
        const float hhat = normalised(h_c[e], m);
        sum_dy[c * L::E + e] += dy_c[e];
        sum_dy_hhat[c * L::E + e] = fma(dy_c[e], hhat, sum_dy_hhat[c * L::E + e]);
        grad[e] = input_gradient(dy_c[e] * grad[e], hhat, m, means);
      }
      if (a.dh) {
        dh.read(stage, c, h_c);
#pragma unroll
        for (int e = 0; e < L::E; ++e) grad[e] += h_c[e];
      }
      if (a.dx) Storage<typename T::X, L::E>::write(a.dx, a.dx.row(b, n), column, a.D, grad);
      if (a.dbranch) {
#pragma unroll
        for (int e = 0; e < L::E; ++e) grad[e] *= scale;
        Storage<typename T::F, L::E>::write(a.dbranch, a.dbranch.row(b, n), column, a.D, grad);
      }
    });
    fetch(b + a.share.stages, stage);
  }

  float* const shared = reinterpret_cast<float*>(ring);  // nothing is under way to there any more: the last groups were empty
  __pipeline_wait_prior(0);
  if (a.dy_partial && !a.by_token) L::block_sum(at, sum_dy, shared, a.dy_partial + int64_t(blockIdx.x) * a.D, 1);
  if (a.dw_partial) L::block_sum(at, sum_dy_hhat, shared, a.dw_partial + int64_t(blockIdx.x) * a.D, 1);
  if (a.dy_partial && a.by_token && live) {
    float* const out = a.dy_partial + (int64_t(slice) * a.N + n) * a.D;
    L::chunks(at, [&](int c, int column) {
      if constexpr (T::whole) {
#pragma unroll
        for (int part = 0; part < L::E; part += 4) {
          const float* v = sum_dy + c * L::E + part;
          write_vector<float>(out + column + part, {v[0], v[1], v[2], v[3]});
        }
      } else {
        L::elements(at, column, [&](int e) { out[column + e] = sum_dy[c * L::E + e]; });
      }
    });
  }
}

// The same for rows of any width and type, by a block a position: each thread comes back to its own columns.

MPVG_FINISH_KERNEL pe_layer_norm_fwd_loop_kernel(const __grid_constant__ NormForward a) {
  RowGroup at = whole_block(a.D);
  const int64_t n = blockIdx.x, k = n - a.prefix;
  const bool has_pos = a.pos && k >= 0;
  const auto parameter = [](const Operand& o, int64_t d, float absent) { return o ? read_one(o, o.data, d) : absent; };
  Moments<float> pm;
  const auto pos_out = [&](int64_t d) {  // p', also where it is no result
    return fma(normalised(read_one(a.pos, a.pos.row(0, k), d), pm), parameter(a.pos_weight, d, 1), parameter(a.pos_bias, d, 0));
  };
  if (has_pos) {
    pm = kAsItIs;
    if (a.pos_weight) pm = loop_moments(at, a.pos_eps, [&](int64_t d) { return read_one(a.pos, a.pos.row(0, k), d); });
    if (a.pos_out) over_columns(a.D, [&](int64_t d) { write_one(a.pos_out, a.pos_out.row(0, k), d, pos_out(d)); });
  }
  for (int64_t b = 0; b < a.B; ++b) {
    const float s = parameter(a.scale, b, 1);
    const auto h = [&](int64_t d) {
      const float v = read_one(a.x, a.x.row(b, n), d);
      return a.branch ? Storage<any, 4>::rounded(a.h, fma(s, read_one(a.branch, a.branch.row(b, n), d), v)) : v;
    };
    const Moments<float> m = loop_moments(at, a.eps, h);
    over_columns(a.D, [&](int64_t d) {
      const float h_d = h(d), shift = parameter(a.bias, d, 0) + (has_pos ? pos_out(d) : 0.0f);
      if (a.h) write_one(a.h, a.h.row(b, n), d, h_d);
      write_one(a.y, a.y.row(b, n), d, fma(normalised(h_d, m), parameter(a.weight, d, 1), shift));
    });
    if (a.stats && threadIdx.x == 0) a.stats[b * a.N + n] = m.m1, a.stats[(a.B + b) * a.N + n] = m.rstd;
  }
}

// The partial sums are then one row a position, in either layout.
MPVG_FINISH_KERNEL pe_layer_norm_bwd_loop_kernel(const __grid_constant__ NormBackward a) {
  RowGroup at = whole_block(a.D);
  const int64_t n = blockIdx.x, k = n - a.prefix;
  if (a.moments && k >= 0) {
    const Moments<float> m = loop_moments(at, a.pos_eps, [&](int64_t d) { return read_one(a.pos, a.pos.row(0, k), d); });
    if (threadIdx.x == 0) a.moments[k] = m;
  }
  float* const sum_dy = a.dy_partial ? a.dy_partial + n * a.D : nullptr;
  float* const sum_dy_hhat = a.dw_partial ? a.dw_partial + n * a.D : nullptr;
  over_columns(a.D, [&](int64_t d) {
    if (sum_dy) sum_dy[d] = 0;
    if (sum_dy_hhat) sum_dy_hhat[d] = 0;
  });
  for (int64_t b = 0; b < a.B; ++b) {
    Moments<float> m{a.stats[b * a.N + n], 0, backward_rstd(a, a.stats[(a.B + b) * a.N + n])};
    const float s = a.scale ? read_one(a.scale, a.scale.data, b) : 1.0f;
    const auto h = [&](int64_t d) { return read_one(a.h, a.h.row(b, n), d); };
    const auto dy = [&](int64_t d) { return read_one(a.dy, a.dy.row(b, n), d); };
    const auto g = [&](int64_t d) { return dy(d) * read_one(a.weight, a.weight.data, d); };
    const GradMeans<float> means = loop_grad_means(at, m, h, g);
    over_columns(a.D, [&](int64_t d) {
      const float hhat = normalised(h(d), m);
      if (sum_dy) sum_dy[d] += dy(d);
      if (sum_dy_hhat) sum_dy_hhat[d] = fma(dy(d), hhat, sum_dy_hhat[d]);
      const float dh = a.dh ? read_one(a.dh, a.dh.row(b, n), d) : 0.0f, grad = input_gradient(g(d), hhat, m, means) + dh;
      if (a.dx) write_one(a.dx, a.dx.row(b, n), d, grad);
      if (a.dbranch) write_one(a.dbranch, a.dbranch.row(b, n), d, grad * s);
    });
  }
}

}  // namespace mpvg::cuda
