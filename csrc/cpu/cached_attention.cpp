// Attention of a few new tokens over a key/value cache whose rows have individual lengths and may be ring buffers. One pair of a
// row and a key/value head at a time: a key is read once for all query heads that share it; accumulation is in fp32.
#include <stdlib.h>

#include "vec.h"

#include "decode.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

// 2^t for t <= 0: a polynomial fitted to 2^f on [0, 1), of relative error 1e-8, and the exponent; 0 below 2^-126.
inline float power_of_two(float t) {
  t = t < -126.0f ? -126.0f : t;
  const int32_t floor_t = static_cast<int32_t>(t + 127.0f) - 127;  // rounds down: t + 127 is positive
  const float f = t - static_cast<float>(floor_t);
  float p = 0.00021702254889532924f * f + 0.0012439688434824347f;
  p = p * f + 0.009678840637207031f;
  p = p * f + 0.055483341217041016f;
  p = p * f + 0.24022983014583588f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
  return t <= -126.0f ? 0.0f : p * float_of(static_cast<uint32_t>(floor_t + 127) << 23);
}

// Scores to probabilities, in place but for the division by their sum, which is returned.
inline float exponentials(float* scores, int64_t n) {
  float best = scores[0];
  for (int64_t i = 1; i < n; ++i) best = scores[i] > best ? scores[i] : best;
  for (int64_t i = 0; i < n; ++i) scores[i] = power_of_two(scores[i] - best);
  return sum_vectors<Vec>(n, [&](int64_t i, auto part, Vec acc) { return acc + load(scores + i, part, Vec{}); });
}

// What one pair works with.
template <class T>
struct Pair {
  const CachedAttention& a;
  int64_t row, batch, head;  // of the cache; of the batch; the key/value head

  T* place(void* cache, int64_t position) const {
    return static_cast<T*>(cache) + ((row * a.capacity + position % a.capacity) * a.kv_heads + head) * a.head_dim;
  }
  int32_t position(int64_t token) const { return a.positions[batch * a.new_tokens + token]; }

  void write() const {
    const int64_t bytes = a.head_dim * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < a.new_tokens; ++i) {
      const T* k = static_cast<const T*>(a.k) + batch * a.k_batch + i * a.k_new + head * a.head_dim;
      const T* v = static_cast<const T*>(a.v) + batch * a.v_batch + i * a.v_new + head * a.head_dim;
      memcpy(place(a.keys, position(i)), k, bytes);
      memcpy(place(a.values, position(i)), v, bytes);
    }
  }

  // wide: q in fp32, times scale and log2(e), [shared][head_dim]; scores [shared][count]; sums [shared][head_dim].
  void read(int64_t token, float* wide, float* scores, float* sums) const {
    const int64_t shared = a.heads / a.kv_heads, d = a.head_dim;
    const int64_t last = position(token), from = a.window > 0 && last >= a.window ? last - a.window + 1 : 0;
    const int64_t count = last - from + 1;
    const T* q = static_cast<const T*>(a.q) + batch * a.q_batch + token * a.q_new + head * shared * d;
    for (int64_t i = 0; i < shared * d; ++i) wide[i] = widen(q[i]) * (a.scale * 1.44269504088896341f);
    for (int64_t j = 0; j < count; ++j) {
      const T* k = place(a.keys, from + j);
      for (int64_t h = 0; h < shared; ++h) {
        Vec acc = fill(0.0f, Vec{});
        for (int64_t c = 0; c < d; c += Vec::size) acc = fma(load(wide + h * d + c, Vec{}), load(k + c, Vec{}), acc);
        scores[h * count + j] = sum(acc);
      }
    }
    T* out = static_cast<T*>(a.out) + ((batch * a.new_tokens + token) * a.heads + head * shared) * d;
    for (int64_t h = 0; h < shared; ++h) {
      const float total = exponentials(scores + h * count, count);
      for (int64_t c = 0; c < d; c += Vec::size) store(sums + c, fill(0.0f, Vec{}));
      for (int64_t j = 0; j < count; ++j) {
        const Vec p = fill(scores[h * count + j], Vec{});
        const T* v = place(a.values, from + j);
        for (int64_t c = 0; c < d; c += Vec::size) store(sums + c, fma(p, load(v + c, Vec{}), load(sums + c, Vec{})));
      }
      const Vec share = fill(1.0f / total, Vec{});
      for (int64_t c = 0; c < d; c += Vec::size) store(out + h * d + c, load(sums + c, Vec{}) * share);
    }
  }
};

template <class T>
bool pairs(const CachedAttention& a, int64_t begin, int64_t end) {
  const int64_t shared = a.heads / a.kv_heads;
  int64_t longest = 0;
  for (int64_t i = 0; i < a.batch * a.new_tokens; ++i) longest = a.positions[i] >= longest ? a.positions[i] + 1 : longest;
  float* memory = static_cast<float*>(malloc(sizeof(float) * (shared * (a.head_dim + longest) + a.head_dim)));
  if (memory == nullptr) return false;
  float* scores = memory + shared * a.head_dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / a.kv_heads;
    const Pair<T> pair{a, a.rows[batch], batch, i % a.kv_heads};
    pair.write();
    for (int64_t token = 0; token < a.new_tokens; ++token) pair.read(token, memory, scores, scores + shared * longest);
  }
  free(memory);
  return true;
}

}  // namespace

bool cached_attention(const CachedAttention& a, int64_t begin, int64_t end) {
  bool good = true;
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!__is_same(T, double)) good = pairs<T>(a, begin, end);
  });
  return good;
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
