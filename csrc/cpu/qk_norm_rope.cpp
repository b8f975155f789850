// RMSNorm of every q and k head of a packed projection, then its rotation, in one pass; and the way back to one gradient of
// the packed projection.
#include "vec.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// weight + offset of one kind of head, widened once a call instead of once a head.
template <class S>
struct Factors {
  S of[kMaxNormedHeadDim];

  Factors(const QkHeads& a, const void* weight) {
    if (a.w_dtype == DType::f32) {
      fill_from(static_cast<const float*>(weight), a);
    } else {
      with_type(a.dtype, [&](auto t) { fill_from(static_cast<const decltype(t)*>(weight), a); });
    }
  }

 private:
  template <class W>
  void fill_from(const W* weight, const QkHeads& a) {
    for (int64_t i = 0; i < a.head_dim; ++i) of[i] = S(widen(weight[i])) + S(a.w_offset);
  }
};

// The angles of one token; `turn` is 1, or -1 for the rotation back.
template <class S>
struct Angles {
  const S *cos, *sin;
  S turn;
  S spread_cos[kMaxNormedHeadDim], spread_sin[kMaxNormedHeadDim];  // for neighbouring pairs: one a channel, sin signed

  void set(const QkHeads& a, int64_t token) {
    const int64_t position = a.positions == nullptr ? a.offset + token % a.seq : a.positions[token];
    cos = static_cast<const S*>(a.cos) + position * a.half;
    sin = static_cast<const S*>(a.sin) + position * a.half;
    for (int64_t i = 0; a.interleaved && i < a.half; ++i) {
      spread_cos[2 * i] = spread_cos[2 * i + 1] = cos[i];
      spread_sin[2 * i] = -turn * sin[i];
      spread_sin[2 * i + 1] = turn * sin[i];
    }
  }
};

// Rotates what get(channel, How or Part) gives and hands it to put(channel, How or Part, vector).
template <class V, class How = Full, class S, class Get, class Put>
inline void rotate(const QkHeads& a, const Angles<S>& angles, Get get, Put put) {
  // By value all of it: a vector store may alias anything, and what is read through a reference is read again after each.
  const int64_t half = a.half, rotated = 2 * half, width = a.head_dim;
  if (!a.interleaved) {
    const V turn = fill(angles.turn, V{});
    const S *cos = angles.cos, *sin = angles.sin;
    each_vector<V, How>(half, [=](int64_t i, auto n) {
      const V c = load(cos + i, n, V{}), s = load(sin + i, n, V{}) * turn;
      const V x = get(i, n), y = get(half + i, n);
      put(i, n, fnma(y, s, x * c));
      put(half + i, n, fma(x, s, y * c));
    });
  } else {
    const S *cos = angles.spread_cos, *sin = angles.spread_sin;
    each_vector<V, How>(rotated, [=](int64_t i, auto n) {
      const V x = get(i, n);
      put(i, n, fma(swap_pairs(x), load(sin + i, n, V{}), x * load(cos + i, n, V{})));
    });
  }
  each_vector<V, How>(width - rotated, [=](int64_t i, auto n) { put(rotated + i, n, get(rotated + i, n)); });
}

// Calls head(number among all heads, number among q and k heads, whether it is a q head, number among its kind).
template <class Head>
inline void each_head(const QkHeads& a, Head head) {
  const int64_t normed = a.q_heads + a.k_heads, all = normed + a.v_heads;
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t i = 0; i < a.q_heads; ++i) head(group * all + i, group * normed + i, true, group * a.q_heads + i);
    for (int64_t i = 0; i < a.k_heads; ++i) {
      head(group * all + a.q_heads + i, group * normed + a.q_heads + i, false, group * a.k_heads + i);
    }
  }
}

template <class T, class How>
void forward(const QkNormRopeFwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  using S = typename V::Scalar;
  const int64_t width = a.head_dim, normed = a.groups * (a.q_heads + a.k_heads);
  const Factors<S> q_factors(a, a.q_weight), k_factors(a, a.k_weight);
  Angles<S> angles;
  angles.turn = S(1);
  for (int64_t token = begin; token < end; ++token) {
    const T* in = static_cast<const T*>(a.qkv) + token / a.seq * a.qkv_batch + token % a.seq * a.qkv_seq;
    S* rstd = static_cast<S*>(a.rstd) + token * normed;
    T* q = static_cast<T*>(a.q) + token * a.groups * a.q_heads * width;
    T* k = static_cast<T*>(a.k) + token * a.groups * a.k_heads * width;
    // All heads' sums before the first rotation: none then waits for the square root of its own.
    each_head(a, [&](int64_t head, int64_t number, bool, int64_t) {
      const T* x = in + head * width;
      if constexpr (__is_same(How, Streamed)) {
        for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(x + a.qkv_seq + i, 0, 2);
      }
      const S squares = sum_vectors<V>(width, [=](int64_t i, auto n, V total) {
        const V h = load(x + i, n, V{});
        return fma(h, h, total);
      });
      rstd[number] = S(1) / root(squares / S(width) + S(a.eps));
    });
    angles.set(a, token);
    each_head(a, [&](int64_t head, int64_t number, bool is_q, int64_t of_kind) {
      const T* x = in + head * width;
      T* y = (is_q ? q : k) + of_kind * width;
      const S* w = (is_q ? q_factors : k_factors).of;
      const V factor = fill(rstd[number], V{});
      rotate<V, How>(
          a, angles, [=](int64_t i, auto n) { return load(x + i, n, V{}) * factor * load(w + i, n, V{}); },
          [=](int64_t i, auto n, V value) { store(y + i, n, value); });
    });
  }
}

