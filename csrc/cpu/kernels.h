// The interface between the operators (which know torch) and their kernels (which do not): plain arguments, and a table of entry points
// for each instruction set.
//
// Tensors are described by View; an absent optional argument, or a gradient that nobody asked for, is a View that tests false.
// Every row of D elements is contiguous; rows may lie anywhere (any strides, 0 included, in elements).
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#define MPVG_X86 1
#endif

namespace mpvg {

enum class Dtype : int8_t { absent, f32, bf16, f16, f64 };

constexpr int64_t bytes(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::absent;
  int64_t stride_b = 0, stride_n = 0;  // of a (B, N, D) tensor; one with two axes has stride_n alone

  explicit operator bool() const { return dtype != Dtype::absent; }  // an empty tensor has no data, but is there
  void* at(int64_t b, int64_t n) const { return static_cast<char*>(data) + (b * stride_b + n * stride_n) * bytes(dtype); }
};

// Runs body(begin, end, context) over pieces of [0, n) of at least `grain`, on as many threads as there are.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, int64_t grain, Body body, void* context);

struct Shape {
  int64_t B, N, D;
  int64_t prefix;  // the first rows of each sample, which get no PE
};

// The inputs of both forwards: h = x + scale[b] * branch, normalised; PE = LN(pos).
struct Inputs {
  Shape shape;
  double eps, pos_eps;
  View x, branch, scale, weight, bias, pos, pos_weight, pos_bias;
};

// What both backwards share. stats is (2, B, N): m1, then rstd, in the dtype of the arithmetic.
struct Saved {
  Shape shape;
  double pos_eps;
  View h, stats, scale, weight, pos, pos_weight;
};
struct Gradients {
  View x, branch, weight, bias, pos, pos_weight, pos_bias;
};

struct PELayerNormOutputs {
  View y, h, pos_out, stats;
};
struct PENormPoolOutputs {
  View out, h, stats, s;
};

struct Kernels {
  const char* isa;
  bool (*runs_here)();
  void (*pe_layer_norm_fwd)(const Inputs&, const PELayerNormOutputs&, ParallelFor);
  void (*pe_layer_norm_bwd)(const Saved&, View dy, View dh, View dpos_out, const Gradients&, ParallelFor);
  void (*pe_norm_pool_fwd)(const Inputs&, const PENormPoolOutputs&, ParallelFor);
  void (*pe_norm_pool_bwd)(const Saved&, View dout, View s, const Gradients&, ParallelFor);
};

// Scratch memory for one call. Each thread keeps its last large block: fresh pages cost more than writing to them.
void* take_memory(int64_t size);
void give_memory(void* memory);

// One table for each isa_*.cpp of this build, fastest first, ending with null.
extern const Kernels* const all_kernels[];

// The table in use: the fastest that this machine runs, or a lower one if asked for by name (by use_isa or MPVG_CPU_ISA).
const Kernels& kernels();

// Choose by name; null if there is no such table or the machine can't run it.
const Kernels* use_isa(const char* name);

}  // namespace mpvg
