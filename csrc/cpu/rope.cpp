// Rotary position embedding, out of place or in place, on the heads of one token after another.
#include "vec.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

// Pairs (i, i + half): (a, b) -> (a cos - b sin, b cos + a sin); turn is 1, or -1 for the inverse. The same head of a later
// token is `later` elements ahead.
template <class How, class T, class V, class S>
inline void rotate_halves(const T* in, T* out, const S* cos, const S* sin, int64_t half, V turn, int64_t later) {
  const auto body = [=](int64_t i, auto n) {
    const V c = load(cos + i, n, V{}), s = load(sin + i, n, V{}) * turn;
    const V a = load(in + i, n, V{}), b = load(in + half + i, n, V{});
    store(out + i, n, fnma(b, s, a * c));
    store(out + half + i, n, fma(a, s, b * c));
  };
  each_vector<V, How>(half, body, in + later, in + half + later);
}

constexpr int64_t kChunk = 256;  // channels whose factors are spread over pairs at a time

// Pairs (2i, 2i + 1): every channel times its cos plus its neighbour times its signed sin.
template <class How, class T, class V, class S>
inline void rotate_pairs(const T* in, T* out, const S* cos, const S* sin, int64_t channels, int64_t later) {
  const auto body = [=](int64_t i, auto n) {
    const V x = load(in + i, n, V{});
    store(out + i, n, fma(swap_pairs(x), load(sin + i, n, V{}), x * load(cos + i, n, V{})));
  };
  each_vector<V, How>(channels, body, in + later);
}

template <class T, class Head>
inline void each_head(const Rope& a, const T* in, T* out, Head head) {
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t i = 0; i < a.heads; ++i) {
      head(in + group * a.in_group + i * a.in_head, out + group * a.out_group + i * a.out_head);
    }
  }
}

// The heads of one token, interleaved pairs.
template <class How, class T, class V, class S>
inline void rotate_token_pairs(const Rope& a, const T* in, T* out, const S* cos, const S* sin) {
  alignas(64) S signs[V::size], spread_cos[kChunk], spread_sin[kChunk];
  for (int64_t i = 0; i < V::size; ++i) signs[i] = (i % 2 == 0) == a.inverse ? S(1) : S(-1);
  for (int64_t start = 0; start < 2 * a.half; start += kChunk) {
    const int64_t channels = 2 * a.half - start < kChunk ? 2 * a.half - start : kChunk;
    each_vector<V>(channels, [&](int64_t i, auto n) {
      store(spread_cos + i, n, load_twice(cos + (start + i) / 2, n, V{}));
      store(spread_sin + i, n, load_twice(sin + (start + i) / 2, n, V{}) * load(signs, V{}));
    });
    each_head(a, in, out, [&](const T* p, T* q) {
      rotate_pairs<How, T, V>(p + start, q + start, spread_cos, spread_sin, channels, a.in_seq);
    });
  }
}

template <class T, class How>
void rotate(const Rope& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  using S = typename V::Scalar;
  const int64_t half = a.half, rest = a.head_dim - 2 * half;
  const V turn = fill(a.inverse ? S(-1) : S(1), V{});
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / a.seq, s = token % a.seq;
    const T* in = static_cast<const T*>(a.in) + b * a.in_batch + s * a.in_seq;
    T* out = static_cast<T*>(a.out) + b * a.out_batch + s * a.out_seq;
    const int64_t position = a.positions == nullptr ? a.offset + s : a.positions[token];
    const S* cos = static_cast<const S*>(a.cos) + position * half;
    const S* sin = static_cast<const S*>(a.sin) + position * half;
    if (a.interleaved) {
      rotate_token_pairs<How, T, V>(a, in, out, cos, sin);
    } else {
      each_head(a, in, out, [=](const T* p, T* q) { rotate_halves<How, T, V>(p, q, cos, sin, half, turn, a.in_seq); });
    }
    if (rest > 0 && a.in != a.out) {
      each_head(a, in, out, [=](const T* p, T* q) {
        copy_bytes(p + 2 * half, q + 2 * half, rest * static_cast<int64_t>(sizeof(T)), How{});
      });
    }
  }
}

// Whether the operator moves more than the caches hold.
template <class T>
bool is_large(const Rope& a) {
  const int64_t moved = a.batch * a.seq * a.groups * a.heads * a.head_dim * static_cast<int64_t>(sizeof(T));
  return beyond_caches(a.in == a.out ? moved : 2 * moved);
}

// Whether the results can go past the caches; in place, a line has just been read.
template <class T>
bool is_streamable(const Rope& a) {
  constexpr int64_t size = sizeof(T);
  return a.in != a.out && aligned(a.out, a.head_dim * size) && aligned(a.out, a.half * size) &&
         aligned(a.out, a.out_batch * size) && aligned(a.out, a.out_seq * size) && aligned(a.out, a.out_group * size) &&
         aligned(a.out, a.out_head * size);
}

}  // namespace

void rope(const Rope& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    if (!is_large<T>(a)) return rotate<T, Full>(a, begin, end);
    if (!is_streamable<T>(a)) return rotate<T, Fetched>(a, begin, end);
    with_stores(true, [&](auto how) { rotate<T, decltype(how)>(a, begin, end); });
  });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
