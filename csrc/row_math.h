// The arithmetic of one LayerNorm row, shared by every backend that is written in C++.
//
// Notation:  v a row of width D;  m1 = mean(v);  c = v - m1;  m2 = mean(c);  vhat = (c - m2) * rstd.
// Why m1 and m2: m1 is rounded, so at a large common offset the residue m2 is not small against the row's own deviation. Taking it
// off again (and mean(c)^2 off mean(c^2)) costs one addition a term and holds where plain two-pass statistics do not.
//
// V is a scalar or a SIMD type with an fma(x, y, z) = x * y + z; T is its element. The includer sets MPVG_ISA, the namespace: code compiled
// for different instruction sets must not share a symbol, or the linker would be free to keep the one that the machine cannot run.
#pragma once

#ifndef MPVG_HD
#define MPVG_HD
#endif

namespace mpvg::MPVG_ISA {

// What normalises a row: m1 and rstd are saved for the backward, m2 it finds again.
template <class T>
struct Moments {
  T m1, m2, rstd;
};

// The correctly rounded root, in the type's own precision: a device has no cheap double.
MPVG_HD inline float square_root(float v) { return __builtin_sqrtf(v); }
MPVG_HD inline double square_root(double v) { return __builtin_sqrt(v); }

// From m1, sum(c) and sum(c^2), with inv_D = 1 / D. A NaN must pass the clamp, hence "var < 0" and not max().
template <class T>
MPVG_HD inline Moments<T> moments(T m1, T sum_c, T sum_cc, T inv_D, T eps) {
  const T m2 = sum_c * inv_D;
  const T var = sum_cc * inv_D - m2 * m2;
  return {m1, m2, T(1) / square_root((var < T(0) ? T(0) : var) + eps)};
}

// vhat = (v - m1) * rstd - m2 * rstd
template <class V, class T>
MPVG_HD inline V normalised(V v, Moments<T> m) {
  return fma(v - V(m.m1), V(m.rstd), V(-m.m2 * m.rstd));
}

// What the gradient of a row needs beside its moments: mean(g) and mean(g * vhat), g = dy * w.
template <class T>
struct GradMeans {
  T g, g_vhat;
};

// From sum(g) and sum(g * c):  mean(g * vhat) = rstd * (sum(g * c) - m2 * sum(g)) / D
template <class T>
MPVG_HD inline GradMeans<T> grad_means(Moments<T> m, T sum_g, T sum_gc, T inv_D) {
  return {sum_g * inv_D, m.rstd * (sum_gc - m.m2 * sum_g) * inv_D};
}

// dv = rstd * (g - mean(g) - vhat * mean(g * vhat))
template <class V, class T>
MPVG_HD inline V input_gradient(V g, V vhat, Moments<T> m, GradMeans<T> k) {
  return V(m.rstd) * fma(vhat, V(-k.g_vhat), g - V(k.g));
}

}  // namespace mpvg::MPVG_ISA
