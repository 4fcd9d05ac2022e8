// What both operators do with rows: the first pass over a row, which brings it into L1 as T, and the loops that follow there.
//
// T is the dtype of the arithmetic: float, or double when everything is double. A row that is stored as T in a width that is a multiple
// of Vec<T>::lanes is used where it lies. All others (16-bit formats, residual sums, ragged widths) go into a buffer of a few rows, which
// stays in L1. So only first and last loads and stores know dtypes and ragged ends: buffered rows are padded to Dp, D rounded up to
// lanes, with values that add nothing to any sum.
#pragma once

namespace mpvg::MPVG_ISA {

// Rows that go through each pass together: so much time lies between a prefetch and its use, and the buffers stay in L1.
constexpr int kRows = 4;
// Rows longer than this the hardware prefetches better by itself (tried: at 3 KB, software prefetching costs 15 %; at 0.75 and 1.5 KB it
// saves 10 to 30 % of a call that reads from memory).
constexpr int64_t kPrefetchBytes = 1536;
// Rows that go through a loop together, R = 2 of the kRows: two chains of additions hide some of their latency, and w and dw are loaded
// once for both. Four run out of general registers for the rows' addresses (tried: a third of the instructions were then reloads).
template <int R>
struct Together {
  static constexpr int rows = R;
};

template <class T>
MPVG_INLINE int64_t padded(int64_t D) {
  return (D + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;
}
MPVG_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MPVG_INLINE int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
MPVG_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

// Memory of one call or one thread, uninitialised, aligned to a cache line, handed out in rows.
template <class T>
class Scratch {
 public:
  Scratch(int64_t rows, int64_t Dp) : memory(take_memory(rows * Dp * sizeof(T) + 64)), row(Dp) {
    next = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63));
  }
  ~Scratch() { give_memory(memory); }
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
template <>
struct Promote<None, None> {
  using type = float;
};

template <class T>
constexpr Dtype arithmetic_dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;

// Whether rows of `v` can be used where they lie.
template <class T>
MPVG_INLINE bool in_place(const View& v, int64_t D) {
  return bytes(v.dtype) == sizeof(T) && D % Vec<T>::lanes == 0;
}

// Whether a call writes its (B, N, D) outputs past the caches, and prefetches. Worth it when its (B, N, D) tensors together are more than
// the last-level cache will keep of them anyway: such stores save the reading of what they overwrite. Measured on one core of an EPYC
// with 32 MiB L3: 10 MB in all, 15 % slower; 14 MB, 25 % faster; 19 MB and more, 5 to 40 % faster.
constexpr int64_t kStreamBytes = 12 << 20;

struct Streaming {
  const Shape& shape;
  int64_t size = 0;
  bool aligned = true;

  MPVG_INLINE explicit Streaming(const Shape& shape) : shape(shape) {}
  MPVG_INLINE Streaming& reads(const View& v) {
    size += v ? shape.B * shape.N * shape.D * bytes(v.dtype) : 0;
    return *this;
  }
  MPVG_INLINE Streaming& writes(const View& v) {  // outputs are contiguous
    aligned = aligned && (!v || (reinterpret_cast<uintptr_t>(v.data) | (shape.D * bytes(v.dtype))) % MPVG_VECTOR_BYTES == 0);
    return reads(v);
  }
  MPVG_INLINE bool pays() const { return size > kStreamBytes && aligned; }
};

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

// scale[b], of any dtype, or 1 if there is no scale
template <class T>
MPVG_INLINE T scale_of(const View& scale, int64_t b) {
  if (!scale) return T(1);
  if (scale.dtype == Dtype::f64) return T(static_cast<const double*>(scale.data)[b]);
  float t[Vec<float>::lanes];
  with_dtype<float>(scale.dtype, [&](auto e) {
    store(t, load<float>(static_cast<const typename decltype(e)::type*>(scale.data) + b, Part{1}));
  });
  return T(t[0]);
}

// dst += src
template <class T>
MPVG_INLINE void add_row(T* dst, const T* src, int64_t Dp) {
  over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA { store(dst + i, load<T>(dst + i) + load<T>(src + i)); });
}

// f(r, Together<2>) for pairs of rows, f(r, Together<1>) for the odd one, and for all rows if D is ragged: only there do loops have ends.
template <class T, class F>
MPVG_INLINE void in_pairs(int rows, int64_t D, F f) {
  int r = 0;
  if (D % Vec<T>::lanes == 0)
    for (; r + 2 <= rows; r += 2) f(r, Together<2>{});
  for (; r < rows; ++r) f(r, Together<1>{});
}
template <int R, class T, class F>
MPVG_INLINE void over(int64_t D, F f) {
  if constexpr (R == 1) {
    over_row<T>(D, f);
  } else {
    over_padded<T>(D, [&](int64_t i) MPVG_LAMBDA { f(i, Whole{}); });
  }
}

