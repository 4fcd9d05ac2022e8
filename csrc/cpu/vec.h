// Vec<T>: two SIMD registers of float or double, and its loads and stores from and to fp32, bf16, fp16, fp64.
//
// Built on the vector extension that GCC and Clang share, so that one source serves every instruction set; MPVG_VECTOR_BYTES is the
// register's width. A Vec is two registers because the 32 elements of two AVX-512 registers fill one in bf16, and because that halves
// the loops' overhead. Intrinsics are used where the extension has no word for a thing (fused multiply-add, fp16 conversion, AVX512-BF16,
// streaming stores) or GCC a bad translation (sums across a register, widening).
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
  MPVG_INLINE explicit Vec(T s) : a(s - reg<T>{}), b(s - reg<T>{}) {}  // s - 0 is s, which s + 0 is not: it would be computed
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
MPVG_INLINE reg<float> fma_reg(reg<float> x, reg<float> y, reg<float> z) {
  return (reg<float>)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
}
MPVG_INLINE reg<double> fma_reg(reg<double> x, reg<double> y, reg<double> z) {
  return (reg<double>)_mm512_fmadd_pd((__m512d)x, (__m512d)y, (__m512d)z);
}
#elif MPVG_VECTOR_BYTES == 32
MPVG_INLINE reg<float> fma_reg(reg<float> x, reg<float> y, reg<float> z) {
  return (reg<float>)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
}
MPVG_INLINE reg<double> fma_reg(reg<double> x, reg<double> y, reg<double> z) {
  return (reg<double>)_mm256_fmadd_pd((__m256d)x, (__m256d)y, (__m256d)z);
}
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

// A register's elements in a 16-bit format.
using bits16 = reg<uint16_t, kHalf>;

#if MPVG_VECTOR_BYTES == 64
MPVG_INLINE reg<uint32_t> widen_bits(bits16 v) { return (reg<uint32_t>)_mm512_cvtepu16_epi32((__m256i)v); }
#elif MPVG_VECTOR_BYTES == 32
MPVG_INLINE reg<uint32_t> widen_bits(bits16 v) { return (reg<uint32_t>)_mm256_cvtepu16_epi32((__m128i)v); }
#else
MPVG_INLINE reg<uint32_t> widen_bits(bits16 v) { return __builtin_convertvector(v, reg<uint32_t>); }
#endif

// bf16 is the upper half of an fp32.
MPVG_INLINE reg<float> widen(bits16 v, bf16) { return (reg<float>)(widen_bits(v) << 16); }

MPVG_INLINE bits16 narrow(reg<float> v, bf16) {
#ifdef MPVG_AVX512_BF16
  return (bits16)_mm512_cvtneps_pbh((__m512)v);  // takes subnormal fp32 as zero: values below 1.2e-38
#else
  const reg<uint32_t> u = (reg<uint32_t>)v, nan = (reg<uint32_t>)(v != v);
  const reg<uint32_t> even = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  return __builtin_convertvector((even & ~nan) | (quiet & nan), bits16);
#endif
}

