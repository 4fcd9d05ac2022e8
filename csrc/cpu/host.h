// What the operators' CPU side adds to ../host.h: memory, and torch's thread pool.
#pragma once

#include "../host.h"
#include "kernels.h"

namespace mpvg {

struct OnCpu {
  Tensor empty(int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) const {
    return empty_on(aoti_torch_device_type_cpu(), 0, ndim, sizes, strides, dtype);
  }
};

inline void parallel_for(int64_t n, int64_t grain, Body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

// What the backward kernels count on; autograd never breaks it.
inline void check_stream_dtypes(const Tensor& h, const MaybeTensor& dh, ScalarType x_dtype, ScalarType branch_dtype) {
  STD_TORCH_CHECK(h.scalar_type() == promote(x_dtype, branch_dtype) && (!dh || dh->scalar_type() == h.scalar_type()),
                  "mpvg: h and dh must have the dtype that x_dtype and branch_dtype promote to");
}

}  // namespace mpvg