// Loops over several rows keep what they need of each in registers: copies that no store can be suspected to change.
template <int R, class E>
struct Each {
  E of[R];
  MPVG_INLINE E& operator[](int r) { return of[r]; }
  MPVG_INLINE const E& operator[](int r) const { return of[r]; }
};
template <int R, class E>
MPVG_INLINE Each<R, E> each(const E* p) {
  Each<R, E> e;
  for (int r = 0; r < R; ++r) e[r] = p[r];
  return e;
}
// The same for rows of E, which is not known where they are chosen.
template <int R, class E>
MPVG_INLINE Each<R, E*> rows_of(void* const* p) {
  Each<R, E*> e;
  for (int r = 0; r < R; ++r) e[r] = static_cast<E*>(p[r]);
  return e;
}

// Rows that go together through a pass: of `pair` samples (2: b and b + 1; else 1) as many tokens from n on as fit, first both samples' row
// n, then both samples' row n + 1. So neighbours share what belongs to a token (its PE, its sum of dy), and each sample is read in order.
struct Block {
  int64_t b, n;
  int pair, rows;
  MPVG_INLINE int64_t b_of(int r) const { return b + (r & (pair - 1)); }
  MPVG_INLINE int64_t n_of(int r) const { return n + (r >> (pair - 1)); }
  // at[r]: what step_b a sample and step_n a token add up to at row r. For all kRows, so that it takes no loop.
  MPVG_INLINE void offsets(int64_t step_b, int64_t step_n, int64_t* at) const {
    const int64_t first = b * step_b + n * step_n, one = pair == 2 ? step_b : step_n, two = pair == 2 ? step_n : 2 * step_n;
    at[0] = first, at[1] = first + one, at[2] = first + two, at[3] = first + one + two;
  }
  MPVG_INLINE void pointers(const View& v, void** p) const {
    static_assert(kRows == 4, "offsets() spells four rows out");
    int64_t at[kRows];
    offsets(v.stride_b * bytes(v.dtype), v.stride_n * bytes(v.dtype), at);
    for (int r = 0; r < kRows; ++r) p[r] = v ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(v.data) + at[r]) : nullptr;
  }
  // Asks for the rows of v ahead of their use. Longer rows than these the hardware fetches better by itself.
  MPVG_INLINE void prefetch(const View& v, int64_t D) const {
    const int64_t size = D * bytes(v.dtype);
    if (!v || size > kPrefetchBytes) return;
    void* p[kRows];
    pointers(v, p);
    for (int r = 0; r < rows; ++r)
      for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(static_cast<const char*>(p[r]) + i);
  }
};

// ---- forward: h = x + s * f, its moments, y = hhat * w + t ----

// First pass over rows of the stream. h is rounded to its dtype and kept, unless its rows are null; sum[r] = sum(h), of h as stored. buffer
// is null if x is used in place.
template <class T, class X, class F>
void join_rows(int rows, T* buffer, void* const* x_rows, void* const* f_rows, void* const* h_rows, bool streaming, const T* scales,
               int64_t D, T* sum) {
  using H = typename Promote<X, F>::type;
  constexpr bool joined = !__is_same(F, None);
  using F_ = typename Promote<F, None>::type;  // F itself
  for (int r = 0; r < rows; ++r) {
    const X* x = static_cast<const X*>(x_rows[r]);
    const F_* f = static_cast<const F_*>(f_rows[r]);
    H* h = static_cast<H*>(h_rows[r]);
    T* v = buffer ? buffer + r * padded<T>(D) : nullptr;
    const Vec<T> s(scales[r]);
    Sum<T> total;
    over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
      Vec<T> v_i = load<T>(x + i, size);
      if constexpr (joined) {
        v_i = fma(s, load<T>(f + i, size), v_i);
        if (h) put(h + i, v_i, size, streaming);
        if constexpr (sizeof(H) == 2) v_i = rounded<H>(v_i);
      }
      total.add(v_i);
      if (v) store(v + i, v_i);
    });
    sum[r] = total.total();
  }
}

