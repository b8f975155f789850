// One vector type a level, with the same operations on every level: Vec of the widest registers, float arithmetic, loads
// and stores that convert from and to bf16 and fp16. Included by the units that are compiled once a level; all is in an
// anonymous namespace, for a template instantiated with AVX-512 must never be merged with another level's.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../kernels.h"
#include "cache.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

#if defined(__AVX512F__)

struct Vec {
  static constexpr int64_t size = 16;
  using Scalar = float;
  __m512 v;
};

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec fill(float x, Vec) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a * b + c
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a * b
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xB1)}; }  // (1, 0, 3, 2, ...)

// Every word to the upper half of 32 bits, in one instruction where a conversion and a shift are two.
inline __m512 widen(__m256i bf16) {
  const __m512i from = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0,
                                        1, 0, 0, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, from, _mm512_castsi256_si512(bf16)));
}
// As `narrow` of a single one does, subnormal numbers included, which the instruction makes zero.
inline __m256i narrow_bf16_exactly(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7FC0)));
}
inline __m256i narrow_bf16(__m512 x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  return narrow_bf16_exactly(x);
#endif
}
inline __m256i narrow_f16(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vec load(const float* p, Vec) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p, Vec) { return {widen(_mm256_loadu_si256((const __m256i*)p))}; }
inline Vec load(const Half* p, Vec) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(a.v)); }
inline void store(Half* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow_f16(a.v)); }
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void stream(BFloat16* p, Vec a) { _mm256_stream_si256((__m256i*)p, narrow_bf16(a.v)); }
inline void stream(Half* p, Vec a) { _mm256_stream_si256((__m256i*)p, narrow_f16(a.v)); }

// The first n < size elements; the others load as 0.
inline Vec load(const float* p, int64_t n, Vec) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load(const BFloat16* p, int64_t n, Vec) { return {widen(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline Vec load(const Half* p, int64_t n, Vec) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
inline void store(float* p, int64_t n, Vec a) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store(BFloat16* p, int64_t n, Vec a) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a.v)); }
inline void store(Half* p, int64_t n, Vec a) { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(a.v)); }

// p[0], p[0], p[1], p[1], ... of the first n < size elements, n even.
inline Vec spread(__m512 a) { return {_mm512_permutexvar_ps(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), a)}; }
inline Vec load_twice(const float* p, Vec) { return spread(_mm512_castps256_ps512(_mm256_loadu_ps(p))); }
inline Vec load_twice(const float* p, int64_t n, Vec) { return spread(_mm512_maskz_loadu_ps(first(n / 2), p)); }

// 1 + e^-x, for results stored as T: e^-x = 2^floor(t) 2^(t - floor(t)) with a polynomial fitted to 2^f on [0, 1), of
// relative error 1e-8, or 3e-6 where 16 bits are stored. Overflows to infinity; infinities and NaN come out right.
template <class T>
inline Vec one_plus_exp_neg(Vec x) {
  const auto c = [](float value) { return fill(value, Vec{}); };
  const Vec t = x * c(-1.44269504088896341f);
  const Vec f{_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec p;
  if constexpr (sizeof(T) == 2) {
    p = fma(c(0.013534167781472206f), f, c(0.052011460065841675f));
    p = fma(p, f, c(0.2414427548646927f));
    p = fma(p, f, c(0.6930038332939148f));
    p = fma(p, f, c(1.0000026226043701f));
  } else {
    p = fma(c(0.00021702254889532924f), f, c(0.0012439688434824347f));
    p = fma(p, f, c(0.009678840637207031f));
    p = fma(p, f, c(0.055483341217041016f));
    p = fma(p, f, c(0.24022983014583588f));
    p = fma(p, f, c(0.6931470036506653f));
    p = fma(p, f, c(1.0f));
  }
  return c(1.0f) + Vec{_mm512_scalef_ps(p.v, t.v)};
}

// 1 / x for results stored as T: bf16 needs no more than the 14 bits of the estimate.
template <class T>
inline Vec reciprocal(Vec x) {
  if constexpr (__is_same(T, BFloat16)) return {_mm512_rcp14_ps(x.v)};
  return {_mm512_div_ps(_mm512_set1_ps(1.0f), x.v)};
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int64_t size = 8;
  using Scalar = float;
  __m256 v;
};

inline Vec fill(float x, Vec) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Vec a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xB1)}; }

