// RMSNorm forward and backward, with or without a fused residual, a row at a time: the second look at a row is in cache.
#include "vec.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

constexpr int kRows = 4;  // rows taken together

// The forward pass processes rows of up to this many bytes together, so that their sums overlap.
constexpr int64_t kShortRow = 2048;

// The backward pass takes a row at a time while what it touches of a row fits the first-level cache, else four, so that the
// weight and the sums for dw come from the second level once for four rows.
constexpr int64_t kFirstLevelCache = 32768;

// Widest row that is kept on the stack: x + residual in addition to streamed results, or the weight in fp32.
constexpr int64_t kKept = 8192;

// The factor of a channel: weight + offset, or 1 without a weight.
template <class W, class V>
struct Factor {
  const W* w;
  V offset;
  template <class Count>
  V at(int64_t i, Count n) const {
    return w == nullptr ? offset : load(w + i, n, V{}) + offset;
  }
};

template <class V, class W>
inline Factor<W, V> factor(const void* w, double offset) {
  using S = typename V::Scalar;
  return {static_cast<const W*>(w), fill(w == nullptr ? S(1) : S(offset), V{})};
}

// rstd of one row. With a residual, `rounded` becomes x + residual and the row is that.
template <class T, class V>
inline typename V::Scalar norm_of(const RmsNormFwd& a, const T* x, const T* residual, T* rounded) {
  using S = typename V::Scalar;
  const auto plain = [=](int64_t i, auto n, V total) {
    const V h = load(x + i, n, V{});
    return fma(h, h, total);
  };
  const auto added = [=](int64_t i, auto n, V total) {
    store(rounded + i, n, load(x + i, n, V{}) + load(residual + i, n, V{}));
    const V h = load(rounded + i, n, V{});
    return fma(h, h, total);
  };
  const S squares = residual == nullptr ? sum_vectors<V>(a.width, plain) : sum_vectors<V>(a.width, added);
  return S(1) / root(squares / S(a.width) + S(a.eps));
}

// Rows `row` to `row + R - 1`.
template <int R, class How, class T, class W, class V>
inline void forward_rows(const RmsNormFwd& a, Factor<W, V> scale, int64_t row) {
  using S = typename V::Scalar;
  constexpr bool streamed = __is_same(How, Streamed);
  const int64_t width = a.width, first = row * width;
  const int64_t later = R * ahead<T>(width);
  const T* x = static_cast<const T*>(a.x) + first;
  const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + first;
  T* y = static_cast<T*>(a.y) + first;
  T* res_out = residual == nullptr ? nullptr : static_cast<T*>(a.res_out) + first;
  alignas(64) T kept[streamed ? kKept : 1];  // what is streamed to res_out cannot be had from there again at once
  T* const rounded = streamed ? kept : res_out;
  S* rstd = static_cast<S*>(a.rstd) + row;
  for (int64_t r = 0; r < R; ++r) {
    rstd[r] = norm_of<T, V>(a, x + r * width, residual == nullptr ? nullptr : residual + r * width, rounded + r * width);
  }
  for (int64_t start = 0; start < R * width; start += width) {
    const V factor = fill(*rstd++, V{});
    const auto plain = [&](int64_t i, auto n) {
      store(y + start + i, n, load(x + start + i, n, V{}) * factor * scale.at(i, n));
    };
    const auto added = [&](int64_t i, auto n) {
      const V h = load(rounded + start + i, n, V{});
      if constexpr (streamed) store(res_out + start + i, n, h);
      store(y + start + i, n, h * factor * scale.at(i, n));
    };
    if (residual == nullptr) {
      each_vector<V, How>(width, plain, x + start + later);
    } else {
      each_vector<V, How>(width, added, x + start + later, residual + start + later);
    }
  }
}

// T: elements, W: weight.
template <class T, class W, class How>
void forward(const RmsNormFwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  const auto scale = factor<V, W>(a.w, a.w_offset);
  const bool together = a.width * static_cast<int64_t>(sizeof(T)) <= kShortRow;
  int64_t row = begin;
  for (; together && row + kRows <= end; row += kRows) forward_rows<kRows, How, T, W, V>(a, scale, row);
  for (; row < end; ++row) forward_rows<1, How, T, W, V>(a, scale, row);
}

// Rows `row` to `row + R - 1` side by side, which share the loads of the weight and of `partial`: dx, and their part of dw
// added to `partial` (when not null).
template <int R, class How, class T, class W, class V>
inline void backward_rows(const RmsNormBwd& a, Factor<W, V> scale, int64_t row, typename V::Scalar* partial) {
  using S = typename V::Scalar;
  const int64_t width = a.width, first = row * width;
  const T* x = static_cast<const T*>(a.x) + first;
  const T* dy = static_cast<const T*>(a.dy) + first;
  const T* dres = a.dres == nullptr ? nullptr : static_cast<const T*>(a.dres) + first;
  T* dx = static_cast<T*>(a.dx) + first;
  const S* rstd = static_cast<const S*>(a.rstd) + row;
  V factors[R], sums[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    factors[r] = fill(rstd[r], V{});
    sums[r] = fill(S(0), V{});
  }
  each_vector<V>(width, [&](int64_t i, auto n) {
    const V w = scale.at(i, n);
    V products = fill(S(0), V{});
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V product = load(dy + r * width + i, n, V{}) * (load(x + r * width + i, n, V{}) * factors[r]);
      sums[r] = fma(product, w, sums[r]);
      products = products + product;
    }
    if (partial != nullptr) store(partial + i, n, load(partial + i, n, V{}) + products);
  });
  S mean[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) mean[r] = sum(sums[r]) / S(width);
  const int64_t later = R * ahead<T>(width);
  for (int r = 0; r < R; ++r) {  // one by one: few streams of stores may be open at a time
    const int64_t start = r * width;
    const V factor = fill(rstd[r], V{}), projection = fill(mean[r], V{});
    const auto body = [&](int64_t i, auto n) {
      const V normed = load(x + start + i, n, V{}) * factor;
      const V grad = fnma(normed, projection, load(dy + start + i, n, V{}) * scale.at(i, n));
      store(dx + start + i, n, dres == nullptr ? grad * factor : fma(grad, factor, load(dres + start + i, n, V{})));
    };
    const T* third = dres == nullptr ? x : dres;
    each_vector<V, How>(width, body, x + start + later, dy + start + later, third + start + later);
  }
}

