// Plain arguments of the kernels, on every device: what torch's tensors become at the border (host.h) between the operators, which know
// torch, and the kernels, which do not.
//
// Tensors are described by View; an absent optional argument, or a gradient that nobody asked for, is a View that tests false.
// Every row of D elements is contiguous; rows may lie anywhere (any strides, 0 included, in elements).
#pragma once

#include <cstdint>

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

struct Shape {
  int64_t B, N, D;
  int64_t prefix;  // the first rows of each sample, which get no PE
};

// The inputs of both forwards: h = x + scale[b] * branch, normalised; PE = LN(pos), or pos as it is where pos_weight is absent.
struct Inputs {
  Shape shape;
  double eps, pos_eps;
  View x, branch, scale, weight, bias, pos, pos_weight, pos_bias;
};

// What both backwards share. stats is (2, B, N): a mean and rstd for each row, in the dtype of the arithmetic, as the same backend's forward
// left them (the CPU's says more by the sign of rstd).
struct Saved {
  Shape shape;
  double pos_eps;
  View h, stats, scale, weight, pos, pos_weight;
};
struct Gradients {
  View x, branch, weight, bias, pos, pos_weight, pos_bias;
};

// All layers' PE: L LayerNorms over the K rows of pos; weight and bias are (L, D), two axes as View has them.
struct PEChainInputs {
  int64_t L, K, D;
  double eps;
  bool hierarchical;  // each layer reads the one before it, else all read pos
  View pos, weight, bias;
};
struct PEChainGradients {
  View pos, weight, bias;
};

struct PELayerNormOutputs {
  View y, h, pos_out, stats;
};
struct PENormPoolOutputs {
  View out, h, stats, s;
};

}  // namespace mpvg
