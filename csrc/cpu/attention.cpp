// Causal attention in blocks of 64 queries by 64 keys, forward and backward, with an online softmax as in FlashAttention-2
// (Dao 2023): scores never leave the cache, blocks above the diagonal are skipped, accumulation is in fp32.
//
// Products are made by one small routine, C[m][n] += A[m][k] B[k][n], over matrices of 32-bit cells. A cell is a float, or,
// where the CPU multiplies bf16, a pair of bf16 that are neighbours in k. So operands are laid out in three ways:
//   rows     [row][channel / pair]   as stored; A of a product over channels
//   paired   [row / pair][channel]   cells of the same channel in neighbouring rows; B of a product over rows
//   turned   the transpose of either; B of a product over channels, or A of one over rows
#include <math.h>
#include <stdlib.h>

#include "attention.h"
#include "vec.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kTileColumns = 32;
constexpr int64_t kVectors = kTileColumns / Vec::size;
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 8;  // 16 sums in 32 registers
#elif defined(__AVX2__)
constexpr int64_t kTileRows = 2;  // 8 sums in 16 registers
#else
constexpr int64_t kTileRows = 1;
#endif
constexpr float kMasked = -1e30f;  // finite, so that a difference of two is not NaN; 2 to its power is 0
constexpr float kLeast = -1e20f;   // the largest score of no key at all: far above kMasked, whose weight stays 0
constexpr float kLog2E = 1.44269504088896341f;
using Cell = uint32_t;

// bf16 values in a cell: two where the CPU has products of pairs, else bf16 is widened as it is read.
template <class T>
constexpr int64_t pair_of() {
#if defined(__AVX512BF16__)
  return __is_same(T, BFloat16) ? 2 : 1;
#else
  return 1;
#endif
}

inline float* floats(Cell* cells) { return reinterpret_cast<float*>(cells); }

// ---- Arithmetic of vectors that vec.h has no need of.

// 2^x for x <= 0, to 1e-7; the polynomial is that of one_plus_exp_neg.
inline Vec exp2_of(Vec x) {
#if defined(__AVX512F__)
  const auto c = [](float value) { return fill(value, Vec{}); };
  const Vec f{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec p = fma(c(0.00021702254889532924f), f, c(0.0012439688434824347f));
  p = fma(p, f, c(0.009678840637207031f));
  p = fma(p, f, c(0.055483341217041016f));
  p = fma(p, f, c(0.24022983014583588f));
  p = fma(p, f, c(0.6931470036506653f));
  p = fma(p, f, c(1.0f));
  return {_mm512_scalef_ps(p.v, x.v)};
#else
  return exp(x * fill(0.693147180559945309f, Vec{}));
#endif
}

// The larger of each two; NaN of `b` stays.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return {_mm512_max_ps(a.v, b.v)};
#elif defined(__AVX2__)
  return {_mm256_max_ps(a.v, b.v)};
#else
  for (int64_t i = 0; i < Vec::size; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
#endif
}

inline float largest(Vec a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(a.v);
#else
  float values[Vec::size], most;
  store(values, a);
  most = values[0];
  for (int64_t i = 1; i < Vec::size; ++i) most = values[i] > most ? values[i] : most;
  return most;
#endif
}

// ---- Layouts.

// `count` rows of x, and zeros up to kBlock rows.
template <class T>
void rows_of(Cell* to, const T* x, int64_t stride, int64_t count, int64_t d) {
  const int64_t width = d / pair_of<T>();
  for (int64_t row = 0; row < kBlock; ++row, to += width) {
    if (row >= count) {
      memset(to, 0, width * sizeof(Cell));
    } else if constexpr (pair_of<T>() == 2 || sizeof(T) == 4) {
      memcpy(to, x + row * stride, d * sizeof(T));
    } else {
      for (int64_t i = 0; i < d; i += Vec::size) store(floats(to) + i, load(x + row * stride + i, Vec{}));
    }
  }
}

template <class T>
void paired_of(Cell* to, const T* x, int64_t stride, int64_t count, int64_t d) {
  if constexpr (pair_of<T>() == 1) return rows_of(to, x, stride, count, d);
#if defined(__AVX512BF16__)
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t row = 0; row < kBlock; row += 2, to += d) {
    const T *even = x + row * stride, *odd = even + stride;
    for (int64_t i = 0; i < d; i += 16) {
      const __m256i low = row < count ? _mm256_loadu_si256((const __m256i*)(even + i)) : zero;
      const __m256i high = row + 1 < count ? _mm256_loadu_si256((const __m256i*)(odd + i)) : zero;
      const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      _mm512_storeu_si512(to + i, both);
    }
  }
#endif
}