// One head: dy is rotated back into `grad`; then dx as in RMSNorm, and this head's part of the weight gradient added to
// `partial` (when not null).
template <class T, class V, class S>
inline void backward_head(const QkHeads& a, const Angles<S>& angles, const T* dy, const T* x, const S* w, S rstd, T* dx,
                          S* partial) {
  S buffer[kMaxNormedHeadDim];
  S* const grad = buffer;
  rotate<V>(
      a, angles, [=](int64_t i, auto n) { return load(dy + i, n, V{}); },
      [=](int64_t i, auto n, V value) { store(grad + i, n, value); });
  const V factor = fill(rstd, V{});
  const S dot = sum_vectors<V>(a.head_dim, [=](int64_t i, auto n, V total) {
    const V product = load(grad + i, n, V{}) * (load(x + i, n, V{}) * factor);
    if (partial != nullptr) store(partial + i, n, load(partial + i, n, V{}) + product);
    return fma(product, load(w + i, n, V{}), total);
  });
  const V mean = fill(dot / S(a.head_dim), V{});
  each_vector<V>(a.head_dim, [=](int64_t i, auto n) {
    const V normed = load(x + i, n, V{}) * factor;
    store(dx + i, n, fnma(normed, mean, load(grad + i, n, V{}) * load(w + i, n, V{})) * factor);
  });
}

template <class T>
void copy_v(const QkNormRopeBwd& a, const T* dv, T* out) {
  const int64_t normed = a.q_heads + a.k_heads, all = normed + a.v_heads;
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t i = 0; i < a.v_heads; ++i) {
      memcpy(out + (group * all + normed + i) * a.head_dim, dv + (group * a.v_heads + i) * a.dv_head,
             a.head_dim * sizeof(T));
    }
  }
}

template <class T>
void backward(const QkNormRopeBwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  using S = typename V::Scalar;
  const int64_t width = a.head_dim, normed = a.groups * (a.q_heads + a.k_heads), tokens = a.batch * a.seq;
  const Factors<S> q_factors(a, a.q_weight), k_factors(a, a.k_weight);
  Angles<S> angles;
  angles.turn = S(-1);
  for (int64_t part = begin; part < end; ++part) {
    S* sums[2] = {nullptr, nullptr};  // of the k heads, of the q heads
    for (int kind = 0; a.partial != nullptr && kind < 2; ++kind) {
      S* partial = sums[kind] = static_cast<S*>(a.partial) + ((1 - kind) * a.partitions + part) * width;
      each_vector<V>(width, [=](int64_t i, auto n) { store(partial + i, n, fill(S(0), V{})); });
    }
    const int64_t last = tokens * (part + 1) / a.partitions;
    for (int64_t token = tokens * part / a.partitions; token < last; ++token) {
      const int64_t b = token / a.seq, s = token % a.seq;
      const T* in = static_cast<const T*>(a.qkv) + b * a.qkv_batch + s * a.qkv_seq;
      const T* dq = static_cast<const T*>(a.dq) + b * a.dq_batch + s * a.dq_seq;
      const T* dk = static_cast<const T*>(a.dk) + b * a.dk_batch + s * a.dk_seq;
      const S* rstd = static_cast<const S*>(a.rstd) + token * normed;
      T* out = static_cast<T*>(a.dqkv) + token * a.groups * (a.q_heads + a.k_heads + a.v_heads) * width;
      angles.set(a, token);
      each_head(a, [&](int64_t head, int64_t number, bool is_q, int64_t of_kind) {
        const T* dy = is_q ? dq + of_kind * a.dq_head : dk + of_kind * a.dk_head;
        const S* w = (is_q ? q_factors : k_factors).of;
        backward_head<T, V>(a, angles, dy, in + head * width, w, rstd[number], out + head * width, sums[is_q]);
      });
      copy_v(a, static_cast<const T*>(a.dv) + b * a.dv_batch + s * a.dv_seq, out);
    }
  }
}

}  // namespace

void qk_norm_rope_fwd(const QkNormRopeFwd& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int64_t size = sizeof(T);
    const int64_t moved = 2 * a.batch * a.seq * a.groups * (a.q_heads + a.k_heads) * a.head_dim * size;
    const bool streamed = beyond_caches(moved) && aligned(a.q, a.head_dim * size) && aligned(a.k, a.half * size);
    with_stores(streamed, [&](auto how) { forward<T, decltype(how)>(a, begin, end); });
  });
}

void qk_norm_rope_bwd(const QkNormRopeBwd& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
