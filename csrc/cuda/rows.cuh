// Rows over threads: what both operators' kernels are written in.
//
// A row of D elements belongs to a group of `lanes` threads (part of a warp, a warp, or a whole block of several). Lane l holds chunks
// l, l + lanes, l + 2 lanes, ... of E elements each, P elements in all. Rows on their way from memory wait in shared memory, in slots that
// only the thread that reads them has fetched: nobody else has to be waited for, and no register is held for a row in flight.
#pragma once

#include "dtypes.cuh"
#include "launch.h"

namespace mpvg::cuda {

// A multiprocessor has registers for so many threads of this kernel, and the compiler is to keep to that: no block has more.
#define MPVG_ROW_KERNEL(types, per_lane) __global__ void __launch_bounds__(Rules::resident_threads(types::whole, per_lane), 1)

// A block's dynamic shared memory, all there is: kernels use no static one.
__device__ inline char* shared_memory() {
  extern __shared__ uint4 dynamic_shared[];
  return reinterpret_cast<char*>(dynamic_shared);
}

// Floats by which warps exchange the sums of a row: two sets in turn, three sums, sixteen warps.
constexpr int kExchange = 2 * 3 * 16;

// A parameter vector in shared memory takes whole groups of four.
MPVG_HD inline int padded(int D) { return (D + 3) / 4 * 4; }

// Moments that leave a row as it is: of a pos without pos_weight, which is p' itself.
constexpr Moments<float> kAsItIs{0, 0, 1};

// The group of threads that this thread is in.
struct RowGroup {
  int lanes, row, lane, D;
  float inv_D;
  float* exchange;
  int phase = 0;

  __device__ RowGroup(int lanes, int D, float* exchange)
      : lanes(lanes), row(threadIdx.x / lanes), lane(threadIdx.x % lanes), D(D), inv_D(1.0f / float(D)), exchange(exchange) {}

  // Replaces each v by its sum over the group, in every thread of it the same bits. Every thread of the block has to call it.
  template <int n>
  __device__ __forceinline__ void sum(float (&v)[n]) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
      if (offset >= lanes) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
    }
    if (lanes <= 32) return;
    // Several warps: the group is the block. Two sets of floats in turn, so that one barrier a sum is enough.
    float* set = exchange + phase * (kExchange / 2);
    phase ^= 1;
    const int warps = lanes / 32;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (lane % 32 == 0) set[i * warps + lane / 32] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      v[i] = set[i * warps];
      for (int warp = 1; warp < warps; ++warp) v[i] += set[i * warps + warp];
    }
  }
};

// P elements of a row in a lane, in chunks of E. `whole`: the row has no partial chunk.
template <int P_, int E_, bool whole>
struct Layout {
  static constexpr int P = P_, E = E_, C = P / E;

  // f(c, column) for the chunks of this lane that the row has
  template <class F>
  __device__ static __forceinline__ void chunks(const RowGroup& at, F f) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int column = (c * at.lanes + at.lane) * E;
      if (column < at.D) f(c, column);
    }
  }
  // f(e) for the elements of a chunk that the row has
  template <class F>
  __device__ static __forceinline__ void elements(const RowGroup& at, int column, F f) {
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (whole || column + e < at.D) f(e);
  }

  // v = elements column ... of a row whose type is looked up
  __device__ static __forceinline__ void read(const Operand& o, const char* row, int column, int D, float* v) {
#pragma unroll
    for (int part = 0; part < E; part += 4) {
      float quad[4];
      read_any(o, row, column + part, D, quad);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[part + e] = quad[e];
    }
  }
  __device__ static __forceinline__ void write(const Operand& o, char* row, int column, int D, const float* v) {
#pragma unroll
    for (int part = 0; part < E; part += 4) {
      const float quad[4] = {v[part], v[part + 1], v[part + 2], v[part + 3]};
      write_any(o, row, column + part, D, quad);
    }
  }

  // A parameter vector in shared memory, as fp32. Lanes read E neighbours each: with E = 8 the two groups of four lie in two planes, so
  // that the lanes of one access are neighbours and meet in no bank.
  __device__ static int plane(int column, int D) { return E == 4 ? column : column / 8 * 4 + (column / 4 % 2) * (D / 2); }
  __device__ static __forceinline__ void share(float* shared, const Operand& o, int D) {
    for (int column = 4 * threadIdx.x; column < D; column += 4 * blockDim.x) {
      float v[4];
      read_any(o, o.data, column, D, v);
      write_vector<float>(shared + plane(column, D), v);
    }
  }
  __device__ static __forceinline__ void shared_chunk(const float* shared, int column, int D, float (&v)[E]) {
#pragma unroll
    for (int part = 0; part < E; part += 4) {
      float quad[4];
      read_vector<float>(shared + plane(column + part, D), quad);
#pragma unroll
      for (int e = 0; e < 4; ++e) v[part + e] = quad[e];
    }
  }

  // What a lane adds to the sum of its row
  __device__ static __forceinline__ float lane_sum(const RowGroup& at, const float (&v)[P]) {
    float sum = 0;
    chunks(at, [&](int c, int column) { elements(at, column, [&](int e) { sum += v[c * E + e]; }); });
    return sum;
  }
  // The moments of a row whose mean is m1
  __device__ static __forceinline__ Moments<float> statistics(RowGroup& at, const float (&v)[P], float m1, float eps) {
    float sums[2] = {};
    chunks(at, [&](int c, int column) {
      elements(at, column, [&](int e) {
        const float centred = v[c * E + e] - m1;
        sums[0] += centred;
        sums[1] = fma(centred, centred, sums[1]);
      });
    });
    at.sum(sums);
    return moments(m1, sums[0], sums[1], at.inv_D, eps);
  }

  __device__ static __forceinline__ Moments<float> row_moments(RowGroup& at, const float (&v)[P], float eps) {
    float total[1] = {lane_sum(at, v)};
    at.sum(total);
    return statistics(at, v, total[0] * at.inv_D, eps);
  }

  // Row n of pos and its moments; zeros where there is no such row. Every thread of the block has to call it.
  __device__ static __forceinline__ Moments<float> pos_row(RowGroup& at, const Operand& pos, int64_t n, bool there, float eps,
                                                           float (&v)[P]) {
#pragma unroll
    for (int i = 0; i < P; ++i) v[i] = 0;
    if (there) chunks(at, [&](int c, int column) { read(pos, pos.row(0, n), column, at.D, v + c * E); });
    return row_moments(at, v, eps);
  }

  // out[column] = the sum of v over the block's rows, added up in order through shared memory (rows * padded(D) floats).
  __device__ static __forceinline__ void block_sum(const RowGroup& at, const float (&v)[P], float* shared, float* out, float factor) {
    const int rows = blockDim.x / at.lanes, stride = padded(at.D);
    __syncthreads();  // whatever was in that memory has been read
    chunks(at, [&](int c, int column) {
      elements(at, column, [&](int e) { shared[at.row * stride + column + e] = v[c * E + e]; });
    });
    __syncthreads();
    for (int column = threadIdx.x; column < at.D; column += blockDim.x) {
      float sum = shared[column];
      for (int r = 1; r < rows; ++r) sum += shared[r * stride + column];
      out[column] = sum * factor;
    }
  }
};