// to[columns][rows] = from[rows][columns]; rows are a multiple of 16.
void turn(Cell* to, const Cell* from, int64_t rows, int64_t columns) {
#if defined(__AVX512F__)
  const __m512i steps = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(static_cast<int>(columns)));
  for (int64_t row = 0; row < rows; row += 16) {
    for (int64_t column = 0; column < columns; ++column) {
      _mm512_storeu_si512(to + column * rows + row, _mm512_i32gather_epi32(steps, (const int*)(from + row * columns + column), 4));
    }
  }
#else
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) to[column * rows + row] = from[row * columns + column];
  }
#endif
}

// ---- Products.

// C[kTileRows][kTileColumns] (+)= A B, with k cells between them.
template <class T, bool add>
inline void tile(const Cell* a, int64_t a_stride, const Cell* b, int64_t b_stride, float* c, int64_t c_stride, int64_t k) {
  Vec sums[kTileRows][kVectors];
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[r][v] = fill(0.0f, Vec{});
    }
  }
  for (int64_t i = 0; i < k; ++i, b += b_stride) {
    Vec cells[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) cells[v] = load(reinterpret_cast<const float*>(b) + v * Vec::size, Vec{});
    for (int64_t r = 0; r < kTileRows; ++r) {
#if defined(__AVX512BF16__)
      if constexpr (pair_of<T>() == 2) {
        const __m512bh value = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_stride + i]));
        for (int64_t v = 0; v < kVectors; ++v) {
          sums[r][v].v = _mm512_dpbf16_ps(sums[r][v].v, value, (__m512bh)cells[v].v);
        }
        continue;
      }
#endif
      const Vec value = fill(reinterpret_cast<const float*>(a)[r * a_stride + i], Vec{});
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = fma(value, cells[v], sums[r][v]);
    }
  }
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t v = 0; v < kVectors; ++v) {
      float* to = c + r * c_stride + v * Vec::size;
      store(to, add ? load(to, Vec{}) + sums[r][v] : sums[r][v]);  // a block's sum by itself: shorter chains round less
    }
  }
}

// C[m][n] (+)= A[m][k] B[k][n], all without gaps; m is a multiple of kTileRows and n of kTileColumns.
template <class T, bool add>
void product(const Cell* a, const Cell* b, float* c, int64_t m, int64_t n, int64_t k) {
  for (int64_t column = 0; column < n; column += kTileColumns) {
    for (int64_t row = 0; row < m; row += kTileRows) {
      tile<T, add>(a + row * k, k, b + column, n, c + row * n + column, n, k);
    }
  }
}

// ---- Which keys a block of queries may read.

struct FirstKeys {
  const int32_t* of;     // by query, or null
  int64_t least, most;  // over the block

  FirstKeys(const int32_t* row, int64_t first, int64_t count) : of(row == nullptr ? nullptr : row + first), least(0), most(0) {
    if (of == nullptr) return;
    least = most = of[0];
    for (int64_t i = 1; i < count; ++i) {
      least = of[i] < least ? of[i] : least;
      most = of[i] > most ? of[i] : most;
    }
  }
};

// ---- Forward.

// The online softmax of a head over one block of queries: running maximum and sum.
struct Running {
  float most[kBlock], shrink[kBlock], total[kBlock];
};

