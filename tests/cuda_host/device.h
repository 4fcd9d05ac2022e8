// For tests: stands in for csrc/cuda/device.h, whose guard it takes, where the kernels run on the host. Tensors are the CPU's; new ones are
// filled with NaN patterns, so that what a kernel leaves unwritten shows.
#ifndef MPVG_CUDA_DEVICE_H
#define MPVG_CUDA_DEVICE_H

#include <cuda_runtime.h>

#include "../../csrc/host.h"

#define MPVG_DISPATCH_KEY CPU

namespace mpvg::cuda {

struct OnDevice {
  cudaStream_t stream = nullptr;

  explicit OnDevice(const torch::stable::Tensor&) {}

  torch::stable::Tensor empty(int64_t ndim, const int64_t* sizes, const int64_t* strides, torch::headeronly::ScalarType dtype) const {
    torch::stable::Tensor t = empty_on(aoti_torch_device_type_cpu(), 0, ndim, sizes, strides, dtype);
    if (const int64_t bytes = t.numel() * int64_t(t.element_size())) std::memset(t.data_ptr(), 0xff, size_t(bytes));
    return t;
  }
};

}  // namespace mpvg::cuda

#endif
