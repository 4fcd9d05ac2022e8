// Vec<T>: two SIMD registers of float or double, and its loads and stores from and to fp32, bf16, fp16, fp64.
//
// Built on the vector extension that GCC and Clang share, so that one source serves every instruction set; MPVG_VECTOR_BYTES is the
// register's width. A Vec is two registers because the 32 elements of two AVX-512 registers fill one in bf16, and because that halves
// the loops' overhead. Intrinsics are used where the extension has no word for a thing: fused
// multiply-add, sums across a register, fp16 conversion (F16C), rounding to bf16 (AVX512-BF16).
//
// Compile with -ffp-contract=off: products are fused where fma() says so and nowhere else. Otherwise g = dy * w could be rounded in one
// loop and not in the next, and g - mean(g) of a constant row be a rounding error times rstd instead of 0.
#pragma once

#define MPVG_INLINE inline __attribute__((always_inline))
#define MPVG_LAMBDA __attribute__((always_inline))

namespace mpvg::MPVG_ISA {

// 16-bit storage formats; arithmetic is never done in them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T, int Bytes = MPVG_VECTOR_BYTES>
struct Register {
  typedef T type __attribute__((vector_size(Bytes)));
  typedef T unaligned __attribute__((vector_size(Bytes), aligned(1), may_alias));
};
template <class T, int Bytes = MPVG_VECTOR_BYTES>
using reg = typename Register<T, Bytes>::type;

template <class T, int Bytes, class P>
MPVG_INLINE reg<T, Bytes> load_reg(const P* p) {
  return *reinterpret_cast<const typename Register<T, Bytes>::unaligned*>(p);
}
template <class T, int Bytes, class P>
MPVG_INLINE void store_reg(P* p, reg<T, Bytes> v) {
  *reinterpret_cast<typename Register<T, Bytes>::unaligned*>(p) = v;
}

template <class T>
struct Vec {
  static constexpr int64_t half = MPVG_VECTOR_BYTES / sizeof(T);
  static constexpr int64_t lanes = 2 * half;
  reg<T> a, b;

  Vec() = default;
  MPVG_INLINE Vec(reg<T> a, reg<T> b) : a(a), b(b) {}
  MPVG_INLINE explicit Vec(T s) : a(reg<T>{} + s), b(reg<T>{} + s) {}
  MPVG_INLINE friend Vec operator+(Vec x, Vec y) { return {x.a + y.a, x.b + y.b}; }
  MPVG_INLINE friend Vec operator-(Vec x, Vec y) { return {x.a - y.a, x.b - y.b}; }
  MPVG_INLINE friend Vec operator*(Vec x, Vec y) { return {x.a * y.a, x.b * y.b}; }
};

// x * y + z, rounded once where the machine can
template <class R>
MPVG_INLINE R fma_reg(R x, R y, R z) {
  return x * y + z;
}
#if MPVG_VECTOR_BYTES == 64
MPVG_INLINE reg<float> fma_reg(reg<float> x, reg<float> y, reg<float> z) { return (reg<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z); }
MPVG_INLINE reg<double> fma_reg(reg<double> x, reg<double> y, reg<double> z) { return (reg<double>)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z); }
#elif MPVG_VECTOR_BYTES == 32
MPVG_INLINE reg<float> fma_reg(reg<float> x, reg<float> y, reg<float> z) { return (reg<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z); }
MPVG_INLINE reg<double> fma_reg(reg<double> x, reg<double> y, reg<double> z) { return (reg<double>)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z); }
#endif
template <class T>
MPVG_INLINE Vec<T> fma(Vec<T> x, Vec<T> y, Vec<T> z) {
  return {fma_reg(x.a, y.a, z.a), fma_reg(x.b, y.b, z.b)};
}

// ---- one register's worth of elements from memory, widened, and back, rounded to nearest even ----

constexpr int kHalf = MPVG_VECTOR_BYTES / 2;  // bytes that a register's elements take in a 16-bit format

MPVG_INLINE reg<float> load_half(const float* p) { return load_reg<float, MPVG_VECTOR_BYTES>(p); }
MPVG_INLINE reg<double> load_half(const double* p) { return load_reg<double, MPVG_VECTOR_BYTES>(p); }
MPVG_INLINE void store_half(float* p, reg<float> v) { store_reg<float, MPVG_VECTOR_BYTES>(p, v); }
MPVG_INLINE void store_half(double* p, reg<double> v) { store_reg<double, MPVG_VECTOR_BYTES>(p, v); }

// bf16 is the upper half of an fp32.
MPVG_INLINE reg<float> load_half(const bf16* p) {
  return (reg<float>)(__builtin_convertvector((load_reg<uint16_t, kHalf>(p)), reg<uint32_t>) << 16);
}

MPVG_INLINE void store_half(bf16* p, reg<float> v) {
#ifdef MPVG_AVX512_BF16
  // Takes subnormal fp32 as zero: values below 1.2e-38.
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const reg<uint32_t> u = (reg<uint32_t>)v, nan = (reg<uint32_t>)(v != v);
  const reg<uint32_t> even = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  store_reg<uint16_t, kHalf>(p, __builtin_convertvector((even & ~nan) | (quiet & nan), reg<uint16_t, kHalf>));
#endif
}

