// What both operators do with rows: a first pass over a row, which finds its moments and brings it into L1, and a last one, which reads it
// there again and writes the results.
//
// T is the dtype of the arithmetic: float, or double when everything is double. Both passes read rows where they lie, in their own dtype:
// to widen 16-bit formats twice costs less than to store a copy as T in between. Only joined rows that stay nowhere else (h is not wanted,
// or streamed past the caches) go into a buffer of a few rows. Sums and tables, which the kernels make themselves, are T and padded to
// Dp, D rounded up to a multiple of Vec<T>::lanes; what lies in the pad is never written out.
#pragma once

namespace mpvg::MPVG_ISA {

// Rows that go together: their lane sums and moments cost half, their chains of additions overlap. Limited by the registers for sums and
// addresses.
constexpr int kTogether = MPVG_VECTOR_BYTES == 64 ? 4 : 2;
// `samples`: the same token of R samples, that is R streams of ascending addresses. They go through a loop side by side, so that what they
// share (weights, sums over the batch) is loaded once for all. Otherwise R tokens of one sample, which lie in one page of memory: they go
// row after row, since the hardware prefetches (and streams out) ascending addresses in a page, not four places at once. (Tried: side by
// side 1.2 to 2 times slower there, row after row 1.3 to 2 times slower for samples.)
template <int R, bool Samples>
struct Together {
  static constexpr int rows = R;
  static constexpr bool samples = Samples;
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

// The dtype of a branch's gradient where the stream is a V: F, which may be None. A stream in a 16-bit format has its branch's dtype; no
// code is made for what does not occur.
template <class T, class V, class F>
struct BranchOf {
  using type = V;
};
template <class T, class F>
struct BranchOf<T, T, F> {
  using type = F;
};
template <class T, class V>
struct BranchOf<T, V, None> {
  using type = None;
};
template <class T>
struct BranchOf<T, T, None> {
  using type = None;
};

template <class T>
constexpr Dtype arithmetic_dtype = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;

// Whether a call writes its (B, N, D) outputs past the caches. Worth it when its (B, N, D) tensors together are more than the last-level
// cache will keep of them anyway: such stores save the reading of what they overwrite. Measured on one core of an EPYC with 32 MiB L3: 10 MB
// in all, 15 % slower; 14 MB, 25 % faster; 19 MB and more, 5 to 40 % faster.
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
  MPVG_INLINE bool pays(int64_t from = kStreamBytes) const { return size > from && aligned; }
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
MPVG_INLINE void write_row(const View& dst, int64_t b, int64_t n, const T* src, int64_t D) {
  with_dtype<T>(dst.dtype, [&](auto e) {
    auto* p = static_cast<typename decltype(e)::type*>(dst.at(b, n));
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

// R rows of one tensor, `step` bytes apart: a token of R samples, or R tokens of a sample.
struct Rows {
  void* first = nullptr;
  int64_t step = 0;
  MPVG_INLINE void* operator[](int r) const { return static_cast<char*>(first) + r * step; }
  MPVG_INLINE Rows from(int r) const { return {first ? (*this)[r] : nullptr, step}; }
  MPVG_INLINE explicit operator bool() const { return first; }
};

// Which rows go together: R of them from sample b and token n on, along the samples or along the tokens.
struct Group {
  int64_t b, n;
  bool along_samples;
  MPVG_INLINE Rows of(const View& v) const {
    if (!v) return {};
    return {v.at(b, n), (along_samples ? v.stride_b : v.stride_n) * bytes(v.dtype)};
  }
  // The same in a table with one row for each token from `first_token` on.
  template <class T>
  MPVG_INLINE Rows of(T* table, int64_t first_token, int64_t Dp) const {
    return {const_cast<void*>(static_cast<const void*>(table + (n - first_token) * Dp)), along_samples ? 0 : Dp * int64_t(sizeof(T))};
  }
  MPVG_INLINE int64_t sample(int r) const { return along_samples ? b + r : b; }
  MPVG_INLINE int64_t token(int r) const { return along_samples ? n : n + r; }
};

// Calls step(group, Together) over tokens [n0, n1) of samples [b0, b1): samples in groups of kTogether, then those left over one by one,
// their tokens in groups. A group has its tokens on one side of `border`. After each group of samples, done(). Rows of ragged D go one by
// one: only then do loops have ends.
template <class T, class Step, class Done>
MPVG_INLINE void visit(int64_t b0, int64_t b1, int64_t n0, int64_t n1, int64_t border, int64_t D, Step step, Done done) {
  constexpr int R = kTogether;
  const bool grouped = D % Vec<T>::lanes == 0;
  int64_t b = b0;
  for (; grouped && b + R <= b1; b += R, done())
    for (int64_t n = n0; n < n1; ++n) step(Group{b, n, true}, Together<R, true>{});
  for (; b < b1; ++b, done())
    for (int64_t n = n0; n < n1;) {
      const int64_t end = n < border ? min(border, n1) : n1;
      for (; grouped && n + R <= end; n += R) step(Group{b, n, false}, Together<R, false>{});
      for (; n < end; ++n) step(Group{b, n, false}, Together<1, false>{});
    }
}

// f(i, size, r) for each Vec of R rows, side by side or row after row. Only rows that go alone have ragged ends.
template <class T, int R, bool SideBySide, class F>
MPVG_INLINE void over(int64_t D, F f) {
  if constexpr (R == 1) {
    over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA { f(i, size, 0); });
  } else if constexpr (SideBySide) {
    over_padded<T>(D, [&](int64_t i) MPVG_LAMBDA { each_row<R>([&](int r) MPVG_LAMBDA { f(i, Whole{}, r); }); });
  } else {
    each_row<R>([&](int r) MPVG_LAMBDA { over_padded<T>(D, [&](int64_t i) MPVG_LAMBDA { f(i, Whole{}, r); }); });
  }
}

// f(i, size) for each Vec of a row, or of R rows, which have no ragged ends.
template <class T, int R, class F>
MPVG_INLINE void over_whole(int64_t D, F f) {
  if constexpr (R == 1) over_row<T>(D, f);
  if constexpr (R > 1) over_padded<T>(D, [&](int64_t i) MPVG_LAMBDA { f(i, Whole{}); });
}

// Loops over several rows keep what they need of each in registers: copies that no store can be suspected to change.
template <int R, class E>
struct Each {
  E of[R ? R : 1];
  MPVG_INLINE E& operator[](int r) { return of[r]; }
  MPVG_INLINE const E& operator[](int r) const { return of[r]; }
};
template <int R, class E>
MPVG_INLINE Each<R, E> each(const E* p) {
  Each<R, E> e;
  for (int r = 0; r < R; ++r) e[r] = p[r];
  return e;
}
template <int R, class E>
MPVG_INLINE Each<R, E*> each(Rows rows) {
  Each<R, E*> e;
  for (int r = 0; r < R; ++r) e[r] = static_cast<E*>(rows[r]);
  return e;
}

// The moments of R rows.
template <class T, int R>
struct RowMoments : Moments<pack<T, R>> {
  bool all_centred;  // m1 = 0 for all of them
  MPVG_INLINE Moments<T> of(int r) const { return {at(this->m1, r), at(this->m2, r), at(this->rstd, r)}; }
  MPVG_INLINE RowMoments<T, 1> one(int r) const { return {of(r), of(r).m1 == T(0)}; }
  MPVG_INLINE void set_row(int r, Moments<T> m) { set(this->m1, r, m.m1), set(this->m2, r, m.m2), set(this->rstd, r, m.rstd); }
};

// c = v - m1, where m1 is not 0 by the row's moments
template <bool Centre, class T>
MPVG_INLINE Vec<T> centre(Vec<T> v, T m1) {
  if constexpr (Centre) return v - Vec<T>(m1);
  return v;
}

struct False {
  static constexpr bool value = false;
};
struct True {
  static constexpr bool value = true;
};
// f(Centre): whether any of the rows has an m1 to take off. For the others v - 0 is v, so a row's result does not depend on its company. A
// row that goes alone takes it off in any case: half the code.
template <class T, int R, class F>
MPVG_INLINE void by_centre(const RowMoments<T, R>& m, F f) {
  if constexpr (R == 1) f(True{});
  if constexpr (R > 1) __builtin_expect(m.all_centred, true) ? f(False{}) : f(True{});
}

// ---- forward: h = x + s * f, its moments, y = hhat * w + t ----

// Moments by a second pass over a row in L1, for a row that is not `centred`.
template <class T, class V>
__attribute__((noinline)) Moments<T> centred_moments(const V* v, T sum, int64_t D, T eps) {
  const T inv_D = T(1) / T(D), m1 = sum * inv_D;
  Sum<T> s, ss;
  over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
    const Vec<T> c = load<T>(v + i, size, m1) - Vec<T>(m1);  // ends are padded so that c is 0
    s.add(c);                                                // sum(c)
    ss.add_product(c, c);                                    // sum(c^2)
  });
  return moments(m1, s.total(), ss.total(), inv_D, eps);
}

// First pass over R rows of the stream: their moments. Joined rows are rounded to their dtype and stored: to h_rows, unless that is empty,
// and to v_rows, from which the next pass reads them, unless that is the same.
template <class T, class X, class F, int R, bool SideBySide>
void join_rows(Rows x_rows, Rows f_rows, Rows h_rows, Rows v_rows, bool streaming, const T* scales, int64_t D, T eps, RowMoments<T, R>& m) {
  using V = typename Promote<X, F>::type;
  constexpr bool joined = !__is_same(F, None);
  using F_ = typename Promote<F, None>::type;  // F itself
  const auto x = each<R, const X>(x_rows);
  const auto f = each<R, const F_>(f_rows);
  const auto h = each<R, V>(h_rows), v = each<R, V>(v_rows);
  const bool keep = bool(h_rows), buffered = v_rows.first != h_rows.first;
  Sum<T> s[R], ss[R];  // sum(v), sum(v^2)
  over<T, R, SideBySide>(D, [&](int64_t i, auto size, int r) MPVG_LAMBDA {
    if constexpr (joined) {
      const Vec<T> v_i = fma(Vec<T>(scales[r]), load<T>(f[r] + i, size), load<T>(x[r] + i, size));
      if (keep) put(h[r] + i, v_i, size, streaming);
      if (buffered) store(v[r] + i, v_i, size);
      add_moments<V>(s[r], ss[r], v_i);
    } else {
      add_moments(s[r], ss[r], x[r] + i, size);
    }
  });
  const T inv_D = T(1) / T(D);
  const pack<T, R> sum = totals<T, R>(s), sum_sq = totals<T, R>(ss);
  static_cast<Moments<pack<T, R>>&>(m) = moments(pack<T, R>{}, sum, sum_sq, inv_D, eps);
  const pack<T, R> var = variance(m.m2, sum_sq, inv_D);
  m.all_centred = true;
  each_row<R>([&](int r) MPVG_LAMBDA { m.all_centred &= centred(at(m.m2, r), at(var, r), at(m.rstd, r)); });
  for (int r = 0; !m.all_centred && r < R; ++r)
    if (!centred(at(m.m2, r), at(var, r), at(m.rstd, r))) m.set_row(r, centred_moments<T, V>(v[r], at(sum, r), D, eps));
}

// Last pass:  y = vhat * w + t, side by side
template <class T, class Y, class V, int R>
void affine_rows(Rows y_rows, bool streaming, Rows v_rows, const RowMoments<T, R>& m, const T* w, const T* t, int64_t D) {
  by_centre(m, [&](auto centring) MPVG_LAMBDA {
    constexpr bool Centre = centring.value;
    const auto y = each<R, Y>(y_rows);
    const auto v = each<R, const V>(v_rows);
    const auto m1 = m.m1, rstd = m.rstd, shift = -m.m2 * rstd;
    over_whole<T, R>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
      const Vec<T> w_i = load<T>(w + i), t_i = load<T>(t + i);
      each_row<R>([&](int r) MPVG_LAMBDA {
        const Vec<T> vhat = fma(centre<Centre>(load<T>(v[r] + i, size), at(m1, r)), Vec<T>(at(rstd, r)), Vec<T>(at(shift, r)));
        put(y[r] + i, fma(vhat, w_i, t_i), size, streaming);
      });
    });
  });
}

