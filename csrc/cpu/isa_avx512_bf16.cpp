// The kernels for AVX-512 with its bf16 conversions (Intel Cooper Lake and Sapphire Rapids, AMD Zen 4, and later).
#include "kernels.h"

#ifdef MPVG_X86
#include <immintrin.h>

#define MPVG_ISA avx512_bf16
#define MPVG_VECTOR_BYTES 64
#define MPVG_AVX512_BF16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace mpvg {
extern const Kernels kernels_avx512_bf16 = avx512_bf16::table("avx512_bf16", []() -> bool {
  return __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
});
}  // namespace mpvg
#endif
