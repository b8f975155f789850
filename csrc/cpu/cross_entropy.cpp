// Cross-entropy over the vocabulary (or a shard of it): the statistics of a row in one reading of it, and its gradient
// written over it.
#include "vec.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

constexpr int64_t kBlock = 2048;  // logits whose maximum is found and whose exponentials are added while in the first-level cache

// The larger ones; where one is NaN, either: the exponential of a NaN logit makes the sum NaN in any case.
template <class S, int N>
inline Lanes<S, N> larger(Lanes<S, N> a, Lanes<S, N> b) {
  for (int i = 0; i < N; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

#if defined(__AVX512F__)

inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }

// e^x for x <= 0: x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial for e^r (Cephes, expf), and the exponent; error below 2
// units in the last place. The limit keeps -infinity from becoming NaN: the exponential of -105 rounds to 0.
inline Vec exp_fine(Vec x) {
  const auto c = [](float value) { return fill(value, Vec{}); };
  x = {_mm512_max_ps(_mm512_set1_ps(-105.0f), x.v)};  // NaN goes through: the second operand
  const Vec n{_mm512_roundscale_ps((x * c(1.44269504088896341f)).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  Vec r = fnma(n, c(0.693359375f), x);
  r = fnma(n, c(-2.12194440e-4f), r);
  Vec p = c(1.9875691500e-4f);
  p = fma(p, r, c(1.3981999507e-3f));
  p = fma(p, r, c(8.3334519073e-3f));
  p = fma(p, r, c(4.1665795894e-2f));
  p = fma(p, r, c(1.6666665459e-1f));
  p = fma(p, r, c(5.0000001201e-1f));
  p = fma(p * r, r, r) + c(1.0f);
  return {_mm512_scalef_ps(p.v, n.v)};
}

// 2^t for t <= 0: 2^floor(t) p(t - floor(t)), with a polynomial for 2^f on [0, 1) that is 1 at 0. -infinity gives 0, NaN NaN.
template <class... Coefficients>
inline Vec power_of_2(Vec t, float last, Coefficients... before) {
  const Vec f{_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec p = fill(last, Vec{});
  ((p = fma(p, f, fill(before, Vec{}))), ...);
  return {_mm512_scalef_ps(fma(p, f, fill(1.0f, Vec{})).v, t.v)};
}

// e^x for x <= 0, to be added to many: relative error 1.4e-7 with a mean of -4e-9 over f, and below 1e-6 where the rounding of
// the exponent counts, for e^-16.
inline Vec exp_of_many(Vec x) {
  const Vec t = x * fill(1.44269504088896341f, Vec{});
  return power_of_2(t, 0.001867129816673696f, 0.0090170307084918022f, 0.055799912661314011f, 0.24016444385051727f,
                    0.69315129518508911f);
}

// e^x for results stored as T: 16 bits do not show a relative error of 3e-6.
template <class T>
inline Vec exp_for(Vec x) {
  if constexpr (sizeof(T) != 2) return exp_fine(x);
  const Vec t = x * fill(1.44269504088896341f, Vec{});
  return power_of_2(t, 0.013426647521555424f, 0.05224253237247467f, 0.24128018319606781f, 0.69304484128952026f);
}

#else

#if defined(__AVX2__)
inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
#endif

template <class V>
inline V exp_fine(V x) { return exp(x); }
template <class V>
inline V exp_of_many(V x) { return exp(x); }
template <class T, class V>
inline V exp_for(V x) { return exp(x); }

#endif

template <class V>
inline typename V::Scalar first_of(V x) {
  typename V::Scalar lanes[V::size];
  store(lanes, x);
  return lanes[0];
}

template <class V>
inline typename V::Scalar largest(V x) {
  typename V::Scalar lanes[V::size];
  store(lanes, x);
  for (int64_t i = 1; i < V::size; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

// Loads of logits; those past the end of a row are -infinity, whose exponential is 0.
template <class T, class V>
inline V logits_at(const T* p, Full, V like) { return load(p, like); }
template <class T, class V>
inline V logits_at(const T* p, Part part, V like) {
  typename V::Scalar lanes[V::size];
  for (int64_t i = 0; i < V::size; ++i) lanes[i] = i < part.n ? widen(p[i]) : -__builtin_huge_val();
  return load(lanes, like);
}

template <class T, class V>
inline typename V::Scalar largest_of(const T* x, int64_t width) {
  V a = fill(typename V::Scalar(-__builtin_huge_val()), V{}), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * V::size <= width; i += 4 * V::size) {
    a = larger(a, load(x + i, V{}));
    b = larger(b, load(x + i + V::size, V{}));
    c = larger(c, load(x + i + 2 * V::size, V{}));
    d = larger(d, load(x + i + 3 * V::size, V{}));
  }
  for (; i + V::size <= width; i += V::size) a = larger(a, load(x + i, V{}));
  if (i < width) b = larger(b, logits_at(x + i, Part{width - i}, V{}));
  return largest(larger(larger(a, b), larger(c, d)));
}

template <class T>
void forward(const CrossEntropyFwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  using S = typename V::Scalar;
  const S lowest = S(-__builtin_huge_val());
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
    S top = lowest, total = S(0);
    for (int64_t start = 0; start < a.width; start += kBlock) {
      const int64_t count = a.width - start < kBlock ? a.width - start : kBlock;
      const S before = top, here = largest_of<T, V>(x + start, count);
      top = here > top ? here : top;
      const S base = top == lowest ? S(0) : top;  // nothing but -infinity so far: exponentials of 0, not NaN
      const V shift = fill(base, V{});
      const S sum = sum_vectors<V>(count, [=](int64_t i, auto n, V sums) {
        __builtin_prefetch(x + start + i + kBlock);
        return sums + exp_of_many(logits_at(x + start + i, n, V{}) - shift);
      });
      total = total * first_of(exp_fine(fill(before - base, V{}))) + sum;
    }
    const int64_t target = a.target[row], local = target - a.vocab_start;
    const bool here = target != a.ignore_index && local >= 0 && local < a.width;
    static_cast<S*>(a.max)[row] = top;
    static_cast<S*>(a.sum)[row] = total;
    static_cast<S*>(a.target_logit)[row] = here ? S(widen(x[local])) : S(0);
  }
}

template <class T>
void backward(const CrossEntropyBwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  using S = typename V::Scalar;
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(a.logits) + row * a.row_stride;
    const int64_t target = a.target[row], local = target - a.vocab_start;
    if (target == a.ignore_index) {
      memset(x, 0, a.width * sizeof(T));
      continue;
    }
    const S grad = static_cast<const S*>(a.grad)[row * a.grad_stride];
    const V top = fill(static_cast<const S*>(a.max)[row], V{});
    const V factor = fill(grad / static_cast<const S*>(a.sum)[row], V{});
    const bool here = local >= 0 && local < a.width;
    // exp_fine: the difference to 1 of a probability near 1 is all that is left of it.
    const V of_target = here ? exp_fine(fill(S(widen(x[local])), V{}) - top) * factor : top;
    each_vector<V>(a.width, [=](int64_t i, auto n) { store(x + i, n, exp_for<T>(load(x + i, n, V{}) - top) * factor); });
    if (here) store(x + local, 1, of_target - fill(grad, V{}));
  }
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyFwd& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

void cross_entropy_bwd(const CrossEntropyBwd& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