// A function for one row, and the same for groups of them, along the samples or the tokens.
template <class One, class Group>
struct ByRows {
  One one;
  Group samples, tokens;
  template <class Together>
  MPVG_INLINE auto with(Together) const {
    if constexpr (Together::rows == 1) return one;
    if constexpr (Together::rows > 1) return Together::samples ? samples : tokens;
  }
};
template <class One, class Group>
ByRows(One, Group, Group) -> ByRows<One, Group>;

template <class T>
auto choose_affine(Dtype y, Dtype v) {
  return with_dtype<T>(y, [&](auto y) {
    return with_dtype<T>(v, [&](auto v) {
      using Y = typename decltype(y)::type;
      using V = typename decltype(v)::type;
      return ByRows{&affine_rows<T, Y, V, 1>, &affine_rows<T, Y, V, kTogether>, &affine_rows<T, Y, V, kTogether>};
    });
  });
}

// The joined stream, some rows at a time, and its moments.
template <class T>
struct Stream {
  View x, f, h;
  Dtype dtype;  // of its rows
  int64_t D;
  ByRows<decltype(&join_rows<T, T, None, 1, false>), decltype(&join_rows<T, T, None, kTogether, false>)> join;

  Stream(const Inputs& in, const View& h)
      : x(in.x), f(in.branch), h(h), dtype(!f || f.dtype == x.dtype ? x.dtype : arithmetic_dtype<T>), D(in.shape.D) {
    with_dtype<T>(x.dtype, [&](auto x_type) {
      with_optional_dtype<T>(f.dtype, [&](auto f_type) {
        using X = typename decltype(x_type)::type;
        using F = typename decltype(f_type)::type;
        join = {&join_rows<T, X, F, 1, false>, &join_rows<T, X, F, kTogether, true>, &join_rows<T, X, F, kTogether, false>};
      });
    });
  }
  // The group's rows v, where they lie or, if h is not kept or is streamed out, in `buffer`; their moments in m.
  template <int R, bool Samples>
  MPVG_INLINE Rows get(Group at, Together<R, Samples> together, bool streaming, const T* s, T eps, T* buffer, RowMoments<T, R>& m) const {
    const Rows x_rows = at.of(x), h_rows = at.of(h);
    const Rows v = !f ? x_rows : h && !streaming ? h_rows : Rows{buffer, padded<T>(D) * int64_t(sizeof(T))};
    join.with(together)(x_rows, at.of(f), h_rows, v, streaming, s, D, eps, m);
    return v;
  }
};

