// The kernels for AVX2 with FMA and F16C (Intel Haswell, AMD Zen, and later).
#include "kernels.h"

#ifdef MPVG_X86
#include <immintrin.h>

#define MPVG_ISA avx2
#define MPVG_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace mpvg {
extern const Kernels kernels_avx2 = avx2::table("avx2", []() -> bool {
  return __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");
});
}  // namespace mpvg
#endif