inline __m256 widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }
inline __m128i narrow_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i all = _mm256_blendv_epi8(even, _mm256_set1_epi32(0x7FC0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
inline __m128i narrow_f16(__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vec load(const float* p, Vec) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p, Vec) { return {widen(_mm_loadu_si128((const __m128i*)p))}; }
inline Vec load(const Half* p, Vec) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow_bf16(a.v)); }
inline void store(Half* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow_f16(a.v)); }
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
inline void stream(BFloat16* p, Vec a) { _mm_stream_si128((__m128i*)p, narrow_bf16(a.v)); }
inline void stream(Half* p, Vec a) { _mm_stream_si128((__m128i*)p, narrow_f16(a.v)); }

template <class T>
inline Vec load(const T* p, int64_t n, Vec) {
  T padded[Vec::size] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded, Vec{});
}
template <class T>
inline void store(T* p, int64_t n, Vec a) {
  T padded[Vec::size];
  store(padded, a);
  memcpy(p, padded, n * sizeof(T));
}

// p[0], p[0], p[1], p[1], ... of the first n < size elements, n even.
inline Vec load_twice(const float* p, Vec) {
  const __m256i which = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
  return {_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), which)};
}
inline Vec load_twice(const float* p, int64_t n, Vec) {
  float half[4] = {};
  memcpy(half, p, n / 2 * sizeof(float));
  return load_twice(half, Vec{});
}

// NaN goes through: min and max return their second operand then.
inline Vec clamp(Vec a, float low, float high) {
  return {_mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), a.v))};
}
inline Vec round_to_int(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline __m256 power_of_2(__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); }
// In two steps, for 2^n itself may be too large or too small for a float when the product is not.
inline Vec times_power_of_2(Vec a, Vec n) {
  const __m256i exponent = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(exponent, 1);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power_of_2(half)), power_of_2(_mm256_sub_epi32(exponent, half)))};
}

#endif

// Several numbers side by side in plain C++: the vector of the scalar level, and of float64, which only that level has.
// Sums of long rows need the lanes for accuracy as much as for speed.
template <class S, int N>
struct Lanes {
  static constexpr int64_t size = N;
  using Scalar = S;
  S v[N];
};

#if !defined(__AVX2__)
using Vec = Lanes<float, 8>;
#endif

#define MEGATRONISH_LANES(expression) \
  Lanes<S, N> r;                      \
  for (int i = 0; i < N; ++i) r.v[i] = (expression); \
  return r;