// Saves mean and rstd of the group's rows, into (B, N) arrays. A negative rstd says that the mean has to be taken off the row first: the
// backward can't tell, as it does not know eps.
template <class T, int R>
MPVG_INLINE void save_moments(const RowMoments<T, R>& m, Group at_rows, int64_t N, T* mean, T* rstd) {
  each_row<R>([&](int r) MPVG_LAMBDA {
    const int64_t row = at_rows.sample(r) * N + at_rows.token(r);
    const Moments<T> own = m.of(r);
    const bool is_centred = own.m1 == T(0);
    mean[row] = is_centred ? own.m2 : own.m1, rstd[row] = is_centred ? own.rstd : -own.rstd;
  });
}
// The same back; m2 of rows with an m1 is still to be found.
template <class T, int R>
MPVG_INLINE RowMoments<T, R> saved_moments(Group at_rows, int64_t N, const T* mean, const T* rstd) {
  RowMoments<T, R> m;
  m.m1 = pack<T, R>{};
  m.all_centred = true;
  each_row<R>([&](int r) MPVG_LAMBDA {
    const int64_t row = at_rows.sample(r) * N + at_rows.token(r);
    set(m.m2, r, mean[row]), set(m.rstd, r, rstd[row]);
    m.all_centred &= rstd[row] > T(0);
  });
  for (int r = 0; !m.all_centred && r < R; ++r)
    if (const Moments<T> own = m.of(r); !(own.rstd > T(0))) m.set_row(r, {own.m2, T(0), -own.rstd});
  return m;
}

