// What both operators do with rows: the first pass over a row, which brings it into L1 as T, and the loops that follow there.
//
// T is the dtype of the arithmetic: float, or double when everything is double. A row that is stored as T in a width that is a multiple
// of Vec<T>::lanes is used where it lies. All others (16-bit formats, residual sums, ragged widths) go into a buffer of a few rows, which
// stays in L1. So only first and last loads and stores know dtypes and ragged ends: buffered rows are padded to Dp, D rounded up to
// lanes, with values that add nothing to any sum.
#pragma once

namespace mpvg::MPVG_ISA {

// Rows that go through each loop together: their reductions are independent, which hides the latency of the sums across lanes, and
// what is added up over rows is loaded and stored once for all of them.
constexpr int kRows = 4;

template <class T>
MPVG_INLINE int64_t padded(int64_t D) {
  return (D + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;
}
MPVG_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MPVG_INLINE int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
MPVG_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

// Memory of one call or one thread: uninitialised, aligned to a cache line, handed out in rows.
template <class T>
class Scratch {
 public:
  Scratch(int64_t rows, int64_t Dp) : memory(__builtin_malloc(rows * Dp * sizeof(T) + 64)), row(Dp) {
    if (!memory) __builtin_trap();
    next = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63));
  }
  ~Scratch() { __builtin_free(memory); }
  Scratch(const Scratch&) = delete;
  T* take(int64_t rows = 1) {
    T* p = next;
    next += rows * row;
    return p;
  }

 private:
  void* memory;
  T* next;
  int64_t row;
};

// f(begin, end) over [0, n), split among threads where there is work for more than one: each gets at least 32k elements.
template <class F>
MPVG_INLINE void run_parallel(ParallelFor parallel_for, int64_t n, int64_t elements_each, F f) {
  const int64_t grain = 1 + 32768 / max(elements_each, 1);
  if (n > grain) return parallel_for(n, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<F*>(f))(begin, end); }, &f);
  if (n > 0) f(int64_t(0), n);
}

// Asks for `size` bytes at p before they are used; Write: for those about to be written.
template <bool Write = false>
MPVG_INLINE void prefetch(const void* p, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, Write, 3);
}

// ---- dtypes ----

template <class T>
struct Type {
  using type = T;
};
struct None {};

// f(Type<E>{}) for the E that `dtype` names. double arithmetic has nothing but double around it.
template <class T, class F>
MPVG_INLINE auto with_dtype(Dtype dtype, F f) {
  if constexpr (sizeof(T) == 8) {
    return f(Type<double>{});
  } else {
    if (dtype == Dtype::bf16) return f(Type<bf16>{});
    if (dtype == Dtype::f16) return f(Type<f16>{});
    return f(Type<float>{});
  }
}
// The same, with None for an absent tensor.
template <class T, class F>
MPVG_INLINE auto with_optional_dtype(Dtype dtype, F f) {
  return dtype == Dtype::absent ? f(Type<None>{}) : with_dtype<T>(dtype, f);
}

// The dtype of h = x + f.
template <class X, class F>
struct Promote {
  using type = float;
};
template <class X>
struct Promote<X, X> {
  using type = X;
};
template <class X>
struct Promote<X, None> {
  using type = X;
};

template <class T>
constexpr Dtype arithmetic_dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;

// Whether rows of `v` can be used where they lie.
template <class T>
MPVG_INLINE bool in_place(const View& v, int64_t D) {
  return bytes(v.dtype) == sizeof(T) && D % Vec<T>::lanes == 0;
}

// ---- a row as T, without more ----

