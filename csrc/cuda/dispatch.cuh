// From a call's dtypes, width and alignment to the kernel that is compiled for them; and scratch memory cut into pieces.
#pragma once

#include <initializer_list>

#include "kernels.h"
#include "rows.cuh"

namespace mpvg::cuda {

// Whether rows of D elements can be moved in whole chunks of E: every pointer and stride a multiple of one.
inline bool in_chunks(int64_t D, int E, std::initializer_list<View> views) {
  if (D % E) return false;
  for (const View& v : views) {
    const int64_t chunk = E * bytes(v.dtype);
    if (v && (reinterpret_cast<uintptr_t>(v.data) % chunk || v.stride_b % E || v.stride_n % E)) return false;
  }
  return true;
}

// f(Types<...>{}) for the types of x (and h), of the branch (absent: any will do) and of y, if rows of these views come in whole chunks of
// them; f(Types<any, any, any>{}) for the other mixes. Models in one precision and autocast's mix (an fp32 stream, half branches and
// results) have kernels of their own.
template <class F>
void with_types(Dtype x, Dtype branch, Dtype y, int64_t D, std::initializer_list<View> views, F f) {
  const auto are = [&](Dtype x_type, Dtype half) { return x == x_type && (branch == half || branch == Dtype::absent) && y == half; };
  const auto use = [&](auto types) {
    if (in_chunks(D, types.E, views)) f(types);
    else f(Types<any, any, any>{});
  };
  if (are(Dtype::f32, Dtype::f32)) return use(Types<float, float, float>{});
  if (are(Dtype::bf16, Dtype::bf16)) return use(Types<bf16, bf16, bf16>{});
  if (are(Dtype::f16, Dtype::f16)) return use(Types<f16, f16, f16>{});
  if (are(Dtype::f32, Dtype::bf16)) return use(Types<float, bf16, bf16>{});
  if (are(Dtype::f32, Dtype::f16)) return use(Types<float, f16, f16>{});
  f(Types<any, any, any>{});
}

// f(constant, tile): the elements a lane, as a type, and the tile that has as many.
template <class T, class F>
void with_tile(int64_t D, F f) {
  const RowTile tile(D, !T::whole);
  if constexpr (T::whole) {
    if (tile.per_lane == 24) return f(std::integral_constant<int, 24>{}, tile);
    if (tile.per_lane == 40) return f(std::integral_constant<int, 40>{}, tile);
  }
  f(std::integral_constant<int, 32>{}, tile);
}

// One block of scratch memory, handed out in pieces of 16 bytes' alignment. Sizes are named twice: first all are added, then taken.
struct Pieces {
  int64_t size = 0;
  char* memory = nullptr;

  int64_t add(int64_t count, int64_t element_bytes) {
    const int64_t at = size;
    size += ceil_div(count * element_bytes, 16) * 16;
    return at;
  }
  void take(Scratch scratch) {
    if (size) memory = static_cast<char*>(scratch.take(size, scratch.context));
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(memory + offset);
  }
};

}  // namespace mpvg::cuda