// sum += vhat, over R rows
template <class T, class V, int R>
void add_normalised(T* sum, Rows v_rows, const RowMoments<T, R>& m, int64_t D) {
  by_centre(m, [&](auto centring) MPVG_LAMBDA {
    constexpr bool Centre = centring.value;
    const auto v = each<R, const V>(v_rows);
    const auto m1 = m.m1, rstd = m.rstd, shift = -m.m2 * rstd;
    over_whole<T, R>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
      Vec<T> a = load<T>(sum + i);
      each_row<R>([&](int r) MPVG_LAMBDA {
        a = a + fma(centre<Centre>(load<T>(v[r] + i, size), at(m1, r)), Vec<T>(at(rstd, r)), Vec<T>(at(shift, r)));
      });
      store(sum + i, a);
    });
  });
}
template <class T>
auto choose_add_normalised(Dtype v) {
  return with_dtype<T>(v, [&](auto v) {
    using V = typename decltype(v)::type;
    return ByRows{&add_normalised<T, V, 1>, &add_normalised<T, V, kTogether>, &add_normalised<T, V, kTogether>};
  });
}

// ---- backward: dv = dh + rstd * (g - mean(g) - vhat * mean(g * vhat)), g = dy * w;  df = s * dv ----

// First pass over R rows v (of dtype V) whose mean and rstd are known, and their dy (of dtype G): the rest of their moments, and their means.
// dh, which only the last pass reads, is brought into L2 on the way. (Tried: into L1, or not at all, up to 1.15 times slower.)
template <class T, class G, class V, int R, bool SideBySide>
void find_grad_means(Rows dy_rows, Rows v_rows, Rows dh_rows, const T* w, RowMoments<T, R>& m, GradRow<pack<T, R>>& grad, int64_t D,
                     T inv_D) {
  by_centre(m, [&](auto centring) MPVG_LAMBDA {
    constexpr bool Centre = centring.value;
    const auto dy = each<R, const G>(dy_rows);
    const auto v = each<R, const V>(v_rows), dh = each<R, const V>(dh_rows);
    const bool has_dh = bool(dh_rows);
    const auto m1 = m.m1;
    Sum<T> s_c[R], s_g[R], s_gc[R];
    over<T, R, SideBySide>(D, [&](int64_t i, auto size, int r) MPVG_LAMBDA {
      const Vec<T> v_i = load<T>(v[r] + i, size, at(m1, r));  // ends are padded so that c is 0
      const Vec<T> c = centre<Centre>(v_i, at(m1, r)), g = load<T>(dy[r] + i, size) * load<T>(w + i);
      if (has_dh) prefetch<Vec<T>::lanes>(dh[r] + i);
      if constexpr (Centre) s_c[r].add(c);  // sum(c)
      s_g[r].add(g);                        // sum(g)
      s_gc[r].add_product(g, c);            // sum(g * c)
    });
    if constexpr (Centre) m.m2 = m1 == T(0) ? m.m2 : totals<T, R>(s_c) * inv_D;
    grad = grad_row<pack<T, R>>(m, grad_means<pack<T, R>>(m, totals<T, R>(s_g), totals<T, R>(s_gc), inv_D));
  });
}

