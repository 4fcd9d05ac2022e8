// Storage types: reading and writing rows of fp32, bf16 and fp16 in memory as fp32 in registers.
//
// A kernel is compiled for fixed storage types (float, bf16, f16), which it moves in vectors; the mixes that are not worth code of their
// own, and rows that vectors can't reach (an odd width, an unaligned pointer or stride), go through the type `any`: dtype and alignment
// are then looked up at run time, the same for the whole launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include "../arguments.h"

#define MPVG_HD __host__ __device__
#define MPVG_ISA cuda

namespace mpvg::cuda {

// The name that row_math.h calls, for the one vector type there is here.
MPVG_HD inline float fma(float x, float y, float z) { return fmaf(x, y, z); }

}  // namespace mpvg::cuda

#include "../row_math.h"

namespace mpvg::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;
struct any {};

// A tensor as kernels get it: View's fields, and whether `any` may read it four elements at a time.
struct Operand {
  char* data = nullptr;
  int64_t stride_b = 0, stride_n = 0;  // in bytes
  Dtype dtype = Dtype::absent;
  bool vectors = false;

  Operand() = default;
  Operand(const View& v) : data(static_cast<char*>(v.data)), dtype(v.dtype) {
    if (!data) return;  // absent, or an empty tensor: rows are pointed at all the same, but not read
    stride_b = v.stride_b * bytes(v.dtype), stride_n = v.stride_n * bytes(v.dtype);
    const int64_t vector = 4 * bytes(v.dtype);
    vectors = reinterpret_cast<uintptr_t>(data) % vector == 0 && stride_b % vector == 0 && stride_n % vector == 0;
  }
  MPVG_HD explicit operator bool() const { return dtype != Dtype::absent; }
  MPVG_HD char* row(int64_t b, int64_t n) const { return data + b * stride_b + n * stride_n; }
};

// What n bytes look like to one load or store instruction.
template <int n>
struct Bytes;
template <>
struct Bytes<8> {
  using type = uint2;
};
template <>
struct Bytes<16> {
  using type = uint4;
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(f16 v) { return __half2float(v); }
template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float(float v) { return v; }
template <>
__device__ inline bf16 from_float(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ inline f16 from_float(float v) { return __float2half_rn(v); }

// f with a null pointer of the storage type that `t` names.
template <class F>
__device__ __forceinline__ void with_type(Dtype t, F f) {
  if (t == Dtype::f32) f(static_cast<float*>(nullptr));
  else if (t == Dtype::bf16) f(static_cast<bf16*>(nullptr));
  else f(static_cast<f16*>(nullptr));
}

// E neighbours, from memory that is aligned to all of them.
template <class T, int E>
__device__ __forceinline__ void read_vector(const void* from, float (&v)[E]) {
  using V = typename Bytes<E * sizeof(T)>::type;
  union { V vector; T element[E]; } u;
  u.vector = *static_cast<const V*>(from);
#pragma unroll
  for (int e = 0; e < E; ++e) v[e] = to_float(u.element[e]);
}
template <class T, int E>
__device__ __forceinline__ void write_vector(void* to, const float (&v)[E]) {
  using V = typename Bytes<E * sizeof(T)>::type;
  union { V vector; T element[E]; } u;
#pragma unroll
  for (int e = 0; e < E; ++e) u.element[e] = from_float<T>(v[e]);
  *static_cast<V*>(to) = u.vector;
}

// Elements column, column + 1, ... of a row whose type is looked up; what lies at D or beyond reads as 0 and is not written.
__device__ __forceinline__ float read_one(const Operand& o, const char* row, int64_t column) {
  float value;
  with_type(o.dtype, [&](auto* t) { value = to_float(reinterpret_cast<decltype(t)>(const_cast<char*>(row))[column]); });
  return value;
}
__device__ __forceinline__ void write_one(const Operand& o, char* row, int64_t column, float value) {
  with_type(o.dtype, [&](auto* t) { reinterpret_cast<decltype(t)>(row)[column] = from_float<std::remove_pointer_t<decltype(t)>>(value); });
}
__device__ __forceinline__ void read_any(const Operand& o, const char* row, int column, int D, float (&v)[4]) {
  with_type(o.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T* from = reinterpret_cast<const T*>(row) + column;
    if (o.vectors && column + 4 <= D) return read_vector<T>(from, v);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = column + e < D ? to_float(from[e]) : 0.0f;
  });
}
__device__ __forceinline__ void write_any(const Operand& o, char* row, int column, int D, const float (&v)[4]) {
  with_type(o.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    T* to = reinterpret_cast<T*>(row) + column;
    if (o.vectors && column + 4 <= D) return write_vector<T>(to, v);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (column + e < D) to[e] = from_float<T>(v[e]);
  });
}

// How a kernel compiled for storage type T moves chunks of E elements. A slot is a chunk in shared memory on its way from global memory:
// raw bytes, copied asynchronously; fp32 for `any`, which converts on the way in.
template <class T, int E>
struct Storage {
  static constexpr int slot_bytes = E * sizeof(T);

  __device__ static void fetch(const Operand&, void* slot, const char* row, int column, int) {
    __pipeline_memcpy_async(slot, row + column * int(sizeof(T)), slot_bytes);
  }
  __device__ static void read(const void* slot, float (&v)[E]) { read_vector<T>(slot, v); }
  __device__ static void write(const Operand&, char* row, int column, int, const float (&v)[E]) {
    write_vector<T>(row + column * int(sizeof(T)), v);
  }
  // As it reads after being stored.
  __device__ static float rounded(const Operand&, float v) { return to_float(from_float<T>(v)); }
};
template <>
struct Storage<any, 4> {
  static constexpr int slot_bytes = 16;

  __device__ static void fetch(const Operand& o, void* slot, const char* row, int column, int D) {
    float v[4];
    read_any(o, row, column, D, v);
    write_vector<float>(slot, v);
  }
  __device__ static void read(const void* slot, float (&v)[4]) { read_vector<float>(slot, v); }
  __device__ static void write(const Operand& o, char* row, int column, int D, const float (&v)[4]) { write_any(o, row, column, D, v); }
  __device__ static float rounded(const Operand& o, float v) {
    with_type(o.dtype, [&](auto* t) { v = to_float(from_float<std::remove_pointer_t<decltype(t)>>(v)); });
    return v;
  }
};

}  // namespace mpvg::cuda
