// For tests: asynchronous copies on the host, as cuda_runtime.h here says.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  cuda_host::copy_async(to, from, size, zeros);
}
inline void __pipeline_commit() { cuda_host::copy_commit(); }
inline void __pipeline_wait_prior(size_t prior) { cuda_host::copy_wait(prior); }