template <class T>
auto choose_grad_means(Dtype dy, Dtype v) {
  return with_dtype<T>(dy, [&](auto g) {
    return with_dtype<T>(v, [&](auto v) {
      using G = typename decltype(g)::type;
      using V = typename decltype(v)::type;
      return ByRows{&find_grad_means<T, G, V, 1, false>, &find_grad_means<T, G, V, kTogether, true>,
                    &find_grad_means<T, G, V, kTogether, false>};
    });
  });
}

// Last pass, side by side: dv in the dtype of v, from dh of the same (if HasDh); df in its own, unless that is None. With Sums also
// dw += dy * vhat and sum += dy.
template <class T, class G, class V, class DF, bool HasDh, bool Sums, int R>
void input_gradients(Rows dv_rows, Rows df_rows, bool streaming, Rows dh_rows, Rows dy_rows, const T* w, Rows v_rows,
                     const RowMoments<T, R>& m, const GradRow<pack<T, R>>& grad, const T* scales, T* dw, T* sum, int64_t D) {
  constexpr bool has_df = !__is_same(DF, None);
  using DF_ = typename Promote<DF, None>::type;
  by_centre(m, [&](auto centring) MPVG_LAMBDA {
    constexpr bool Centre = centring.value;
    const auto dv = each<R, V>(dv_rows);
    const auto df = each<R, DF_>(df_rows);
    const auto dh = each<R, const V>(dh_rows), v = each<R, const V>(v_rows);
    const auto dy = each<R, const G>(dy_rows);
    const auto s = each<has_df ? R : 0>(scales);
    const auto m1 = m.m1, rstd = m.rstd, shift = -m.m2 * rstd, q = grad.q, k = grad.k;
    over_whole<T, R>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
      const Vec<T> w_i = load<T>(w + i);
      Vec<T> dw_i, sum_i;
      if constexpr (Sums) dw_i = load<T>(dw + i), sum_i = load<T>(sum + i);
      each_row<R>([&](int r) MPVG_LAMBDA {
        const Vec<T> dy_i = load<T>(dy[r] + i, size), c = centre<Centre>(load<T>(v[r] + i, size), at(m1, r)), scale(at(rstd, r));
        Vec<T> d = fma(c, Vec<T>(at(k, r)), dy_i * w_i - Vec<T>(at(q, r)));
        if constexpr (HasDh) d = fma(scale, d, load<T>(dh[r] + i, size));
        if constexpr (!HasDh) d = scale * d;
        put(dv[r] + i, d, size, streaming);
        if constexpr (has_df) put(df[r] + i, Vec<T>(s[r]) * d, size, streaming);
        if constexpr (Sums) dw_i = fma(dy_i, fma(c, scale, Vec<T>(at(shift, r))), dw_i), sum_i = sum_i + dy_i;
      });
      if constexpr (Sums) store(dw + i, dw_i), store(sum + i, sum_i);
    });
  });
}
template <class T, bool Sums>
struct InputGradients {
  decltype(&input_gradients<T, T, T, None, false, Sums, 1>) one;
  decltype(&input_gradients<T, T, T, None, false, Sums, kTogether>) group;