// dst[0:D] = src[0:D], then zeros up to Dp
template <class T>
MPVG_INLINE void read_row(T* dst, const View& src, int64_t n, int64_t D) {
  with_dtype<T>(src.dtype, [&](auto e) {
    const auto* p = static_cast<const typename decltype(e)::type*>(src.at(0, n));
    over_row<T>(D, [&](int64_t i, auto size) { store(dst + i, load<T>(p + i, size)); });
  });
}
template <class T>
MPVG_INLINE void write_row(const View& dst, int64_t n, const T* src, int64_t D) {
  with_dtype<T>(dst.dtype, [&](auto e) {
    auto* p = static_cast<typename decltype(e)::type*>(dst.at(0, n));
    over_row<T>(D, [&](int64_t i, auto size) { store(p + i, load<T>(src + i), size); });
  });
}
template <class T>
MPVG_INLINE void zero_rows(T* dst, int64_t rows, int64_t Dp) {
  __builtin_memset(dst, 0, rows * Dp * sizeof(T));
}

// A vector of D parameters as T, padded with zeros; all zeros if it is absent.
template <class T>
T* parameter(Scratch<T>& scratch, const View& v, int64_t D) {
  T* p = scratch.take();
  v ? read_row(p, v, 0, D) : zero_rows(p, 1, padded<T>(D));
  return p;
}

// scale[b], or 1 if there is no scale
template <class T>
MPVG_INLINE T scale_of(const View& scale, int64_t b) {
  if (!scale) return T(1);
  T t[Vec<T>::lanes];
  read_row(t, {static_cast<char*>(scale.data) + b * bytes(scale.dtype), scale.dtype}, 0, 1);
  return t[0];
}

// dst += src
template <class T>
MPVG_INLINE void add_row(T* dst, const T* src, int64_t Dp) {
  over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA { store(dst + i, load<T>(dst + i) + load<T>(src + i)); });
}

// Loops over several rows keep what they need of each in registers: copies that no store can be suspected to change.
template <int R, class E>
struct Each {
  E of[R];
  MPVG_INLINE E operator[](int r) const { return of[r]; }
};
template <int R, class E>
MPVG_INLINE Each<R, E> each(const E* p) {
  Each<R, E> e;
  for (int r = 0; r < R; ++r) e.of[r] = p[r];
  return e;
}
template <int R, class E>
MPVG_INLINE Each<R, E*> row_pointers(const View& v, int64_t b, int64_t n) {
  Each<R, E*> e;
  for (int r = 0; r < R; ++r) e.of[r] = static_cast<E*>(v.at(b, n + r));
  return e;
}

// ---- forward: h = x + s * f, its moments, y = hhat * w + t ----

// R rows of the stream, n on, of sample b, first pass: h is rounded to its dtype; sum[r] = sum(h) of h as stored. `buffer` is null if x is
// used in place, h absent if it is not kept.
template <int R, class T, class X, class F>
MPVG_INLINE void join(T* buffer, int64_t Dp, const View& x_BND, const View& f_BND, const View& h_BND, int64_t b, int64_t n, T s, int64_t D, T* sum) {
  using H = typename Promote<X, F>::type;
  const auto x = row_pointers<R, const X>(x_BND, b, n);
  const auto f = row_pointers<R, const F>(f_BND, b, n);
  const auto h = row_pointers<R, H>(h_BND, b, n);
  const bool keep = bool(h_BND);
  Sum<T> sums[R];
  over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
    for (int r = 0; r < R; ++r) {
      Vec<T> v = load<T>(x[r] + i, size);
      if constexpr (!__is_same(F, None)) {
        v = fma(Vec<T>(s), load<T>(f[r] + i, size), v);
        if (keep) store(h[r] + i, v, size);
        if constexpr (sizeof(H) < sizeof(T)) v = rounded<H>(v);
      }
      sums[r].add(v);
      if (buffer) store(buffer + r * Dp + i, v);
    }
  });
  for (int r = 0; r < R; ++r) sum[r] = sums[r].total();
}

// Rows of the stream h, from x and the branch.
template <class T>
struct Stream {
  View x, f, h;
  int64_t D, Dp;
  bool direct;
  void (*join_rows)(int, T*, const Stream&, int64_t, int64_t, T, T*);

