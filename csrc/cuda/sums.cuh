// Column sums and the backward of p' = LN(pos): what is left to do on N rows after the pass over B * N. Also the loops over rows of any
// width that the operators use above Rules::widest columns.
#pragma once

#include "rows.cuh"

namespace mpvg::cuda {

#define MPVG_FINISH_KERNEL static __global__ void __launch_bounds__(Rules::finish_threads, 2)

// --- rows of any width: a block a row, each thread walks over columns threadIdx.x, + blockDim.x, ... ---

template <class F>
__device__ __forceinline__ void over_columns(int64_t D, F f) {
  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) f(d);
}

// The moments of the row that read(d) gives, which is called twice a column.
template <class Read>
__device__ __forceinline__ Moments<float> loop_moments(RowGroup& at, float eps, Read read) {
  float total[1] = {}, sums[2] = {};
  over_columns(at.D, [&](int64_t d) { total[0] += read(d); });
  at.sum(total);
  const float m1 = total[0] * at.inv_D;
  over_columns(at.D, [&](int64_t d) {
    const float centred = read(d) - m1;
    sums[0] += centred;
    sums[1] = fma(centred, centred, sums[1]);
  });
  at.sum(sums);
  return moments(m1, sums[0], sums[1], at.inv_D, eps);
}

// What the gradient of a row needs, from its saved m1 and rstd: m2 into m, and the means of g and g * vhat.
template <class ReadV, class ReadG>
__device__ __forceinline__ GradMeans<float> loop_grad_means(RowGroup& at, Moments<float>& m, ReadV v, ReadG g) {
  float sums[3] = {};
  over_columns(at.D, [&](int64_t d) {
    const float centred = v(d) - m.m1, grad = g(d);
    sums[0] += centred;
    sums[1] += grad;
    sums[2] = fma(grad, centred, sums[2]);
  });
  at.sum(sums);
  m.m2 = sums[0] * at.inv_D;
  return grad_means(m, sums[1], sums[2], at.inv_D);
}

// The group that a whole block is, with its exchange at the start of shared memory.
__device__ inline RowGroup whole_block(int D) { return RowGroup(blockDim.x, D, reinterpret_cast<float*>(shared_memory())); }

// --- strips of columns: a block of finish_threads sums Rules::strip columns, Rules::strip_rows rows at a time ---

struct Strip {
  int column, row;
  float* shared;  // finish_threads floats

  __device__ explicit Strip(int strip)
      : column(strip * Rules::strip + threadIdx.x % Rules::strip), row(threadIdx.x / Rules::strip),
        shared(reinterpret_cast<float*>(shared_memory())) {}

  // The sum of v over the threads of a column, in a fixed order, in the first of them. Every thread of the block has to call it.
  __device__ float sum(float v) {
    shared[threadIdx.x] = v;
    for (int half = Rules::strip_rows / 2; half; half /= 2) {
      __syncthreads();
      if (row < half) shared[threadIdx.x] += shared[threadIdx.x + half * Rules::strip];
    }
    v = shared[threadIdx.x];
    __syncthreads();
    return v;
  }
  __device__ void write(const Operand& out, float total) const {
    if (out && row == 0) write_one(out, out.data, column, total);
  }
};

// The sum of `count` numbers, `stride` apart. Unrolled, so that several loads are under way.
__device__ __forceinline__ float strided_sum(const float* from, int64_t count, int64_t stride) {
  float sum = 0;
#pragma unroll 8
  for (int64_t i = 0; i < count; ++i) sum += from[i * stride];
  return sum;
}

// out = the sum over `count` rows of D floats
struct ColumnSum {
  const float* rows = nullptr;
  int64_t count = 0;
  Operand out;
};

// From partial sums of dy to the gradients of bias, pos and its norm; from those of dy * hhat to weight's.
struct Finish {
  int D, N, prefix, slices;
  const float* partial;       // dy summed over a slice: row n of slice s is at s * stride_s + n * stride_n
  int64_t stride_s, stride_n;
  const Moments<float>* moments;  // of the rows of pos; without pos_weight dpos is dp', and they are not read
  Operand dpos_out, pos, pos_weight;
  Operand dbias, dpos, dpos_weight, dpos_bias;  // results
  ColumnSum sums[2];          // results that are plain column sums
  bool keep;                  // a row of dp' fits in shared memory
};