// The moments of rows, given their sums. Rows in a buffer are padded with m1, so that c is 0 there.
template <class T>
MPVG_INLINE void find_moments(int rows, const T* const* v_rows, T* buffer, const T* sum, int64_t D, T eps, Moments<T>* m) {
  const T inv_D = T(1) / T(D);
  const int64_t Dp = padded<T>(D);
  in_pairs<T>(rows, D, [&](int r0, auto together) MPVG_LAMBDA {
    constexpr int R = decltype(together)::rows;
    const auto v = each<R>(v_rows + r0);
    auto m1 = each<R>(sum + r0);
    Sum<T> s[R], ss[R];
    for (int r = 0; r < R; ++r) {
      m1[r] *= inv_D;
      for (int64_t i = D; buffer && i < Dp; ++i) buffer[(r0 + r) * Dp + i] = m1[r];
    }
    over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA {
      for (int r = 0; r < R; ++r) {
        const Vec<T> c = load<T>(v[r] + i) - Vec<T>(m1[r]);
        s[r].add(c);              // sum(c)
        ss[r].add_product(c, c);  // sum(c^2)
      }
    });
    for (int r = 0; r < R; ++r) m[r0 + r] = moments(m1[r], s[r].total(), ss[r].total(), inv_D, eps);
  });
}

// Last pass:  y = vhat * w + t
template <class T, class Y>
void affine_rows(int rows, void* const* y_rows, bool streaming, const T* const* v_rows, const Moments<T>* moments, const T* w,
                 const T* const* addends, int64_t D) {
  in_pairs<T>(rows, D, [&](int r0, auto together) MPVG_LAMBDA {
    constexpr int R = decltype(together)::rows;
    const auto y = rows_of<R, Y>(y_rows + r0);
    const auto v = each<R>(v_rows + r0), t = each<R>(addends + r0);
    const auto m = each<R>(moments + r0);
    over<R, T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
      for (int r = 0; r < R; ++r)
        put(y[r] + i, fma(normalised(load<T>(v[r] + i), m[r]), load<T>(w + i), load<T>(t[r] + i)), size, streaming);
    });
  });
}

// The joined stream, row by row, and its moments.
template <class T>
struct Stream {
  View x, f, h;
  int64_t D;
  bool direct;
  decltype(&join_rows<T, T, None>) join;

  Stream(const Inputs& in, const View& h) : x(in.x), f(in.branch), h(h), D(in.shape.D), direct(!f && in_place<T>(x, D)) {
    with_dtype<T>(x.dtype, [&](auto x_type) {
      with_optional_dtype<T>(f.dtype, [&](auto f_type) {
        join = join_rows<T, typename decltype(x_type)::type, typename decltype(f_type)::type>;
      });
    });
  }
  // The block's rows v, in place or in `buffer`, and their moments m.
  MPVG_INLINE void get(Block at, bool streaming, const T* s, T eps, T* buffer, const T** v, Moments<T>* m) const {
    void *x_rows[kRows], *f_rows[kRows], *h_rows[kRows];
    T sum[kRows];
    at.pointers(x, x_rows), at.pointers(f, f_rows), at.pointers(h, h_rows);
    if (direct) buffer = nullptr;
    join(at.rows, buffer, x_rows, f_rows, h_rows, streaming, s, D, sum);
    for (int r = 0; r < at.rows; ++r) v[r] = direct ? static_cast<const T*>(x_rows[r]) : buffer + r * padded<T>(D);
    find_moments(at.rows, v, buffer, sum, D, eps, m);
  }
};

// sum += vhat, over rows
template <class T>
MPVG_INLINE void add_normalised(int rows, T* sum, const T* const* v_rows, const Moments<T>* moments, int64_t Dp) {
  in_pairs<T>(rows, Dp, [&](int r0, auto together) MPVG_LAMBDA {
    constexpr int R = decltype(together)::rows;
    const auto v = each<R>(v_rows + r0);
    const auto m = each<R>(moments + r0);
    over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA {
      Vec<T> a = load<T>(sum + i);
      for (int r = 0; r < R; ++r) a = a + normalised(load<T>(v[r] + i), m[r]);
      store(sum + i, a);
    });
  });
}

// ---- backward: dv = s * (dh + rstd * (g - mean(g) - vhat * mean(g * vhat))), g = dy * w ----