  Stream(const Inputs& in, const View& h)
      : x(in.x), f(in.branch), h(h), D(in.shape.D), Dp(padded<T>(D)), direct(!f && in_place<T>(x, D)) {
    with_dtype<T>(x.dtype, [&](auto x_type) {
      with_optional_dtype<T>(f.dtype, [&](auto f_type) {
        using X = typename decltype(x_type)::type;
        using F = typename decltype(f_type)::type;
        join_rows = [](int rows, T* buffer, const Stream& t, int64_t b, int64_t n, T s, T* sum) {
          if (rows == kRows) return join<kRows, T, X, F>(buffer, t.Dp, t.x, t.f, t.h, b, n, s, t.D, sum);
          for (int r = 0; r < rows; ++r)
            join<1, T, X, F>(buffer ? buffer + r * t.Dp : buffer, t.Dp, t.x, t.f, t.h, b, n + r, s, t.D, sum + r);
        };
      });
    });
  }
  // v[r], m[r]: row n + r of sample b, in place or in `buffer`, and its moments.
  MPVG_INLINE void get(int rows, int64_t b, int64_t n, T s, T eps, T* buffer, const T** v, Moments<T>* m) const {
    T sum[kRows];
    join_rows(rows, direct ? nullptr : buffer, *this, b, n, s, sum);
    for (int r = 0; r < rows; ++r) v[r] = direct ? static_cast<const T*>(x.at(b, n + r)) : buffer + r * Dp;
    find_moments(rows, v, direct ? nullptr : buffer, sum, D, Dp, eps, m);
  }
  MPVG_INLINE void prefetch_row(int64_t b, int64_t n) const {
    prefetch(x.at(b, n), D * bytes(x.dtype));
    if (f) prefetch(f.at(b, n), D * bytes(f.dtype));
    if (h) prefetch<true>(h.at(b, n), D * bytes(h.dtype));
  }
};

// The moments of R rows, given their sums. Rows in a buffer are padded with m1, so that c is 0 there.
template <int R, class T>
MPVG_INLINE void find_moments_of(const T* const* rows, T* buffer, const T* sum, int64_t D, int64_t Dp, T eps, Moments<T>* m) {
  const auto v = each<R>(rows);
  const T inv_D = T(1) / T(D);
  Sum<T> s[R], ss[R];
  T m1[R];
  for (int r = 0; r < R; ++r) {
    m1[r] = sum[r] * inv_D;
    for (int64_t i = D; buffer && i < Dp; ++i) buffer[r * Dp + i] = m1[r];
  }
  over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA {
    for (int r = 0; r < R; ++r) {
      const Vec<T> c = load<T>(v[r] + i) - Vec<T>(m1[r]);
      s[r].add(c);             // sum(c)
      ss[r].add_product(c, c);  // sum(c^2)
    }
  });
  for (int r = 0; r < R; ++r) m[r] = moments(m1[r], s[r].total(), ss[r].total(), inv_D, eps);
}
template <class T>
MPVG_INLINE void find_moments(int rows, const T* const* v, T* buffer, const T* sum, int64_t D, int64_t Dp, T eps, Moments<T>* m) {
  if (rows == kRows) return find_moments_of<kRows>(v, buffer, sum, D, Dp, eps, m);
  for (int r = 0; r < rows; ++r) find_moments_of<1>(v + r, buffer ? buffer + r * Dp : buffer, sum + r, D, Dp, eps, m + r);
}

// y = vhat * w + t, of rows n on of sample b
template <int R, class T, class Y>
MPVG_INLINE void affine(const View& y_BND, int64_t b, int64_t n, const T* const* rows, const Moments<T>* moments, const T* w,
                        const T* const* addends, int64_t D) {
  const auto y = row_pointers<R, Y>(y_BND, b, n);
  const auto v = each<R>(rows), t = each<R>(addends);
  const auto m = each<R>(moments);
  over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
    const Vec<T> w_i = load<T>(w + i);
    for (int r = 0; r < R; ++r) store(y[r] + i, fma(normalised(load<T>(v[r] + i), m[r]), w_i, load<T>(t[r] + i)), size);
  });
}
template <class T>
using Affine = void (*)(int, const View&, int64_t, int64_t, const T* const*, const Moments<T>*, const T*, const T* const*, int64_t);

