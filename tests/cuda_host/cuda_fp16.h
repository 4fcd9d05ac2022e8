// For tests: fp16 on the host, with the conversions that the kernels use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const int sign = v.bits >> 15, exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float f;
  if (exponent == 31) f = mantissa ? NAN : INFINITY;
  else if (exponent) f = std::ldexp(float(1024 + mantissa), exponent - 25);
  else f = std::ldexp(float(mantissa), -24);
  return sign ? -f : f;
}
// To nearest, ties to even: the default rounding of the addition to a number whose last bit weighs as much as the result's.
inline __half __float2half_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(f);
  if (f != f) return {0x7fff};
  if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
  const int exponent = magnitude < 6.103515625e-5f ? -14 : std::ilogb(magnitude);
  const float steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // 0 to 2048 units in the last place
  return {uint16_t(sign | uint16_t(int(steps) + (exponent + 14) * 1024))};
}