#if MPVG_VECTOR_BYTES == 64
MPVG_INLINE reg<float> widen(bits16 v, f16) { return (reg<float>)_mm512_cvtph_ps((__m256i)v); }
MPVG_INLINE bits16 narrow(reg<float> v, f16) { return (bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif MPVG_VECTOR_BYTES == 32
MPVG_INLINE reg<float> widen(bits16 v, f16) { return (reg<float>)_mm256_cvtph_ps((__m128i)v); }
MPVG_INLINE bits16 narrow(reg<float> v, f16) { return (bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// Exponent and mantissa moved into place are the value times 2^-112, subnormals included; exponent 31 is inf or NaN.
MPVG_INLINE reg<float> widen(bits16 v, f16) {
  const reg<uint32_t> u = widen_bits(v);
  const reg<uint32_t> magnitude = (u & 0x7fff) << 13, special = (reg<uint32_t>)(magnitude >= 0x0f800000u);
  const reg<uint32_t> scaled = (reg<uint32_t>)((reg<float>)magnitude * 0x1p112f);
  return (reg<float>)(((u & 0x8000) << 16) | scaled | (special & 0x7f800000));
}
// Normal results: rebias the exponent and round as for bf16; a carry into exponent 31 is inf, as it should be. Subnormal ones: adding 0.5,
// whose ulp is fp16's smallest step, lets the FPU round and leaves the result in the low bits.
MPVG_INLINE bits16 narrow(reg<float> v, f16) {
  const reg<uint32_t> u = (reg<uint32_t>)v, sign = u & 0x80000000u, x = u ^ sign;
  const reg<uint32_t> tiny = (reg<uint32_t>)(x < 0x38800000u), over = (reg<uint32_t>)(x >= 0x47800000u), nan = (reg<uint32_t>)(v != v);
  const reg<uint32_t> subnormal = (reg<uint32_t>)((reg<float>)x + 0.5f) - 0x3f000000u;
  const reg<uint32_t> normal = (x - 0x38000000u + 0xfff + ((x >> 13) & 1)) >> 13;
  const reg<uint32_t> finite = (subnormal & tiny) | (normal & ~tiny);
  const reg<uint32_t> bits = (finite & ~over) | (over & (0x7c00u | (nan & 0x200u)));
  return __builtin_convertvector(bits | (sign >> 16), bits16);
}
#endif

template <class E>
MPVG_INLINE reg<float> load_half(const E* p) {
  return widen(load_reg<uint16_t, kHalf>(p), E{});
}
template <class E>
MPVG_INLINE void store_half(E* p, reg<float> v) {
  store_reg<uint16_t, kHalf>(p, narrow(v, E{}));
}

// A Vec<float> in a 16-bit format: one register.
template <class E>
MPVG_INLINE reg<uint16_t> stored(Vec<float> v) {
  struct {
    bits16 a, b;
  } both = {narrow(v.a, E{}), narrow(v.b, E{})};
#if MPVG_VECTOR_BYTES == 64
  return (reg<uint16_t>)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)both.a), (__m256i)both.b, 1);
#else
  return load_reg<uint16_t, MPVG_VECTOR_BYTES>(&both);
#endif
}
#ifdef MPVG_AVX512_BF16
template <>
MPVG_INLINE reg<uint16_t> stored<bf16>(Vec<float> v) {
  return (reg<uint16_t>)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a);
}
#endif

// ---- a whole Vec, and the n < lanes elements that end a row ----

struct Whole {};
struct Part {
  int64_t n;
};

template <class T, class E>
MPVG_INLINE Vec<T> load(const E* p, Whole = {}) {
#if MPVG_VECTOR_BYTES == 64
  if constexpr (__is_same(E, bf16)) {  // a permutation into the upper halves: one instruction a register, where widen() takes two
    const reg<uint32_t> place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const auto bits = (__m512i)load_reg<uint16_t, MPVG_VECTOR_BYTES>(p);
    return {(reg<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(place << 16), bits),
            (reg<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)((place + 16) << 16), bits)};
  }
#endif
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
  if constexpr (sizeof(E) == sizeof(T)) {
    store_half(p, v.a);
    store_half(p + Vec<T>::half, v.b);
  } else {
    store_reg<uint16_t, MPVG_VECTOR_BYTES>(p, stored<E>(v));
  }
}
template <class T, class E>
MPVG_INLINE void store(E* p, Vec<T> v, Part part) {
  E whole[Vec<T>::lanes];
  store(whole, v);
  __builtin_memcpy(p, whole, part.n * sizeof(E));
}