template <class T>
Affine<T> find_affine(Dtype y) {
  return with_dtype<T>(y, [](auto y) -> Affine<T> {
    using Y = typename decltype(y)::type;
    return [](int rows, const View& y_BND, int64_t b, int64_t n, const T* const* v, const Moments<T>* m, const T* w, const T* const* t, int64_t D) {
      if (rows == kRows) return affine<kRows, T, Y>(y_BND, b, n, v, m, w, t, D);
      for (int r = 0; r < rows; ++r) affine<1, T, Y>(y_BND, b, n + r, v + r, m + r, w, t + r, D);
    };
  });
}

// sum += vhat, of R rows
template <int R, class T>
MPVG_INLINE void add_normalised(T* sum, const T* const* rows, const Moments<T>* moments, int64_t Dp) {
  const auto v = each<R>(rows);
  const auto m = each<R>(moments);
  over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA {
    Vec<T> a = load<T>(sum + i);
    for (int r = 0; r < R; ++r) a = a + normalised(load<T>(v[r] + i), m[r]);
    store(sum + i, a);
  });
}

// ---- backward: dv = s * (dh + rstd * (g - mean(g) - vhat * mean(g * vhat))), g = dy * w ----

// First pass over R rows v whose m1 and rstd are known: brings dy and v into their buffers (null: they are used in place), finds m2 and the
// means. dy and v point to the rows, in their dtypes.
template <int R, class T, class G, class V>
MPVG_INLINE void find_grad_means_of(T* dy_buffer, const void* const* dy_rows, T* v_buffer, const void* const* v_rows, const T* w,
                                    Moments<T>* moments, GradMeans<T>* k, int64_t D) {
  const int64_t Dp = padded<T>(D);
  const auto dy = each<R>(dy_rows), v = each<R>(v_rows);
  auto m = each<R>(moments);
  Sum<T> s_c[R], s_g[R], s_gc[R];
  over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
    const Vec<T> w_i = load<T>(w + i);
    for (int r = 0; r < R; ++r) {
      const Vec<T> dy_i = load<T>(static_cast<const G*>(dy[r]) + i, size);
      const Vec<T> v_i = load<T>(static_cast<const V*>(v[r]) + i, size, m[r].m1);  // padded with m1, so that c is 0 there
      const Vec<T> c = v_i - Vec<T>(m[r].m1), g = dy_i * w_i;
      s_c[r].add(c);             // sum(c)
      s_g[r].add(g);             // sum(g)
      s_gc[r].add_product(g, c);  // sum(g * c)
      if (dy_buffer) store(dy_buffer + r * Dp + i, dy_i);
      if (v_buffer) store(v_buffer + r * Dp + i, v_i);
    }
  });
  const T inv_D = T(1) / T(D);
  for (int r = 0; r < R; ++r) {
    moments[r].m2 = s_c[r].total() * inv_D;
    k[r] = grad_means(moments[r], s_g[r].total(), s_gc[r].total(), inv_D);
  }
}
template <class T>
using FindGradMeans = void (*)(int, T*, const void* const*, T*, const void* const*, const T*, Moments<T>*, GradMeans<T>*, int64_t);

template <class T>
FindGradMeans<T> find_grad_means(Dtype dy, Dtype v) {
  return with_dtype<T>(dy, [&](auto g) {
    return with_dtype<T>(v, [&](auto v) -> FindGradMeans<T> {
      using G = typename decltype(g)::type;
      using V = typename decltype(v)::type;
      return [](int rows, T* dy_buffer, const void* const* dy, T* v_buffer, const void* const* v, const T* w, Moments<T>* m, GradMeans<T>* k, int64_t D) {
        if (rows == kRows) return find_grad_means_of<kRows, T, G, V>(dy_buffer, dy, v_buffer, v, w, m, k, D);
        for (int r = 0; r < rows; ++r) {
          const int64_t at = r * padded<T>(D);
          find_grad_means_of<1, T, G, V>(dy_buffer ? dy_buffer + at : dy_buffer, dy + r, v_buffer ? v_buffer + at : v_buffer, v + r, w, m + r, k + r, D);
        }
      };
    });
  });
}