// dp'[n] = dpos_out[n] + sum_b dy[b, n]
__device__ __forceinline__ float slices_sum(const Finish& a, int64_t n, int64_t d) {
  return strided_sum(a.partial + n * a.stride_n + d, a.slices, a.stride_s);
}

// A block does one of three things: a strip of a plain column sum; a strip of dbias, dpos_weight and dpos_bias; a row of dpos. The second
// adds the slices up once more instead of waiting for the rows: a launch less, for reads that come from the L2 cache.
MPVG_FINISH_KERNEL finish_kernel(const __grid_constant__ Finish a) {
  const int strips = (a.D + Rules::strip - 1) / Rules::strip;
  int block = blockIdx.x;
  for (const ColumnSum& plain : a.sums) {
    if (!plain.out) continue;
    if (block < strips) {
      Strip at(block);
      float sum = 0;
      if (at.column < a.D) {
        const int64_t count = plain.count > at.row ? (plain.count - at.row + Rules::strip_rows - 1) / Rules::strip_rows : 0;
        sum = strided_sum(plain.rows + int64_t(at.row) * a.D + at.column, count, int64_t(Rules::strip_rows) * a.D);
      }
      sum = at.sum(sum);
      if (at.column < a.D) at.write(plain.out, sum);
      return;
    }
    block -= strips;
  }
  if (a.dbias || a.dpos_weight || a.dpos_bias) {
    if (block < strips) {
      Strip at(block);
      float db = 0, dwp = 0, dbp = 0;
      if (at.column < a.D)
        for (int64_t n = at.row; n < a.N; n += Rules::strip_rows) {
          float dp = slices_sum(a, n, at.column);
          db += dp;
          const int64_t k = n - a.prefix;
          if (k < 0) continue;
          if (a.dpos_out) dp += read_one(a.dpos_out, a.dpos_out.row(0, k), at.column);
          dbp += dp;
          if (a.dpos_weight) dwp = fma(dp, normalised(read_one(a.pos, a.pos.row(0, k), at.column), a.moments[k]), dwp);
        }
      db = at.sum(db), dwp = at.sum(dwp), dbp = at.sum(dbp);
      if (at.column < a.D) at.write(a.dbias, db), at.write(a.dpos_weight, dwp), at.write(a.dpos_bias, dbp);
      return;
    }
    block -= strips;
  }
  // dpos[k], the gradient of LN for g = dp' * wp
  const int64_t k = block, n = k + a.prefix;
  RowGroup at = whole_block(a.D);
  float* const kept = at.exchange + kExchange;
  const char* const pos = a.pos.row(0, k);
  const auto dp_out = [&](int64_t d) {
    const float dp = slices_sum(a, n, d);
    return a.dpos_out ? dp + read_one(a.dpos_out, a.dpos_out.row(0, k), d) : dp;
  };
  if (!a.pos_weight) return over_columns(a.D, [&](int64_t d) { write_one(a.dpos, a.dpos.row(0, k), d, dp_out(d)); });
  if (a.keep) over_columns(a.D, [&](int64_t d) { kept[d] = dp_out(d); });  // read by the thread that wrote it
  const auto v = [&](int64_t d) { return read_one(a.pos, pos, d); };
  const auto g = [&](int64_t d) { return (a.keep ? kept[d] : dp_out(d)) * read_one(a.pos_weight, a.pos_weight.data, d); };
  Moments<float> m = a.moments[k];
  const GradMeans<float> means = loop_grad_means(at, m, v, g);
  over_columns(a.D, [&](int64_t d) { write_one(a.dpos, a.dpos.row(0, k), d, input_gradient(g(d), normalised(v(d), m), m, means)); });
}

inline void finish(Finish a, cudaStream_t stream) {
  const int64_t strips = ceil_div(a.D, Rules::strip);
  int64_t blocks = 0;
  for (const ColumnSum& plain : a.sums) blocks += plain.out ? strips : 0;
  if (a.dbias || a.dpos_weight || a.dpos_bias) blocks += strips;
  if (a.dpos) blocks += a.N - a.prefix;
  const int64_t row_bytes = kExchange * sizeof(float) + a.D * sizeof(float);
  a.keep = row_bytes <= 48 << 10;
  const int64_t strip_bytes = Rules::finish_threads * sizeof(float);
  const int64_t shared = a.dpos ? std::max(strip_bytes, a.keep ? row_bytes : int64_t(kExchange * sizeof(float))) : strip_bytes;
  launch("finish", finish_kernel, blocks, Rules::finish_threads, shared, stream, a);
}

}  // namespace mpvg::cuda