// The same past the caches, without reading what is overwritten. p must be aligned to a register; end_stream() before other threads look.
#ifdef MPVG_X86
#if MPVG_VECTOR_BYTES == 64
MPVG_INLINE void stream_reg(void* p, reg<int64_t> v) { _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v); }
#elif MPVG_VECTOR_BYTES == 32
MPVG_INLINE void stream_reg(void* p, reg<int64_t> v) { _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v); }
#else
MPVG_INLINE void stream_reg(void* p, reg<int64_t> v) { _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v); }
#endif
#else
MPVG_INLINE void stream_reg(void* p, reg<int64_t> v) { store_reg<int64_t, MPVG_VECTOR_BYTES>(p, v); }
#endif
template <class T, class E>
MPVG_INLINE void stream(E* p, Vec<T> v) {
  if constexpr (sizeof(E) == sizeof(T)) {
    stream_reg(p, (reg<int64_t>)v.a);
    stream_reg(p + Vec<T>::half, (reg<int64_t>)v.b);
  } else {
    stream_reg(p, (reg<int64_t>)stored<E>(v));
  }
}
MPVG_INLINE void end_stream() {
#ifdef MPVG_X86
  _mm_sfence();
#endif
}

// A store to a large output.
template <class T, class E>
MPVG_INLINE void put(E* p, Vec<T> v, Whole, bool streaming) {
  streaming ? stream(p, v) : store(p, v);
}
template <class T, class E>
MPVG_INLINE void put(E* p, Vec<T> v, Part part, bool) {
  store(p, v, part);
}

// Asks for n elements from p on to be brought into L2.
template <int64_t n, class E>
MPVG_INLINE void prefetch(const E* p) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(E)) __builtin_prefetch(p + i, 0, 2);
}

// v rounded to the 16-bit format E
template <class E>
MPVG_INLINE Vec<float> rounded(Vec<float> v) {
  return {widen(narrow(v.a, E{}), E{}), widen(narrow(v.b, E{}), E{})};
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

// ---- sums over rows ----

// The sum of a register's lanes. Whatever the instruction set, halves are added until 8 lanes (or fewer) are left, then lanes two apart,
// then neighbours, then the two 4s.
template <class T>
MPVG_INLINE T lane_sum(reg<T> v) {
  T t[Vec<T>::half];
  store_half(t, v);
  for (int64_t n = Vec<T>::half / 2; n; n /= 2)
    for (int64_t i = 0; i < n; ++i) t[i] += t[i + n];
  return t[0];
}
#ifdef MPVG_X86
MPVG_INLINE float quad_sum(__m128 q) {  // (0 + 2) + (1 + 3)
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
template <>
MPVG_INLINE float lane_sum<float>(reg<float> v) {
#if MPVG_VECTOR_BYTES == 64
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif MPVG_VECTOR_BYTES == 32
  const __m256 h = (__m256)v;
#endif
#if MPVG_VECTOR_BYTES >= 32
  return quad_sum(_mm256_castps256_ps128(h)) + quad_sum(_mm256_extractf128_ps(h, 1));
#else
  return quad_sum((__m128)v);
#endif
}
#endif

// A value for each of R rows.
template <class T, int R>
struct PackOf {
  typedef T type __attribute__((vector_size(R * sizeof(T))));
};
template <class T>
struct PackOf<T, 1> {
  using type = T;
};
template <class T, int R>
using pack = typename PackOf<T, R>::type;

MPVG_INLINE float at(float v, int) { return v; }
MPVG_INLINE double at(double v, int) { return v; }
template <class P>
MPVG_INLINE auto at(P v, int r) {
  return v[r];
}
MPVG_INLINE void set(float& v, int, float x) { v = x; }
MPVG_INLINE void set(double& v, int, double x) { v = x; }
template <class P, class T>
MPVG_INLINE void set(P& v, int r, T x) {
  v[r] = x;
}

// f(r) for r < R, spelled out from the start: GCC keeps arrays in memory that it first sees in a loop.
template <int R, class F>
MPVG_INLINE void each_row(F f) {
  if constexpr (R > 1) each_row<R - 1>(f);
  if constexpr (R > 0) f(R - 1);
}

#ifdef MPVG_X86
MPVG_INLINE pack<float, 4> square_root(pack<float, 4> x) { return (pack<float, 4>)_mm_sqrt_ps((__m128)x); }
#endif
template <class P>
MPVG_INLINE auto square_root(P x) -> decltype(x[0], P(x)) {
  for (unsigned r = 0; r < sizeof(P) / sizeof(x[0]); ++r) x[r] = __builtin_sqrt(x[r]);
  return x;
}

// The lane sums of R registers, each by the same additions as lane_sum: a row's result does not depend on its company.
template <class T, int R>
MPVG_INLINE pack<T, R> lane_sums(const reg<T>* v) {
#if MPVG_VECTOR_BYTES == 64
  if constexpr (R == 4 && sizeof(T) == 4) {  // transposed on the way: 19 instructions instead of 40
    __m256 h[4];
    each_row<4>([&](int r) MPVG_LAMBDA { h[r] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[r]), _mm512_extractf32x8_ps((__m512)v[r], 1)); });
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(h[0], h[1]), _mm256_unpackhi_ps(h[0], h[1]));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(h[2], h[3]), _mm256_unpackhi_ps(h[2], h[3]));
    const __m256 abcd = (__m256)_mm256_add_ps((__m256)_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd),
                                              (__m256)_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd));
    return (pack<T, R>)_mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  }