// Last pass: R rows dv, in their dtype. DH may be None.
template <int R, class T, class DV, class DH>
MPVG_INLINE void input_gradients(const View& dv_BND, const View& dh_BND, int64_t b, int64_t n, const T* const* dy_rows, const T* w,
                                 const T* const* v_rows, const Moments<T>* moments, const GradMeans<T>* means, T s, int64_t D) {
  const auto dv = row_pointers<R, DV>(dv_BND, b, n);
  const auto dh = row_pointers<R, const DH>(dh_BND, b, n);
  const auto dy = each<R>(dy_rows), v = each<R>(v_rows);
  const auto m = each<R>(moments);
  const auto k = each<R>(means);
  over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
    const Vec<T> w_i = load<T>(w + i);
    for (int r = 0; r < R; ++r) {
      const Vec<T> g = load<T>(dy[r] + i) * w_i;
      Vec<T> d = input_gradient(g, normalised(load<T>(v[r] + i), m[r]), m[r], k[r]);
      if constexpr (!__is_same(DH, None)) d = d + load<T>(dh[r] + i, size);
      store(dv[r] + i, Vec<T>(s) * d, size);
    }
  });
}
template <class T>
using InputGradients = void (*)(int, const View&, const View&, int64_t, int64_t, const T* const*, const T*, const T* const*, const Moments<T>*,
                                const GradMeans<T>*, T, int64_t);

template <class T>
InputGradients<T> find_input_gradients(Dtype dv, Dtype dh) {
  return with_dtype<T>(dv, [&](auto v) {
    return with_optional_dtype<T>(dh, [&](auto h) -> InputGradients<T> {
      using DV = typename decltype(v)::type;
      using DH = typename decltype(h)::type;
      return [](int rows, const View& dv, const View& dh, int64_t b, int64_t n, const T* const* dy, const T* w, const T* const* v,
                const Moments<T>* m, const GradMeans<T>* k, T s, int64_t D) {
        if (rows == kRows) return input_gradients<kRows, T, DV, DH>(dv, dh, b, n, dy, w, v, m, k, s, D);
        for (int r = 0; r < rows; ++r) input_gradients<1, T, DV, DH>(dv, dh, b, n + r, dy + r, w, v + r, m + r, k + r, s, D);
      };
    });
  });
}

// For R rows:  dw += dy * vhat;  sum[r * stride] += dy.  Either may be null. Stride 0 adds all R rows to one.
template <int R, class T>
MPVG_INLINE void accumulate_of(const T* const* dy_rows, const T* const* v_rows, const Moments<T>* moments, T* dw, T* sum, int64_t stride, int64_t Dp) {
  if (!dw && !sum) return;
  const auto dy = each<R>(dy_rows), v = each<R>(v_rows);
  const auto m = each<R>(moments);
  over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA {
    Vec<T> g[R];
    for (int r = 0; r < R; ++r) g[r] = load<T>(dy[r] + i);
    if (dw) {
      Vec<T> a = load<T>(dw + i);
      for (int r = 0; r < R; ++r) a = fma(g[r], normalised(load<T>(v[r] + i), m[r]), a);
      store(dw + i, a);
    }
    if (!sum) return;
    if (stride) {
      for (int r = 0; r < R; ++r) store(sum + r * stride + i, load<T>(sum + r * stride + i) + g[r]);
    } else {
      Vec<T> a = load<T>(sum + i);
      for (int r = 0; r < R; ++r) a = a + g[r];
      store(sum + i, a);
    }
  });
}
template <class T>
MPVG_INLINE void accumulate(int rows, const T* const* dy, const T* const* v, const Moments<T>* m, T* dw, T* sum, int64_t stride, int64_t Dp) {
  if (rows == kRows) return accumulate_of<kRows>(dy, v, m, dw, sum, stride, Dp);
  for (int r = 0; r < rows; ++r) accumulate_of<1>(dy + r, v + r, m + r, dw, sum ? sum + r * stride : sum, stride, Dp);
}

}  // namespace mpvg::MPVG_ISA
