// From torch's tensors to the kernels' plain arguments and back, through the stable ABI, on every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "arguments.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // PyTorch 2.11's name for it
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace mpvg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Bits of grad_mask.
enum Gradient : int64_t { kX = 1, kBranch = 2, kWeight = 4, kBias = 8, kPos = 16, kPosWeight = 32, kPosBias = 64 };

// Bits of pe_chain's grad_mask.
enum ChainGradient : int64_t { kChainPos = 1, kChainWeight = 2, kChainBias = 4 };

inline Dtype to_dtype(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::Double: return Dtype::f64;
    default: STD_TORCH_CHECK(false, "mpvg: a kernel got a dtype that is not fp32, bf16, fp16 or fp64"); return Dtype::absent;
  }
}

// The dtype of the arithmetic and of saved statistics.
inline ScalarType arithmetic(ScalarType t) { return t == ScalarType::Double ? t : ScalarType::Float; }

inline ScalarType promote(ScalarType a, ScalarType b) { return a == b ? a : arithmetic(a); }

inline View view(const Tensor& t) {
  View v{t.data_ptr(), to_dtype(t.scalar_type())};
  const int64_t ndim = t.dim();
  if (ndim == 3) v.stride_b = t.stride(0);
  if (ndim >= 2) v.stride_n = t.stride(ndim - 2);
  return v;
}
inline View view(const MaybeTensor& t) { return t ? view(*t) : View{}; }

// An output that may not be wanted: made on request, None otherwise. `on` makes it: on.empty(ndim, sizes, strides, dtype).
struct Output {
  MaybeTensor tensor;
  View view;

  Output() = default;
  template <class On>
  Output(const On& on, bool wanted, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    if (!wanted) return;
    const int64_t ndim = static_cast<int64_t>(sizes.size());
    int64_t strides[3];
    for (int64_t i = ndim, step = 1; i-- > 0; step *= sizes.begin()[i]) strides[i] = step;
    tensor = on.empty(ndim, sizes.begin(), strides, dtype);
    view = mpvg::view(*tensor);
  }
};

// A new tensor, uninitialised. (aoti_torch_empty_strided costs a third of stable::empty.)
inline Tensor empty_on(int32_t device_type, int32_t device, int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      ndim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device, &handle));
  return Tensor(handle);
}

// What a forward returns: its result and what else was wanted.
using Outputs = std::tuple<Tensor, MaybeTensor, MaybeTensor, MaybeTensor>;

// pe_chain's gradients: of pos, the weights and the biases.
using ChainGrads = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor>;

// The gradients that grad_mask asks for, each in its input's shape and dtype.
struct GradOutputs {
  Output x, branch, weight, bias, pos, pos_weight, pos_bias;

  template <class On>
  GradOutputs(const On& on, const Shape& s, int64_t mask, ScalarType x_dtype, ScalarType branch_dtype, const Tensor& weight_D,
              const MaybeTensor& pos_ND, const MaybeTensor& pos_weight_D)
      : x(on, mask & kX, {s.B, s.N, s.D}, x_dtype),
        branch(on, mask & kBranch, {s.B, s.N, s.D}, branch_dtype),
        weight(on, mask & kWeight, {s.D}, weight_D.scalar_type()),
        bias(on, mask & kBias, {s.D}, weight_D.scalar_type()) {
    if (!pos_ND) return;
    pos = Output(on, mask & kPos, {s.N - s.prefix, s.D}, pos_ND->scalar_type());
    if (!pos_weight_D) return;
    pos_weight = Output(on, mask & kPosWeight, {s.D}, pos_weight_D->scalar_type());
    pos_bias = Output(on, mask & kPosBias, {s.D}, pos_weight_D->scalar_type());
  }
  Gradients views() const { return {x.view, branch.view, weight.view, bias.view, pos.view, pos_weight.view, pos_bias.view}; }
  auto tensors() const {
    return std::make_tuple(x.tensor, branch.tensor, weight.tensor, bias.tensor, pos.tensor, pos_weight.tensor, pos_bias.tensor);
  }
};
using Grads = decltype(std::declval<GradOutputs>().tensors());

}  // namespace mpvg
