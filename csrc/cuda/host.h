// From torch's tensors to the launchers' plain arguments, through the stable ABI. Views, dtypes and gradient bits are the CPU side's.
#pragma once

#include "../cpu/host.h"
#include "device.h"
#include "kernels.h"

namespace mpvg::cuda {

// An output that may not be wanted: made on request, None otherwise.
struct Output {
  Tensor tensor;
  View view;

  Output() = default;
  Output(const OnDevice& on, bool wanted, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    if (!wanted) return;
    const int64_t ndim = static_cast<int64_t>(sizes.size());
    int64_t strides[3];
    for (int64_t i = ndim, step = 1; i-- > 0; step *= sizes.begin()[i]) strides[i] = step;
    tensor = on.empty(ndim, sizes.begin(), strides, dtype);
    view = mpvg::view(tensor);
  }
};

// The gradients that grad_mask asks for, each in its input's shape and dtype.
struct GradOutputs {
  Output x, branch, weight, bias, pos, pos_weight, pos_bias;

  GradOutputs(const OnDevice& on, const Shape& s, int64_t mask, ScalarType x_dtype, ScalarType branch_dtype, const Tensor& weight_D,
              const MaybeTensor& pos_ND, const MaybeTensor& pos_weight_D)
      : x(on, mask & kX, {s.B, s.N, s.D}, x_dtype),
        branch(on, mask & kBranch, {s.B, s.N, s.D}, branch_dtype),
        weight(on, mask & kWeight, {s.D}, weight_D.scalar_type()),
        bias(on, mask & kBias, {s.D}, weight_D.scalar_type()) {
    if (!pos_ND) return;
    pos = Output(on, mask & kPos, {s.N - s.prefix, s.D}, pos_ND->scalar_type());
    pos_weight = Output(on, mask & kPosWeight, {s.D}, pos_weight_D->scalar_type());
    pos_bias = Output(on, mask & kPosBias, {s.D}, pos_weight_D->scalar_type());
  }
  Gradients views() const { return {x.view, branch.view, weight.view, bias.view, pos.view, pos_weight.view, pos_bias.view}; }
  Grads tensors() const { return {x.tensor, branch.tensor, weight.tensor, bias.tensor, pos.tensor, pos_weight.tensor, pos_bias.tensor}; }
};

// Scratch memory as a tensor, which goes back to torch's allocator at the end of the call: later work on the stream may have it then.
struct ScratchTensor {
  const OnDevice& on;
  Tensor tensor;

  operator Scratch() {
    return {[](int64_t bytes, void* self) {
              auto* scratch = static_cast<ScratchTensor*>(self);
              const int64_t step = 1;
              scratch->tensor = scratch->on.empty(1, &bytes, &step, ScalarType::Byte);
              return scratch->tensor.data_ptr();
            },
            this};
  }
};

// The shape of a call. Kernels count samples, tokens and columns in 32 bits, and elements in 64.
inline Shape shape_of(const Tensor& x, int64_t prefix) {
  const Shape shape{x.size(0), x.size(1), x.size(2), prefix};
  STD_TORCH_CHECK(std::max({shape.B, shape.N, shape.D}) < int64_t(1) << 30, "mpvg: x of shape (", shape.B, ", ", shape.N, ", ", shape.D,
                  ") has an axis of 2^30 or more, which the CUDA kernels do not count to; use the backend 'reference'");
  return shape;
}

}  // namespace mpvg::cuda
