// Skinny GEMM: x w^T for few rows of x. Every weight is read once, at memory bandwidth, and used for all rows while it is in a
// register. Many rows are processed 128 at a time: slower than a library GEMM, but no row depends on the others.
// Dense weights in 16 or 32 bits, int8 with a scale per row, int4 with a scale and a minimum per group.
#include "vec.h"

#include "decode.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

constexpr int64_t kRowsAtOnce = 128;  // of x: they stay in the second-level cache while the weights pass

// What a row of T is multiplied in: fp32 vectors, or pairs of bf16 by the dot-product instruction where there is one.
template <class T>
struct Dense {
  using Acc = Vec;
  static constexpr int64_t step = Vec::size;
  static Acc zero() { return fill(0.0f, Vec{}); }
  static Vec at(const T* p) { return load(p, Vec{}); }
  static Vec at(const T* p, int64_t n) { return load(p, n, Vec{}); }
  static Acc add(Acc acc, Vec a, Vec b) { return fma(a, b, acc); }
  static float total(Acc acc) { return sum(acc); }
};

#if defined(__AVX512BF16__)
template <>
struct Dense<BFloat16> {
  using Acc = __m512;
  static constexpr int64_t step = 32;
  static Acc zero() { return _mm512_setzero_ps(); }
  static __m512bh at(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh at(const BFloat16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static Acc add(Acc acc, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(acc, a, b); }
  static float total(Acc acc) { return _mm512_reduce_add_ps(acc); }
};
#endif

template <class T>
inline void put(const LinearRows& a, int64_t row, int64_t n, float value) {
  if (a.bias != nullptr) value += widen(static_cast<const T*>(a.bias)[n]);
  narrow(value, static_cast<T*>(a.y) + row * a.n + n);
}

#if defined(__AVX512BF16__)
// put of 4 rows by 4 outputs: 16 sums at once, each in the order of _mm512_reduce_add_ps (halves, quarters, pairs, the two), so
// that a row has the same bits in a tile of any size.
inline void put_all(const LinearRows& a, int64_t row, int64_t n, const __m512 (&acc)[4][4]) {
  const auto halves = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
  };
  __m512 rows[4];  // lane j of 128 bits: what is left of the sum of output j
  for (int i = 0; i < 4; ++i) {
    const __m512 low = halves(acc[i][0], acc[i][1]), high = halves(acc[i][2], acc[i][3]);
    rows[i] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
  }
  const auto pairs = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xEE));
  };
  const __m512 low = pairs(rows[0], rows[1]), high = pairs(rows[2], rows[3]);
  __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xDD));  // [output][row]
  sums = _mm512_permutexvar_ps(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), sums);
  if (a.bias != nullptr) {
    const __m128i bias = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)(static_cast<const BFloat16*>(a.bias) + n)));
    sums = _mm512_add_ps(sums, _mm512_broadcast_f32x4(_mm_castsi128_ps(_mm_slli_epi32(bias, 16))));
  }
  alignas(32) BFloat16 y[4][4];
  _mm256_store_si256((__m256i*)y, narrow_bf16_exactly(sums));
  for (int i = 0; i < 4; ++i) memcpy(static_cast<BFloat16*>(a.y) + (row + i) * a.n + n, y[i], sizeof(y[i]));
}
#endif

// Asks for what the next N rows of w hold at this column: the hardware fetches ahead within a page only, of fewer rows.
template <int N, class W>
inline void fetch_next(const W* const* w, int64_t at, int64_t row) {
  for (int j = 0; j < N; ++j) __builtin_prefetch(w[j] + at + N * row, 0, 2);
}

