// The device side of a call as torch sees it: which device and stream, and memory on it. The only part of the operators that differs when
// tests run the kernels on the host (tests/cuda_host has a header of the same guard).
#ifndef MPVG_CUDA_DEVICE_H
#define MPVG_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../host.h"

#define MPVG_DISPATCH_KEY CUDA

namespace mpvg::cuda {

// Makes the tensor's device the current one for the length of a call, and knows torch's current stream on it.
struct OnDevice {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const torch::stable::Tensor& t) : index(t.get_device_index()), guard(index) {
    void* current;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  torch::stable::Tensor empty(int64_t ndim, const int64_t* sizes, const int64_t* strides, torch::headeronly::ScalarType dtype) const {
    return empty_on(aoti_torch_device_type_cuda(), index, ndim, sizes, strides, dtype);
  }
};

}  // namespace mpvg::cuda

#endif