template <class S, int N> inline Lanes<S, N> fill(S x, Lanes<S, N>) { MEGATRONISH_LANES(x) }
template <class S, int N> inline Lanes<S, N> operator+(Lanes<S, N> a, Lanes<S, N> b) { MEGATRONISH_LANES(a.v[i] + b.v[i]) }
template <class S, int N> inline Lanes<S, N> operator-(Lanes<S, N> a, Lanes<S, N> b) { MEGATRONISH_LANES(a.v[i] - b.v[i]) }
template <class S, int N> inline Lanes<S, N> operator*(Lanes<S, N> a, Lanes<S, N> b) { MEGATRONISH_LANES(a.v[i] * b.v[i]) }
template <class S, int N> inline Lanes<S, N> operator/(Lanes<S, N> a, Lanes<S, N> b) { MEGATRONISH_LANES(a.v[i] / b.v[i]) }
template <class S, int N> inline Lanes<S, N> fma(Lanes<S, N> a, Lanes<S, N> b, Lanes<S, N> c) { MEGATRONISH_LANES(a.v[i] * b.v[i] + c.v[i]) }
template <class S, int N> inline Lanes<S, N> fnma(Lanes<S, N> a, Lanes<S, N> b, Lanes<S, N> c) { MEGATRONISH_LANES(c.v[i] - a.v[i] * b.v[i]) }
template <class S, int N> inline Lanes<S, N> swap_pairs(Lanes<S, N> a) { MEGATRONISH_LANES(a.v[i ^ 1]) }
template <int N> inline Lanes<float, N> exp(Lanes<float, N> a) { using S = float; MEGATRONISH_LANES(__builtin_expf(a.v[i])) }
template <int N> inline Lanes<double, N> exp(Lanes<double, N> a) { using S = double; MEGATRONISH_LANES(__builtin_exp(a.v[i])) }
template <class S, int N> inline S sum(Lanes<S, N> a) {
  for (int width = N / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  }
  return a.v[0];
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | (rest & 0x3FF) << 13);        // infinity, NaN
  if (rest >= 0x0400) return float_of(sign | ((rest << 13) + ((127 - 15) << 23)));       // normal
  const float small = static_cast<float>(rest) * (1.0f / 16777216.0f);                   // subnormal: rest * 2^-24
  return sign ? -small : small;
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_of(x);
  out->bits = x != x ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, Half* out) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, rest = bits_of(x) & 0x7FFFFFFF;
  uint32_t half;
  if (rest > 0x7F800000) {
    half = 0x7E00;  // NaN
  } else if (rest >= 0x477FF000) {
    half = 0x7C00;  // rounds to 65536 or is more: infinity
  } else if (rest >= 0x38800000) {
    half = (rest - ((127 - 15) << 23) + 0xFFF + (rest >> 13 & 1)) >> 13;
  } else {
    // The sum with 0.5 has its last bit at 2^-24, that of a subnormal: the addition rounds.
    half = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

template <class T, class S, int N> inline Lanes<S, N> load(const T* p, Lanes<S, N>) { MEGATRONISH_LANES(widen(p[i])) }
template <class T, class S, int N> inline Lanes<S, N> load(const T* p, int64_t n, Lanes<S, N>) { MEGATRONISH_LANES(i < n ? S(widen(p[i])) : S(0)) }
template <class S, int N> inline Lanes<S, N> load_twice(const S* p, Lanes<S, N>) { MEGATRONISH_LANES(p[i / 2]) }
template <class S, int N> inline Lanes<S, N> load_twice(const S* p, int64_t n, Lanes<S, N>) { MEGATRONISH_LANES(i < n ? p[i / 2] : S(0)) }
template <class T, class S, int N> inline void store(T* p, int64_t n, Lanes<S, N> a) {
  for (int64_t i = 0; i < n; ++i) narrow(a.v[i], p + i);
}
template <class T, class S, int N> inline void store(T* p, Lanes<S, N> a) { store(p, N, a); }

#undef MEGATRONISH_LANES

#if defined(__AVX2__) && !defined(__AVX512F__)
// e^x: x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial for e^r (Cephes, expf), and the exponent. Overflows to infinity,
// underflows to 0; error below 2 units in the last place.
inline Vec exp(Vec x) {
  const auto c = [](float value) { return fill(value, Vec{}); };
  x = clamp(x, -105.0f, 89.0f);
  const Vec n = round_to_int(x * c(1.44269504088896341f));
  Vec r = fnma(n, c(0.693359375f), x);
  r = fnma(n, c(-2.12194440e-4f), r);
  Vec p = c(1.9875691500e-4f);
  p = fma(p, r, c(1.3981999507e-3f));
  p = fma(p, r, c(8.3334519073e-3f));
  p = fma(p, r, c(4.1665795894e-2f));
  p = fma(p, r, c(1.6666665459e-1f));
  p = fma(p, r, c(5.0000001201e-1f));
  return times_power_of_2(fma(p * r, r, r) + c(1.0f), n);
}
#endif

// The same two functions where AVX-512 has not made faster ones.
template <class T, class V>
inline V one_plus_exp_neg(V x) {
  using S = typename V::Scalar;
  return fill(S(1), V{}) + exp(fill(S(0), V{}) - x);
}
template <class T, class V>
inline V reciprocal(V x) { return fill(typename V::Scalar(1), V{}) / x; }

// The vector that computes on elements of type T.
template <class T>
struct VecOf {
  using type = Vec;
};
template <>
struct VecOf<double> {
  using type = Lanes<double, 4>;
};

// Tags that a loop body loads and stores with: a full vector, one of a row whose later one is fetched meanwhile, one that
// goes past the caches when stored as well, or the `n` elements left at the end of a row.
struct Full {};
struct Fetched : Full {};
struct Streamed {};
struct Part {
  int64_t n;
};
template <class T, class V>
inline V load(const T* p, Full, V like) { return load(p, like); }
template <class T, class V>
inline V load(const T* p, Streamed, V like) { return load(p, like); }
template <class T, class V>
inline V load(const T* p, Part part, V like) { return load(p, part.n, like); }
template <class S, class V>
inline V load_twice(const S* p, Full, V like) { return load_twice(p, like); }
template <class S, class V>
inline V load_twice(const S* p, Part part, V like) { return load_twice(p, part.n, like); }
template <class T, class V>
inline void store(T* p, Full, V a) { store(p, a); }
template <class T, class V>
inline void store(T* p, Streamed, V a) { stream(p, a); }
template <class T, class V>
inline void store(T* p, Part part, V a) { store(p, part.n, a); }

// body(i, Full or Part) for every vector of a row. With Streamed or Fetched, body(i, that or Part), and what `later` points
// to comes into the second-level cache meanwhile, a line at a time: the hardware fetches ahead within a page only.
template <class V, class How = Full, class Body, class... T>
inline void each_vector(int64_t width, Body body, const T*... later) {
  int64_t i = 0;
  if constexpr (!__is_same(How, Full) && sizeof...(T) > 0) {
    constexpr int64_t line = 64 / (sizeof(T), ...);
    for (; i + line <= width; i += line) {
      (__builtin_prefetch(later + i, 0, 2), ...);
#pragma GCC unroll 4
      for (int64_t j = 0; j < line; j += V::size) body(i + j, How{});
    }
  }
  for (; i + V::size <= width; i += V::size) body(i, How{});
  if (i < width) body(i, Part{width - i});
}

// `bytes` bytes as they are; with Streamed past the caches, for `to` aligned to a cache line and full cache lines.
inline void copy_bytes(const void* from, void* to, int64_t bytes, Full) { memcpy(to, from, bytes); }
inline void copy_bytes(const void* from, void* to, int64_t bytes, Streamed) {
#if defined(__AVX2__)
  const __m256i* source = static_cast<const __m256i*>(from);
  __m256i* target = static_cast<__m256i*>(to);
  for (int64_t i = 0; i < bytes / 32; ++i) _mm256_stream_si256(target + i, _mm256_loadu_si256(source + i));
#else
  memcpy(to, from, bytes);
#endif
}

// The sum over a row of what body(i, Full or Part, accumulator) adds up: four independent sums, so that one addition
// need not wait for the one before.
template <class V, class Body>
inline typename V::Scalar sum_vectors(int64_t width, Body body) {
  V a = fill(typename V::Scalar(0), V{}), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * V::size <= width; i += 4 * V::size) {
    a = body(i, Full{}, a);
    b = body(i + V::size, Full{}, b);
    c = body(i + 2 * V::size, Full{}, c);
    d = body(i + 3 * V::size, Full{}, d);
  }
  for (; i + V::size <= width; i += V::size) a = body(i, Full{}, a);
  if (i < width) b = body(i, Part{width - i}, b);
  return sum((a + b) + (c + d));
}

// How far ahead of its use a row of `width` elements is fetched: where the next row begins, but at least a page, for memory
// answers only after a short row is done.
template <class T>
inline int64_t ahead(int64_t width) {
  constexpr int64_t page = 4096 / sizeof(T);
  return width > page ? width : page;
}

// Whether rows of `bytes` from `p` on are aligned for streaming stores of full vectors.
inline bool aligned(const void* p, int64_t bytes) { return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(bytes)) % 64 == 0; }

// Calls run(Streamed{}) or run(Full{}); the scalar level has no streaming stores.
template <class Run>
inline void with_stores(bool streamed, Run run) {
#if defined(__AVX2__)
  if (streamed) {
    run(Streamed{});
    _mm_sfence();  // streaming stores are weakly ordered: make them visible before other threads are signalled
    return;
  }
#endif
  (void)streamed;
  run(Full{});
}

// Calls run(T{}) with the element type that `dtype` names, of those that this level computes.
template <class Run>
inline void with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::bf16: return run(BFloat16{});
    case DType::f16: return run(Half{});
    case DType::f64:
#if !defined(__AVX2__)
      return run(double{});
#else
      return;  // cpu_kernels() gives the scalar level for it
#endif
  }
}

}  // namespace
}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