// M rows of x by N rows of w.
template <class T, int M, int N>
inline void dense_tile(const LinearRows& a, int64_t m, int64_t n) {
  using D = Dense<T>;
  const T *x[M], *w[N];
  for (int i = 0; i < M; ++i) x[i] = static_cast<const T*>(a.x) + (m + i) * a.x_row;
  for (int j = 0; j < N; ++j) w[j] = static_cast<const T*>(a.w) + (n + j) * a.k;
  typename D::Acc acc[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = D::zero();
  int64_t k = 0;
  const auto body = [&](auto... part) {
    decltype(D::at(w[0] + k)) held[N];
    for (int j = 0; j < N; ++j) held[j] = D::at(w[j] + k, part...);
    for (int i = 0; i < M; ++i) {
      const auto xs = D::at(x[i] + k, part...);
      for (int j = 0; j < N; ++j) acc[i][j] = D::add(acc[i][j], xs, held[j]);
    }
  };
  for (; k + D::step <= a.k; k += D::step) {
    fetch_next<N>(w, k, a.k);
    body();
  }
  if (k < a.k) body(a.k - k);
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, BFloat16) && M == 4 && N == 4) return put_all(a, m, n, acc);
#endif
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) put<T>(a, m + i, n + j, D::total(acc[i][j]));
}

inline Vec load_int(const int8_t* p) {
#if defined(__AVX512F__)
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
#elif defined(__AVX2__)
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
#else
  Vec r;
  for (int i = 0; i < Vec::size; ++i) r.v[i] = static_cast<float>(p[i]);
  return r;
#endif
}

inline Vec load_int(const int8_t* p, int64_t n) {
  int8_t padded[Vec::size] = {};
  memcpy(padded, p, n);
  return load_int(padded);
}

template <class T, int M, int N>
inline void int8_tile(const LinearRows& a, int64_t m, int64_t n) {
  const float* x[M];
  const int8_t* w[N];
  for (int i = 0; i < M; ++i) x[i] = a.wide_x + (m + i) * a.k;
  for (int j = 0; j < N; ++j) w[j] = static_cast<const int8_t*>(a.w) + (n + j) * a.k;
  Vec acc[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = fill(0.0f, Vec{});
  const auto body = [&](int64_t k) {
    Vec held[N];
    for (int j = 0; j < N; ++j) held[j] = load_int(w[j] + k);
    for (int i = 0; i < M; ++i) {
      const Vec xs = load(x[i] + k, Vec{});
      for (int j = 0; j < N; ++j) acc[i][j] = fma(xs, held[j], acc[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + 64 <= a.k; k += 64) {
    fetch_next<N>(w, k, a.k);
    for (int64_t part = 0; part < 64; part += Vec::size) body(k + part);
  }
  for (; k + Vec::size <= a.k; k += Vec::size) body(k);
  if (k < a.k) {
    for (int j = 0; j < N; ++j) {
      const Vec held = load_int(w[j] + k, a.k - k);
      for (int i = 0; i < M; ++i) acc[i][j] = fma(load(x[i] + k, a.k - k, Vec{}), held, acc[i][j]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) put<T>(a, m + i, n + j, sum(acc[i][j]) * a.scales[n + j]);
}

// The low and the high halves of Vec::size bytes.
inline void load_halves(const uint8_t* p, Vec& low, Vec& high) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  low.v = _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)));
  high.v = _mm512_cvtepi32_ps(_mm512_srli_epi32(bytes, 4));
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  low.v = _mm256_cvtepi32_ps(_mm256_and_si256(bytes, _mm256_set1_epi32(15)));
  high.v = _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4));
#else
  for (int i = 0; i < Vec::size; ++i) {
    low.v[i] = static_cast<float>(p[i] & 15);
    high.v[i] = static_cast<float>(p[i] >> 4);
  }
#endif
}

