// What the operators' CUDA side adds to ../host.h: scratch memory, and what the kernels can count to.
#pragma once

#include "../host.h"
#include "device.h"
#include "kernels.h"

namespace mpvg::cuda {

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

// Kernels count samples or layers, tokens and columns in 32 bits, and elements in 64.
inline void check_sizes(const char* name, int64_t B, int64_t N, int64_t D) {
  STD_TORCH_CHECK(std::max({B, N, D}) < int64_t(1) << 30, "mpvg: ", name, " of shape (", B, ", ", N, ", ", D,
                  ") has an axis of 2^30 or more, which the CUDA kernels do not count to; use the backend 'reference'");
}

// The shape of a call.
inline Shape shape_of(const Tensor& x, int64_t prefix) {
  const Shape shape{x.size(0), x.size(1), x.size(2), prefix};
  check_sizes("x", shape.B, shape.N, shape.D);
  return shape;
}

}  // namespace mpvg::cuda