// Waits until at most stages - 1 of the groups of copies that this thread has started are still under way.
__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages == 1) __pipeline_wait_prior(0);
  else if (stages == 2) __pipeline_wait_prior(1);
  else if (stages == 3) __pipeline_wait_prior(2);
  else __pipeline_wait_prior(3);
}
static_assert(Rules::most_stages == 4, "wait_for_oldest knows four");

// One tensor's rows on their way: this thread's slots for them, stage by stage.
template <class T, class L>
struct RowStream {
  using Slot = Storage<T, L::E>;
  const Operand& from;
  char* slots;
  int stage_bytes;

  // Bytes of a stage, for a block of so many threads.
  MPVG_HD static constexpr int bytes(int threads) { return threads * L::C * Slot::slot_bytes; }

  // Takes its part of a stage of `memory`. Slots that will never be filled hold zeros.
  __device__ __forceinline__ RowStream(const RowGroup& at, const Operand& from, char*& memory, int stage_bytes, int stages, bool live)
      : from(from), slots(memory + (threadIdx.x / 32 * L::C * 32 + threadIdx.x % 32) * Slot::slot_bytes),
        stage_bytes(stage_bytes) {
    if (!from) return;
    memory += bytes(blockDim.x);
#pragma unroll
    for (int c = 0; c < L::C; ++c) {
      if (live && (c * at.lanes + at.lane) * L::E < at.D) continue;
      for (int stage = 0; stage < stages; ++stage)
        for (int i = 0; i < Slot::slot_bytes; i += 4) *reinterpret_cast<float*>(slot(stage, c) + i) = 0;
    }
  }
  __device__ __forceinline__ char* slot(int stage, int c) const {
    return slots + stage * stage_bytes + c * 32 * Slot::slot_bytes;  // neighbours' slots are neighbours
  }
  __device__ __forceinline__ void fetch(const RowGroup& at, int stage, const char* row) const {
    L::chunks(at, [&](int c, int column) { Slot::fetch(from, slot(stage, c), row, column, at.D); });
  }
  __device__ __forceinline__ void read(int stage, int c, float (&v)[L::E]) const { Slot::read(slot(stage, c), v); }
};

// Storage types of a forward, and of the backward that goes with it: x, f, y; h = x + f is as wide as the wider one.
template <class X_, class F_, class Y_>
struct Types {
  using X = X_;
  using F = F_;
  using Y = Y_;
  using H = X_;
  static constexpr bool whole = true;                                                 // rows are whole chunks
  static constexpr int E = sizeof(X_) == 2 && sizeof(F_) == 2 && sizeof(Y_) == 2 ? 8 : 4;  // the widest moves 16 bytes at a time
};
template <>
struct Types<any, any, any> {
  using X = any;
  using F = any;
  using Y = any;
  using H = any;
  static constexpr bool whole = false;
  static constexpr int E = 4;
};

// A block's share: positions tile * rows ... and samples slice * samples ...
struct Share {
  int lanes, tiles, samples, stages, stage_bytes;
};

}  // namespace mpvg::cuda