#endif
  pack<T, R> sums{};
  each_row<R>([&](int r) MPVG_LAMBDA { set(sums, r, lane_sum<T>(v[r])); });
  return sums;
}

// A running sum, lane by lane: two chains of additions, which overlap.
template <class T>
struct Sum {
  Vec<T> lanes;
  MPVG_INLINE Sum() : lanes(T(0)) {}  // spelled out: GCC compiles implicit members for the default target
  MPVG_INLINE void add(Vec<T> x) { lanes = lanes + x; }
  MPVG_INLINE void add_product(Vec<T> x, Vec<T> y) { lanes = fma(x, y, lanes); }
  MPVG_INLINE T total() const { return lane_sum<T>(lanes.a + lanes.b); }
};
template <class T, int R>
MPVG_INLINE pack<T, R> totals(const Sum<T> (&s)[R]) {
  reg<T> lanes[R];
  each_row<R>([&](int r) MPVG_LAMBDA { lanes[r] = s[r].lanes.a + s[r].lanes.b; });
  return lane_sums<T, R>(lanes);
}

// s += v and ss += v * v, for a Vec of a row of dtype E: one that lies in memory, or one on its way there.
template <class T, class E, class Size>
MPVG_INLINE void add_moments(Sum<T>& s, Sum<T>& ss, const E* p, Size size) {
  const Vec<T> v = load<T>(p, size);
  s.add(v), ss.add_product(v, v);
}
template <class E, class T>
MPVG_INLINE void add_moments(Sum<T>& s, Sum<T>& ss, Vec<T> v) {
  if constexpr (sizeof(E) == 2) v = rounded<E>(v);
  s.add(v), ss.add_product(v, v);
}
#ifdef MPVG_AVX512_BF16
// In pairs, without widening: the products are exact in fp32. Takes subnormal bf16 as zero.
MPVG_INLINE void add_moments(Sum<float>& s, Sum<float>& ss, reg<uint16_t> v) {
  const reg<uint16_t> one = reg<uint16_t>{} + uint16_t(0x3f80);
  s.lanes.a = (reg<float>)_mm512_dpbf16_ps((__m512)s.lanes.a, (__m512bh)v, (__m512bh)one);
  ss.lanes.a = (reg<float>)_mm512_dpbf16_ps((__m512)ss.lanes.a, (__m512bh)v, (__m512bh)v);
}
MPVG_INLINE void add_moments(Sum<float>& s, Sum<float>& ss, const bf16* p, Whole) {
  add_moments(s, ss, load_reg<uint16_t, MPVG_VECTOR_BYTES>(p));
}
template <>
MPVG_INLINE void add_moments<bf16>(Sum<float>& s, Sum<float>& ss, Vec<float> v) {
  add_moments(s, ss, stored<bf16>(v));
}
#endif

}  // namespace mpvg::MPVG_ISA