// The scores [query][key] become probabilities relative to the largest score so far, in rows of P; `running` follows.
template <class T>
void soften(float* scores, Cell* p, Running& running, float factor, bool diagonal, const FirstKeys& keys, int64_t start, int64_t count) {
  constexpr int64_t n = kBlock / Vec::size;
  float most[kBlock];
  for (int64_t row = 0; row < kBlock; ++row) {
    float* s = scores + row * kBlock;
    if (diagonal) {
      for (int64_t key = row + 1; key < kBlock; ++key) s[key] = kMasked;
    }
    if (keys.most > start && row < count) {
      for (int64_t key = 0; key < kBlock && start + key < keys.of[row]; ++key) s[key] = kMasked;
    }
    Vec high = fill(kMasked, Vec{});
    for (int64_t i = 0; i < n; ++i) high = larger(high, load(s + i * Vec::size, Vec{}));
    most[row] = largest(high);
  }
  const Vec by = fill(factor, Vec{});
  for (int64_t row = 0; row < kBlock; row += Vec::size) {
    const Vec before = load(running.most + row, Vec{}), now = larger(before, load(most + row, Vec{}));
    const Vec shrink = exp2_of(by * (before - now));
    store(running.most + row, now);
    store(running.shrink + row, shrink);
    store(running.total + row, shrink * load(running.total + row, Vec{}));
  }
  for (int64_t row = 0; row < kBlock; ++row) {
    const float* s = scores + row * kBlock;
    const Vec high = fill(running.most[row], Vec{});
    Vec total = fill(0.0f, Vec{});
    for (int64_t i = 0; i < kBlock; i += Vec::size) {
      const Vec e = exp2_of(by * (load(s + i, Vec{}) - high));  // the difference first: exact for large scores
      total = total + e;
      if constexpr (pair_of<T>() == 2) {
        store(reinterpret_cast<BFloat16*>(p) + row * kBlock + i, e);
      } else {
        store(floats(p) + row * kBlock + i, e);
      }
    }
    running.total[row] += sum(total);
  }
}

template <class T>
struct FwdScratch {
  int64_t blocks, d, width;
  Cell *k, *v, *q, *p;
  float *scores, *sums;
  Cell* memory;

  FwdScratch(int64_t seq, int64_t head_dim) : blocks((seq + kBlock - 1) / kBlock), d(head_dim), width(head_dim / pair_of<T>()) {
    const int64_t panel = kBlock * width, square = kBlock * kBlock;
    const int64_t cells = 2 * blocks * panel + panel + 2 * square + kBlock * d;
    memory = static_cast<Cell*>(aligned_alloc(64, cells * sizeof(Cell)));
    k = memory, v = k + blocks * panel, q = v + blocks * panel, p = q + panel;
    scores = floats(p + square), sums = scores + square;
  }
  ~FwdScratch() { free(memory); }
};

template <class T>
T* at(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch + token * x.seq + head * x.head;
}

inline int64_t rows_in(int64_t block, int64_t seq) {
  const int64_t left = seq - block * kBlock;
  return left < kBlock ? left : kBlock;
}