  InputGradients(Dtype dy, Dtype v, Dtype df, bool has_dh) {
    with_dtype<T>(dy, [&](auto g) {
      with_dtype<T>(v, [&](auto v) {
        with_optional_dtype<T>(df, [&](auto f) {
          using G = typename decltype(g)::type;
          using V = typename decltype(v)::type;
          using DF = typename BranchOf<T, V, typename decltype(f)::type>::type;
          if (has_dh) {
            one = &input_gradients<T, G, V, DF, true, Sums, 1>, group = &input_gradients<T, G, V, DF, true, Sums, kTogether>;
          } else {
            one = &input_gradients<T, G, V, DF, false, Sums, 1>, group = &input_gradients<T, G, V, DF, false, Sums, kTogether>;
          }
        });
      });
    });
  }
  // sum_rows: the same row for all samples, but one for each token unless their step is 0
  template <int R, bool Samples>
  MPVG_INLINE void operator()(Together<R, Samples>, Rows dv, Rows df, bool streaming, Rows dh, Rows dy, const T* w, Rows v,
                              const RowMoments<T, R>& m, const GradRow<pack<T, R>>& grad, const T* scales, T* dw, Rows sum, int64_t D) const {
    if constexpr (R > 1 && (Samples || !Sums)) {
      group(dv, df, streaming, dh, dy, w, v, m, grad, scales, dw, static_cast<T*>(sum.first), D);
    } else {
      for (int r = 0; r < R; ++r)
        one(dv.from(r), df.from(r), streaming, dh.from(r), dy.from(r), w, v.from(r), m.one(r), {at(grad.q, r), at(grad.k, r)},
            scales ? scales + r : nullptr, dw, static_cast<T*>(sum.from(r).first), D);
    }
  }
};

// The sums alone, for one row.
template <class T, class G, class V>
void accumulate(const void* dy_row, const void* v_row, Moments<T> m, T* dw, T* sum, int64_t D) {
  const auto* dy = static_cast<const G*>(dy_row);
  const auto* v = static_cast<const V*>(v_row);
  over_row<T>(D, [&](int64_t i, auto size) MPVG_LAMBDA {
    const Vec<T> dy_i = load<T>(dy + i, size);
    store(dw + i, fma(dy_i, normalised(load<T>(v + i, size), m), load<T>(dw + i)));
    store(sum + i, load<T>(sum + i) + dy_i);
  });
}
template <class T>
auto choose_accumulate(Dtype dy, Dtype v) {
  return with_dtype<T>(dy, [&](auto g) {
    return with_dtype<T>(v, [&](auto v) { return &accumulate<T, typename decltype(g)::type, typename decltype(v)::type>; });
  });
}

}  // namespace mpvg::MPVG_ISA
