// The arithmetic of one LayerNorm row, shared by every backend that is written in C++.
//
// Notation:  v a row of width D;  m1 = mean(v);  c = v - m1;  m2 = mean(c);  vhat = (c - m2) * rstd.
// Why m1 and m2: m1 is rounded, so at a large common offset the residue m2 is not small against the row's own deviation. Taking it
// off again (and mean(c)^2 off mean(c^2)) costs one addition a term and holds where plain two-pass statistics do not.
//
// V is a scalar or a SIMD type with an fma(x, y, z) = x * y + z; T is its element. P is T, or a vector with an element for each of several
// rows, whose square_root() the includer brings. The includer sets MPVG_ISA, the namespace: code compiled for different instruction sets must not share a symbol, or the linker
// would be free to keep the one that the machine cannot run.
#pragma once

#ifndef MPVG_HD
#define MPVG_HD
#endif

namespace mpvg::MPVG_ISA {

// What normalises a row: the mean and rstd are saved for the backward, the split of the mean into m1 and m2 it finds again.
template <class P>
struct Moments {
  P m1, m2, rstd;
};

// Whether m1 = 0 will do: a row whose mean is at most its deviation loses nothing by sums over v itself, so that one pass finds its moments
// (m2 is then the mean). False for NaN, and where v^2 has overflowed. var is the row's own, without eps: a row may be flat against eps.
template <class T>
MPVG_HD inline bool centred(T mean, T var, T rstd) {
  return rstd > T(0) && mean * mean <= var;
}

// The correctly rounded root, in the type's own precision: a device has no cheap double.
MPVG_HD inline float square_root(float x) { return __builtin_sqrtf(x); }
MPVG_HD inline double square_root(double x) { return __builtin_sqrt(x); }

// From sum(c) / D = m2 and sum(c^2)
template <class P, class T>
MPVG_HD inline P variance(P m2, P sum_cc, T inv_D) {
  return sum_cc * inv_D - m2 * m2;
}

// From m1, sum(c) and sum(c^2), with inv_D = 1 / D. A NaN must pass the clamp, hence "var < 0" and not max().
template <class P, class T>
MPVG_HD inline Moments<P> moments(P m1, P sum_c, P sum_cc, T inv_D, T eps) {
  const P m2 = sum_c * inv_D;
  const P var = variance(m2, sum_cc, inv_D);
  return {m1, m2, T(1) / square_root((var < T(0) ? P{} : var) + eps)};
}

// vhat = (v - m1) * rstd - m2 * rstd
template <class V, class T>
MPVG_HD inline V normalised(V v, Moments<T> m) {
  return fma(v - V(m.m1), V(m.rstd), V(-m.m2 * m.rstd));
}

// What the gradient of a row needs beside its moments: mean(g) and mean(g * vhat), g = dy * w.
template <class P>
struct GradMeans {
  P g, g_vhat;
};

// From sum(g) and sum(g * c):  mean(g * vhat) = rstd * (sum(g * c) - m2 * sum(g)) / D
template <class P, class T>
MPVG_HD inline GradMeans<P> grad_means(Moments<P> m, P sum_g, P sum_gc, T inv_D) {
  return {sum_g * inv_D, m.rstd * (sum_gc - m.m2 * sum_g) * inv_D};
}

// dv = rstd * (g - mean(g) - vhat * mean(g * vhat))
template <class V, class T>
MPVG_HD inline V input_gradient(V g, V vhat, Moments<T> m, GradMeans<T> k) {
  return V(m.rstd) * fma(vhat, V(-k.g_vhat), g - V(k.g));
}

// The same from c, with the means worked in:  dv = rstd * (g - q + k * c)
template <class P>
struct GradRow {
  P q, k;
};
template <class P>
MPVG_HD inline GradRow<P> grad_row(Moments<P> m, GradMeans<P> means) {
  return {means.g - m.m2 * m.rstd * means.g_vhat, -m.rstd * means.g_vhat};
}

}  // namespace mpvg::MPVG_ISA