// One block of queries of one head against the packed keys and values.
template <class T>
void forward_block(const AttentionFwd& a, FwdScratch<T>& m, int64_t b, int64_t head, int64_t block) {
  const int64_t panel = kBlock * m.width, count = rows_in(block, a.seq), first = block * kBlock;
  rows_of(m.q, at<T>(a.q, b, first, head), a.q.seq, count, m.d);
  Running running;
  for (int64_t row = 0; row < kBlock; ++row) running.most[row] = kLeast, running.total[row] = 0.0f;
  const FirstKeys keys(a.first_key == nullptr ? nullptr : a.first_key + b * a.seq, first, count);
  const int64_t begin = keys.least / kBlock;
  for (int64_t j = begin; j <= block; ++j) {
    product<T, false>(m.q, m.k + j * panel, m.scores, kBlock, kBlock, m.width);
    soften<T>(m.scores, m.p, running, a.scale * kLog2E, j == block, keys, j * kBlock, count);
    if (j == begin) {
      product<T, false>(m.p, m.v + j * panel, m.sums, kBlock, m.d, kBlock / pair_of<T>());
      continue;
    }
    for (int64_t row = 0; row < kBlock; ++row) {
      const Vec shrink = fill(running.shrink[row], Vec{});
      float* o = m.sums + row * m.d;
      for (int64_t i = 0; i < m.d; i += Vec::size) store(o + i, shrink * load(o + i, Vec{}));
    }
    product<T, true>(m.p, m.v + j * panel, m.sums, kBlock, m.d, kBlock / pair_of<T>());
  }
  float* log2_sum = a.log2_sum + (b * a.heads + head) * a.seq + first;
  for (int64_t row = 0; row < count; ++row) {
    const Vec by = fill(1.0f / running.total[row], Vec{});
    T* out = at<T>(a.out, b, first + row, head);
    for (int64_t i = 0; i < m.d; i += Vec::size) store(out + i, by * load(m.sums + row * m.d + i, Vec{}));
    log2_sum[row] = running.most[row] * a.scale * kLog2E + log2f(running.total[row]);
  }
}

template <class T>
bool forward(const AttentionFwd& a, int64_t begin, int64_t end) {
  FwdScratch<T> m(a.seq, a.head_dim);
  if (m.memory == nullptr) return false;
  const int64_t panel = kBlock * m.width, group = a.heads / a.kv_heads;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.kv_heads, g = unit % a.kv_heads;
    for (int64_t j = 0; j < m.blocks; ++j) {
      const int64_t count = rows_in(j, a.seq);
      rows_of(m.q, at<T>(a.k, b, j * kBlock, g), a.k.seq, count, m.d);
      turn(m.k + j * panel, m.q, kBlock, m.width);
      paired_of(m.v + j * panel, at<T>(a.v, b, j * kBlock, g), a.v.seq, count, m.d);
    }
    for (int64_t head = g * group; head < (g + 1) * group; ++head) {
      for (int64_t block = 0; block < m.blocks; ++block) forward_block(a, m, b, head, block);
    }
  }
  return true;
}

// ---- Backward. Scores are recomputed, transposed ([key][query]), so that each product reads its operands as stored.

template <class T>
struct BwdScratch {
  int64_t blocks, d, width;
  Cell *k, *v, *k_turned;                          // by key block
  Cell *q_turned, *q_paired, *do_turned, *do_paired;  // by query block
  Cell *p, *ds, *ds_paired, *spare;
  float *dk, *dv, *dq_turned, *scores, *dp, *delta, *log2_sum;
  Cell* memory;

  BwdScratch(int64_t seq, int64_t head_dim) : blocks((seq + kBlock - 1) / kBlock), d(head_dim), width(head_dim / pair_of<T>()) {
    const int64_t packed = blocks * kBlock * width, wide = blocks * kBlock * d, square = kBlock * kBlock;
    const int64_t cells = 7 * packed + 3 * wide + 5 * square + kBlock * d + 2 * blocks * kBlock;
    memory = static_cast<Cell*>(aligned_alloc(64, cells * sizeof(Cell)));
    Cell* next = memory;
    const auto take = [&next](int64_t count) { return next += count, next - count; };
    k = take(packed), v = take(packed), k_turned = take(packed);
    q_turned = take(packed), q_paired = take(packed), do_turned = take(packed), do_paired = take(packed);
    p = take(square), ds = take(square), ds_paired = take(square), spare = take(kBlock * d);
    dk = floats(take(wide)), dv = floats(take(wide)), dq_turned = floats(take(wide));
    scores = floats(take(square)), dp = floats(take(square));
    delta = floats(take(blocks * kBlock)), log2_sum = floats(take(blocks * kBlock));
  }
  ~BwdScratch() { free(memory); }
};

