// What the operators' CPU side adds to ../host.h: memory, and torch's thread pool.
#pragma once

#if __has_include(<pthread.h>)
#include <pthread.h>
#endif

#include "../host.h"
#include "kernels.h"

namespace mpvg {

struct OnCpu {
  Tensor empty(int64_t ndim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) const {
    return empty_on(aoti_torch_device_type_cpu(), 0, ndim, sizes, strides, dtype);
  }
};

// Whether this is a child forked from a process that had the kernels. A fork copies no threads, and with GNU's OpenMP torch's pool
// waits for those of the parent for ever: the child works alone, for the same results.
inline bool forked = false;
#if __has_include(<pthread.h>)
inline const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

inline void parallel_for(int64_t n, int64_t grain, Body body, void* context) {
  if (forked) return body(0, n, context);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

// What the backward kernels count on; autograd never breaks it.
inline void check_stream_dtypes(const Tensor& h, const MaybeTensor& dh, ScalarType x_dtype, ScalarType branch_dtype) {
  STD_TORCH_CHECK(h.scalar_type() == promote(x_dtype, branch_dtype) && (!dh || dh->scalar_type() == h.scalar_type()),
                  "mpvg: h and dh must have the dtype that x_dtype and branch_dtype promote to");
}

}  // namespace mpvg