template <class T, class W, class How>
void backward(const RmsNormBwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  using S = typename V::Scalar;
  const auto scale = factor<V, W>(a.w, a.w_offset);
  const bool wide = a.width * static_cast<int64_t>(2 * sizeof(T) + sizeof(W) + sizeof(S)) > kFirstLevelCache;
  for (int64_t part = begin; part < end; ++part) {
    S* partial = a.partial == nullptr ? nullptr : static_cast<S*>(a.partial) + part * a.width;
    if (partial != nullptr) {
      each_vector<V>(a.width, [=](int64_t i, auto n) { store(partial + i, n, fill(S(0), V{})); });
    }
    const int64_t last = a.rows * (part + 1) / a.partitions;
    int64_t row = a.rows * part / a.partitions;
    for (; wide && row + kRows <= last; row += kRows) backward_rows<kRows, How, T, W, V>(a, scale, row, partial);
    for (; row < last; ++row) backward_rows<1, How, T, W, V>(a, scale, row, partial);
  }
}

// Columns begin to end of dw: the partitions' sums added in order.
template <class S, class W>
void sum_partitions(const RmsNormBwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<S>::type;
  const S* partial = static_cast<const S*>(a.partial) + begin;
  W* dw = static_cast<W*>(a.dw) + begin;
  each_vector<V>(end - begin, [=](int64_t i, auto n) {
    V total = fill(S(0), V{});
    for (int64_t part = 0; part < a.partitions; ++part) total = total + load(partial + part * a.width + i, n, V{});
    store(dw + i, n, total);
  });
}

// Calls run(a, W{}), or where 16-bit weights serve for several rows, run(a with the weight in fp32, float{}).
template <class W, class Args, class Run>
inline void with_wide_weight(const Args& a, int64_t rows, Run run) {
  if constexpr (sizeof(W) == 2) {
    if (a.w != nullptr && rows >= kRows && a.width <= kKept) {
      const W* w = static_cast<const W*>(a.w);
      alignas(64) float wide[kKept];
      each_vector<Vec>(a.width, [&](int64_t i, auto n) { store(wide + i, n, load(w + i, n, Vec{})); });
      Args with = a;
      with.w = wide;
      return run(with, float{});
    }
  }
  run(a, W{});
}

// Calls run(T{}, W{}): the weight has the elements' type, or fp32.
template <class Run>
inline void with_types(DType dtype, DType w_dtype, Run run) {
  with_type(dtype, [=](auto t) {
    using T = decltype(t);
    if (w_dtype == dtype) {
      run(T{}, T{});
    } else {
      run(T{}, float{});
    }
  });
}

}  // namespace

void rms_norm_fwd(const RmsNormFwd& a, int64_t begin, int64_t end) {
  with_types(a.dtype, a.w_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    const int64_t bytes = a.width * static_cast<int64_t>(sizeof(T));
    const bool added = a.residual != nullptr;
    const bool streamed = beyond_caches((added ? 4 : 2) * a.rows * bytes) && aligned(a.y, bytes) &&
                          (!added || (aligned(a.res_out, bytes) && a.width <= kKept));
    with_stores(streamed, [&](auto how) {
      with_wide_weight<decltype(w)>(a, end - begin, [&](const RmsNormFwd& args, auto wide) {
        forward<T, decltype(wide), decltype(how)>(args, begin, end);
      });
    });
  });
}

void rms_norm_bwd(const RmsNormBwd& a, int64_t begin, int64_t end) {
  with_types(a.dtype, a.w_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    const int64_t bytes = a.width * static_cast<int64_t>(sizeof(T));
    const bool streamed = beyond_caches((a.dres == nullptr ? 3 : 4) * a.rows * bytes) && aligned(a.dx, bytes);
    with_stores(streamed, [&](auto how) {
      with_wide_weight<decltype(w)>(a, a.rows * (end - begin) / a.partitions, [&](const RmsNormBwd& args, auto wide) {
        backward<T, decltype(wide), decltype(how)>(args, begin, end);
      });
    });
  });
}

void rms_norm_bwd_dw(const RmsNormBwd& a, int64_t begin, int64_t end) {
  with_types(a.dtype, a.w_dtype, [&](auto t, auto w) {
    using S = typename VecOf<decltype(t)>::type::Scalar;
    sum_partitions<S, decltype(w)>(a, begin, end);
  });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