// P = 2^(scores - log2_sum) and dS = P (dP - delta), both [key][query]: as rows, and dS in pairs of keys besides.
template <class T>
void differentiate(BwdScratch<T>& m, int64_t query, float factor, bool diagonal, const FirstKeys& keys, int64_t start, int64_t count) {
  const Vec by = fill(factor, Vec{});
  for (int64_t key = 0; key < kBlock; ++key) {
    float *s = m.scores + key * kBlock, *dp = m.dp + key * kBlock;
    if (diagonal) {
      for (int64_t i = 0; i < key; ++i) s[i] = kMasked;
    }
    if (keys.most > start + key) {
      for (int64_t i = 0; i < count; ++i) s[i] = keys.of[i] > start + key ? kMasked : s[i];
    }
    for (int64_t i = 0; i < kBlock; i += Vec::size) {
      const Vec p = exp2_of(fma(load(s + i, Vec{}), by, fill(0.0f, Vec{}) - load(m.log2_sum + query + i, Vec{})));
      const Vec ds = p * (load(dp + i, Vec{}) - load(m.delta + query + i, Vec{}));
      if constexpr (pair_of<T>() == 2) {
        store(reinterpret_cast<BFloat16*>(m.p) + key * kBlock + i, p);
        store(reinterpret_cast<BFloat16*>(m.ds) + key * kBlock + i, ds);
      } else {
        store(floats(m.p) + key * kBlock + i, p);
        store(floats(m.ds) + key * kBlock + i, ds);
      }
    }
  }
  if constexpr (pair_of<T>() == 2) {
    paired_of(m.ds_paired, reinterpret_cast<const T*>(m.ds), kBlock, kBlock, kBlock);
  }
}

// Queries, output gradients and what softmax needs of one head, packed.
template <class T>
void pack_head(const AttentionBwd& a, BwdScratch<T>& m, int64_t b, int64_t head) {
  const int64_t panel = kBlock * m.width;
  for (int64_t block = 0; block < m.blocks; ++block) {
    const int64_t first = block * kBlock, count = rows_in(block, a.seq);
    const T *q = at<T>(a.q, b, first, head), *grad = at<T>(a.dout, b, first, head);
    rows_of(m.spare, q, a.q.seq, count, m.d);
    turn(m.q_turned + block * panel, m.spare, kBlock, m.width);
    paired_of(m.q_paired + block * panel, q, a.q.seq, count, m.d);
    rows_of(m.spare, grad, a.dout.seq, count, m.d);
    turn(m.do_turned + block * panel, m.spare, kBlock, m.width);
    paired_of(m.do_paired + block * panel, grad, a.dout.seq, count, m.d);
    for (int64_t row = 0; row < kBlock; ++row) {
      Vec dot = fill(0.0f, Vec{});
      if (row < count) {
        const T *o = at<T>(a.out, b, first + row, head), *g = grad + row * a.dout.seq;
        for (int64_t i = 0; i < m.d; i += Vec::size) dot = fma(load(o + i, Vec{}), load(g + i, Vec{}), dot);
      }
      m.delta[first + row] = sum(dot);
      m.log2_sum[first + row] = row < count ? a.log2_sum[(b * a.heads + head) * a.seq + first + row] : -kMasked;
    }
  }
}

template <class T>
void store_rows(const Heads& to, const float* x, int64_t b, int64_t head, int64_t first, int64_t count, int64_t d, float scale) {
  const Vec by = fill(scale, Vec{});
  for (int64_t row = 0; row < count; ++row) {
    T* y = at<T>(to, b, first + row, head);
    for (int64_t i = 0; i < d; i += Vec::size) store(y + i, by * load(x + row * d + i, Vec{}));
  }
}