// First pass over rows v (of dtype V) whose m1 and rstd are known: brings dy (of dtype G) and v into their buffers, unless these are null
// because rows are used in place; finds m2 and the means.
template <class T, class G, class V>
void find_grad_means(int rows, T* dy_buffer, void* const* dy_rows, T* v_buffer, void* const* v_rows, const T* w,
                     Moments<T>* moments, GradMeans<T>* means, int64_t D) {
  const T inv_D = T(1) / T(D);
  for (int r = 0; r < rows; ++r) {
    const G* dy = static_cast<const G*>(dy_rows[r]);
    const V* v = static_cast<const V*>(v_rows[r]);
    T* dy_out = dy_buffer ? dy_buffer + r * padded<T>(D) : nullptr;
    T* v_out = v_buffer ? v_buffer + r * padded<T>(D) : nullptr;
    const T m1 = moments[r].m1;
    Sum<T> s_c, s_g, s_gc;
    over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
      const Vec<T> dy_i = load<T>(dy + i, size), v_i = load<T>(v + i, size, m1);  // ends are padded so that c is 0
      const Vec<T> c = v_i - Vec<T>(m1), g = dy_i * load<T>(w + i);
      s_c.add(c);              // sum(c)
      s_g.add(g);              // sum(g)
      s_gc.add_product(g, c);  // sum(g * c)
      if (dy_out) store(dy_out + i, dy_i);
      if (v_out) store(v_out + i, v_i);
    });
    moments[r].m2 = s_c.total() * inv_D;
    means[r] = grad_means(moments[r], s_g.total(), s_gc.total(), inv_D);
  }
}
template <class T>
auto choose_grad_means(Dtype dy, Dtype v) {
  return with_dtype<T>(dy, [&](auto g_type) {
    return with_dtype<T>(v, [&](auto v_type) {
      return &find_grad_means<T, typename decltype(g_type)::type, typename decltype(v_type)::type>;
    });
  });
}

// Last pass: dv in its dtype, from dh (dtype DH, which may be None). The sums over rows may go along, if both are wanted:
// dw += dy * vhat;  sum += dy.
template <class T, class DV, class DH, bool Sums>
void input_gradients(int rows, void* const* dv_rows, bool streaming, void* const* dh_rows, const T* const* dy_rows, const T* w,
                     const T* const* v_rows, const Moments<T>* moments, const GradMeans<T>* means, const T* scales, T* dw, T* sum,
                     int64_t D) {
  constexpr bool has_dh = !__is_same(DH, None);
  using DH_ = typename Promote<DH, None>::type;
  in_pairs<T>(rows, D, [&](int r0, auto together) MPVG_LAMBDA {
    constexpr int R = decltype(together)::rows;
    const auto dv = rows_of<R, DV>(dv_rows + r0);
    const auto dh = rows_of<R, const DH_>(dh_rows + r0);
    const auto dy = each<R>(dy_rows + r0), v = each<R>(v_rows + r0);
    const auto m = each<R>(moments + r0);
    const auto k = each<R>(means + r0);
    const auto s = each<R>(scales + r0);
    over<R, T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
      Vec<T> dw_i, sum_i;
      if constexpr (Sums) dw_i = load<T>(dw + i), sum_i = load<T>(sum + i);
      for (int r = 0; r < R; ++r) {
        const Vec<T> dy_i = load<T>(dy[r] + i), vhat = normalised(load<T>(v[r] + i), m[r]);
        Vec<T> d = input_gradient(dy_i * load<T>(w + i), vhat, m[r], k[r]);
        if constexpr (has_dh) d = d + load<T>(dh[r] + i, size);
        put(dv[r] + i, Vec<T>(s[r]) * d, size, streaming);
        if constexpr (Sums) dw_i = fma(dy_i, vhat, dw_i), sum_i = sum_i + dy_i;
      }
      if constexpr (Sums) store(dw + i, dw_i), store(sum + i, sum_i);
    });
  });
}
template <class T, bool Sums = false>
auto choose_input_gradients(Dtype dv, Dtype dh) {
  return with_dtype<T>(dv, [&](auto v) {
    return with_optional_dtype<T>(dh, [&](auto h) {
      return &input_gradients<T, typename decltype(v)::type, typename decltype(h)::type, Sums>;
    });
  });
}

// The sums alone, either of which may be null.
template <class T>
MPVG_INLINE void accumulate(int rows, const T* const* dy, const T* const* v, const Moments<T>* m, T* dw, T* sum, int64_t Dp) {
  for (int r = 0; r < rows; ++r) {
    if (sum) add_row(sum, dy[r], Dp);
    if (!dw) continue;
    over_padded<T>(Dp, [&](int64_t i) MPVG_LAMBDA {
      store(dw + i, fma(load<T>(dy[r] + i), normalised(load<T>(v[r] + i), m[r]), load<T>(dw + i)));
    });
  }
}

}  // namespace mpvg::MPVG_ISA