template <class T, int M, int N>
inline void int4_tile(const LinearRows& a, int64_t m, int64_t n) {
  const int64_t groups = a.k / a.group;
  const uint8_t* w[N];
  for (int j = 0; j < N; ++j) w[j] = static_cast<const uint8_t*>(a.w) + (n + j) * a.k / 2;
  Vec acc[M][N];
  float low_ends[M][N];
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = fill(0.0f, Vec{}), low_ends[i][j] = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    Vec part[M][N];
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) part[i][j] = fill(0.0f, Vec{});
    if (g * a.group % 128 == 0) fetch_next<N>(w, g * a.group / 2, a.k / 2);
    for (int64_t k = g * a.group; k < (g + 1) * a.group; k += kInt4Block) {
      for (int64_t half = 0; half < kInt4Block / 2; half += Vec::size) {
        Vec low[N], high[N];
        for (int j = 0; j < N; ++j) load_halves(w[j] + k / 2 + half, low[j], high[j]);
        for (int i = 0; i < M; ++i) {
          const float* x = a.wide_x + (m + i) * a.k + k + half;
          const Vec x_low = load(x, Vec{}), x_high = load(x + kInt4Block / 2, Vec{});
          for (int j = 0; j < N; ++j) part[i][j] = fma(x_high, high[j], fma(x_low, low[j], part[i][j]));
        }
      }
    }
    for (int j = 0; j < N; ++j) {
      const BFloat16* range = static_cast<const BFloat16*>(a.ranges) + ((n + j) * groups + g) * 2;
      const float scale = widen(range[0]), low_end = widen(range[1]);
      for (int i = 0; i < M; ++i) {
        acc[i][j] = fma(part[i][j], fill(scale, Vec{}), acc[i][j]);
        low_ends[i][j] += low_end * a.group_sums[(m + i) * groups + g];
      }
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) put<T>(a, m + i, n + j, sum(acc[i][j]) + low_ends[i][j]);
}

template <WeightFormat format, class T, int M, int N>
inline void tile(const LinearRows& a, int64_t m, int64_t n) {
  if constexpr (format == WeightFormat::dense) dense_tile<T, M, N>(a, m, n);
  if constexpr (format == WeightFormat::int8) int8_tile<T, M, N>(a, m, n);
  if constexpr (format == WeightFormat::int4) int4_tile<T, M, N>(a, m, n);
}

// Rows m to end of x by outputs n to n + N: the rows of w stay in the first cache while blocks of x pass.
template <WeightFormat format, class T, int N>
inline void rows(const LinearRows& a, int64_t m, int64_t end, int64_t n) {
  for (; m + 4 <= end; m += 4) tile<format, T, 4, N>(a, m, n);
  if (m + 2 <= end) tile<format, T, 2, N>(a, m, n), m += 2;
  if (m < end) tile<format, T, 1, N>(a, m, n);
}

template <WeightFormat format, class T>
void outputs(const LinearRows& a, int64_t begin, int64_t end) {
  for (int64_t m = 0; m < a.m; m += kRowsAtOnce) {
    const int64_t last = m + kRowsAtOnce < a.m ? m + kRowsAtOnce : a.m;
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) rows<format, T, 4>(a, m, last, n);
    for (; n < end; ++n) rows<format, T, 1>(a, m, last, n);
  }
}

}  // namespace

void linear_rows_prepare(const LinearRows& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!__is_same(T, double)) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_row;
        float* wide = a.wide_x + row * a.k;
        for (int64_t i = 0; i < a.k; ++i) wide[i] = widen(x[i]);
        if (a.format != WeightFormat::int4) continue;
        for (int64_t g = 0; g < a.k / a.group; ++g) {
          a.group_sums[row * (a.k / a.group) + g] = sum_vectors<Vec>(a.group, [&](int64_t i, auto n, Vec acc) {
            return acc + load(wide + g * a.group + i, n, Vec{});
          });
        }
      }
    }
  });
}

void linear_rows(const LinearRows& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!__is_same(T, double)) {
      if (a.format == WeightFormat::dense) return outputs<WeightFormat::dense, T>(a, begin, end);
      if (a.format == WeightFormat::int8) return outputs<WeightFormat::int8, T>(a, begin, end);
      outputs<WeightFormat::int4, T>(a, begin, end);
    }
  });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