// The share of one query head in dk and dv of its key/value head, and its dq.
template <class T>
void backward_head(const AttentionBwd& a, BwdScratch<T>& m, int64_t b, int64_t head) {
  const int64_t panel = kBlock * m.width, wide = kBlock * m.d, pairs = kBlock / pair_of<T>();
  pack_head(a, m, b, head);
  memset(m.dq_turned, 0, m.blocks * wide * sizeof(float));
  for (int64_t j = 0; j < m.blocks; ++j) {
    for (int64_t i = j; i < m.blocks; ++i) {
      const int64_t count = rows_in(i, a.seq);
      const FirstKeys keys(a.first_key == nullptr ? nullptr : a.first_key + b * a.seq, i * kBlock, count);
      if (keys.least >= (j + 1) * kBlock) continue;
      product<T, false>(m.k + j * panel, m.q_turned + i * panel, m.scores, kBlock, kBlock, m.width);
      product<T, false>(m.v + j * panel, m.do_turned + i * panel, m.dp, kBlock, kBlock, m.width);
      differentiate(m, i * kBlock, a.scale * kLog2E, i == j, keys, j * kBlock, count);
      product<T, true>(m.p, m.do_paired + i * panel, m.dv + j * wide, kBlock, m.d, pairs);
      product<T, true>(m.ds, m.q_paired + i * panel, m.dk + j * wide, kBlock, m.d, pairs);
      const Cell* ds = pair_of<T>() == 2 ? m.ds_paired : m.ds;
      product<T, true>(m.k_turned + j * panel, ds, m.dq_turned + i * wide, m.d, kBlock, pairs);
    }
  }
  for (int64_t i = 0; i < m.blocks; ++i) {
    turn(m.spare, reinterpret_cast<const Cell*>(m.dq_turned + i * wide), m.d, kBlock);
    store_rows<T>(a.dq, floats(m.spare), b, head, i * kBlock, rows_in(i, a.seq), m.d, a.scale);
  }
}

template <class T>
bool backward(const AttentionBwd& a, int64_t begin, int64_t end) {
  BwdScratch<T> m(a.seq, a.head_dim);
  if (m.memory == nullptr) return false;
  const int64_t panel = kBlock * m.width, wide = kBlock * m.d, group = a.heads / a.kv_heads;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / a.kv_heads, g = unit % a.kv_heads;
    for (int64_t j = 0; j < m.blocks; ++j) {
      const int64_t count = rows_in(j, a.seq);
      const T* k = at<T>(a.k, b, j * kBlock, g);
      rows_of(m.k + j * panel, k, a.k.seq, count, m.d);
      rows_of(m.v + j * panel, at<T>(a.v, b, j * kBlock, g), a.v.seq, count, m.d);
      paired_of(m.spare, k, a.k.seq, count, m.d);
      turn(m.k_turned + j * panel, m.spare, kBlock / pair_of<T>(), m.d);
    }
    memset(m.dk, 0, m.blocks * wide * sizeof(float));
    memset(m.dv, 0, m.blocks * wide * sizeof(float));
    for (int64_t head = g * group; head < (g + 1) * group; ++head) backward_head(a, m, b, head);
    for (int64_t j = 0; j < m.blocks; ++j) {
      const int64_t count = rows_in(j, a.seq);
      store_rows<T>(a.dk, m.dk + j * wide, b, g, j * kBlock, count, m.d, a.scale);
      store_rows<T>(a.dv, m.dv + j * wide, b, g, j * kBlock, count, m.d, 1.0f);
    }
  }
  return true;
}

template <class Run>
bool with_float_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::bf16: return run(BFloat16{});
    case DType::f16: return run(Half{});
    case DType::f64: break;  // the binding refuses it
  }
  return false;
}

}  // namespace

bool attention_fwd(const AttentionFwd& a, int64_t begin, int64_t end) {
  return with_float_type(a.dtype, [&](auto t) { return forward<decltype(t)>(a, begin, end); });
}

bool attention_bwd(const AttentionBwd& a, int64_t begin, int64_t end) {
  return with_float_type(a.dtype, [&](auto t) { return backward<decltype(t)>(a, begin, end); });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