#if MPVG_VECTOR_BYTES == 64
MPVG_INLINE reg<float> load_half(const f16* p) {
  return (reg<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MPVG_INLINE void store_half(f16* p, reg<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif MPVG_VECTOR_BYTES == 32
MPVG_INLINE reg<float> load_half(const f16* p) {
  return (reg<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
MPVG_INLINE void store_half(f16* p, reg<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// fp16 -> fp32: exponent and mantissa moved into place are the value times 2^-112, subnormals included; exponent 31 is inf or NaN.
MPVG_INLINE reg<float> load_half(const f16* p) {
  const reg<uint32_t> u = __builtin_convertvector((load_reg<uint16_t, kHalf>(p)), reg<uint32_t>);
  const reg<uint32_t> magnitude = (u & 0x7fff) << 13, special = (reg<uint32_t>)(magnitude >= 0x0f800000u);
  const reg<uint32_t> scaled = (reg<uint32_t>)((reg<float>)magnitude * 0x1p112f);
  return (reg<float>)(((u & 0x8000) << 16) | scaled | (special & 0x7f800000));
}
// fp32 -> fp16, ties to even. Normal results: rebias the exponent and round as for bf16; a carry into exponent 31 is inf, as it should be.
// Subnormal ones: adding 0.5, whose ulp is fp16's smallest step, lets the FPU round and leaves the result in the low bits.
MPVG_INLINE void store_half(f16* p, reg<float> v) {
  const reg<uint32_t> u = (reg<uint32_t>)v, sign = u & 0x80000000u, x = u ^ sign;
  const reg<uint32_t> tiny = (reg<uint32_t>)(x < 0x38800000u), over = (reg<uint32_t>)(x >= 0x47800000u), nan = (reg<uint32_t>)(v != v);
  const reg<uint32_t> subnormal = (reg<uint32_t>)((reg<float>)x + 0.5f) - 0x3f000000u;
  const reg<uint32_t> normal = (x - 0x38000000u + 0xfff + ((x >> 13) & 1)) >> 13;
  const reg<uint32_t> finite = (subnormal & tiny) | (normal & ~tiny);
  const reg<uint32_t> bits = (finite & ~over) | (over & (0x7c00u | (nan & 0x200u)));
  store_reg<uint16_t, kHalf>(p, __builtin_convertvector(bits | (sign >> 16), reg<uint16_t, kHalf>));
}
#endif

// ---- a whole Vec, and the n < lanes elements that end a row ----

struct Whole {};
struct Part {
  int64_t n;
};

template <class T, class E>
MPVG_INLINE Vec<T> load(const E* p, Whole = {}) {
  return {load_half(p), load_half(p + Vec<T>::half)};
}
template <class T, class E>
MPVG_INLINE Vec<T> load(const E* p, Part part) {
  E whole[Vec<T>::lanes] = {};
  __builtin_memcpy(whole, p, part.n * sizeof(E));
  return load<T>(whole);
}
// The same with a pad other than 0.
template <class T, class E>
MPVG_INLINE Vec<T> load(const E* p, Whole, T) {
  return load<T>(p);
}
template <class T, class E>
MPVG_INLINE Vec<T> load(const E* p, Part part, T pad) {
  T whole[Vec<T>::lanes];
  store_half(whole, load<T>(p, part).a);
  store_half(whole + Vec<T>::half, load<T>(p, part).b);
  for (int64_t i = part.n; i < Vec<T>::lanes; ++i) whole[i] = pad;
  return load<T>(whole);
}
template <class T, class E>
MPVG_INLINE void store(E* p, Vec<T> v, Whole = {}) {
  store_half(p, v.a);
  store_half(p + Vec<T>::half, v.b);
}
template <class T, class E>
MPVG_INLINE void store(E* p, Vec<T> v, Part part) {
  E whole[Vec<T>::lanes];
  store(whole, v);
  __builtin_memcpy(p, whole, part.n * sizeof(E));
}

// v rounded to the 16-bit format E
template <class E, class T>
MPVG_INLINE Vec<T> rounded(Vec<T> v) {
  E e[Vec<T>::lanes];
  store(e, v);
  return load<T>(e);
}

// f(i) for each Vec of a padded row.
template <class T, class F>
MPVG_INLINE void over_padded(int64_t Dp, F f) {
  for (int64_t i = 0; i < Dp; i += Vec<T>::lanes) f(i);
}

// f(i, size) for each Vec of a row of n elements as tensors have them; size is Whole, or Part for what is left at the end.
template <class T, class F>
MPVG_INLINE void over_row(int64_t n, F f) {
  int64_t i = 0;
  for (; i + Vec<T>::lanes <= n; i += Vec<T>::lanes) f(i, Whole{});
  if (i < n) f(i, Part{n - i});
}

// ---- sums over a row ----

template <class T>
MPVG_INLINE T lane_sum(reg<T> v) {
  T t[Vec<T>::half];
  store_half(t, v);
  for (int64_t n = Vec<T>::half / 2; n; n /= 2)
    for (int64_t i = 0; i < n; ++i) t[i] += t[i + n];
  return t[0];
}
#ifdef MPVG_X86
template <>
MPVG_INLINE float lane_sum<float>(reg<float> v) {
#if MPVG_VECTOR_BYTES == 64
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif MPVG_VECTOR_BYTES == 32
  const __m256 h = (__m256)v;
#endif
#if MPVG_VECTOR_BYTES >= 32
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#else
  const __m128 q = (__m128)v;
#endif
  const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
#endif

// A running sum, lane by lane. One register: loops over several rows have several of them, which hides the latency of an addition.
template <class T>
struct Sum {
  reg<T> lanes = {};
  MPVG_INLINE void add(Vec<T> x) { lanes += x.a + x.b; }
  MPVG_INLINE void add_product(Vec<T> x, Vec<T> y) { lanes = fma_reg(x.b, y.b, fma_reg(x.a, y.a, lanes)); }
  MPVG_INLINE T total() const { return lane_sum<T>(lanes); }
};

}  // namespace mpvg::MPVG_ISA
