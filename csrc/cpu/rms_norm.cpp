// RMSNorm forward and backward, with or without a fused residual, a row at a time: the second look at a row is in cache.
#include "vec.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// The backward pass takes a row at a time while what it touches of a row fits the first-level cache, else four, so that the
// weight and the sums for dw come from the second level once for four rows.
constexpr int kRows = 4;
constexpr int64_t kFirstLevelCache = 32768;

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

// T: elements, W: weight.
template <class T, class W>
void forward(const RmsNormFwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  using S = typename V::Scalar;
  const int64_t width = a.width;
  const auto scale = factor<V, W>(a.w, a.w_offset);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * width;
    T* y = static_cast<T*>(a.y) + row * width;
    S squares;
    if (a.residual != nullptr) {
      const T* residual = static_cast<const T*>(a.residual) + row * width;
      T* rounded = static_cast<T*>(a.res_out) + row * width;
      squares = sum_vectors<V>(width, [=](int64_t i, auto n, V total) {
        store(rounded + i, n, load(x + i, n, V{}) + load(residual + i, n, V{}));
        const V h = load(rounded + i, n, V{});
        return fma(h, h, total);
      });
      x = rounded;
    } else {
      squares = sum_vectors<V>(width, [=](int64_t i, auto n, V total) {
        const V h = load(x + i, n, V{});
        return fma(h, h, total);
      });
    }
    const S rstd = S(1) / root(squares / S(width) + S(a.eps));
    static_cast<S*>(a.rstd)[row] = rstd;
    const V factor = fill(rstd, V{});
    each_vector<V>(width, [=](int64_t i, auto n) { store(y + i, n, load(x + i, n, V{}) * factor * scale.at(i, n)); });
  }
}

// Rows `row` to `row + R - 1` side by side, which share the loads of the weight and of `partial`: dx, and their part of dw
// added to `partial` (when not null).
template <int R, class T, class W, class V>
inline void backward_rows(const RmsNormBwd& a, const Factor<W, V>& scale, int64_t row, typename V::Scalar* partial) {
  using S = typename V::Scalar;
  const int64_t width = a.width, first = row * width;
  const T* x = static_cast<const T*>(a.x) + first;
  const T* dy = static_cast<const T*>(a.dy) + first;
  const T* dres = a.dres == nullptr ? nullptr : static_cast<const T*>(a.dres) + first;
  T* dx = static_cast<T*>(a.dx) + first;
  V rstd[R], mean[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    rstd[r] = fill(static_cast<const S*>(a.rstd)[row + r], V{});
    mean[r] = fill(S(0), V{});
  }
  each_vector<V>(width, [&](int64_t i, auto n) {
    const V w = scale.at(i, n);
    V products = fill(S(0), V{});
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V product = load(dy + r * width + i, n, V{}) * (load(x + r * width + i, n, V{}) * rstd[r]);
      mean[r] = fma(product, w, mean[r]);
      products = products + product;
    }
    if (partial != nullptr) store(partial + i, n, load(partial + i, n, V{}) + products);
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) mean[r] = fill(sum(mean[r]) / S(width), V{});
  each_vector<V>(width, [&](int64_t i, auto n) {
    const V w = scale.at(i, n);
    if constexpr (R > 1) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(x + (R + r) * width + i);
        __builtin_prefetch(dy + (R + r) * width + i);
      }
    }
    V grad[R];  // all loads before all stores: a load behind a store of the same address modulo 4096 has to wait
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V normed = load(x + r * width + i, n, V{}) * rstd[r];
      grad[r] = fnma(normed, mean[r], load(dy + r * width + i, n, V{}) * w) * rstd[r];
      if (dres != nullptr) grad[r] = grad[r] + load(dres + r * width + i, n, V{});
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(dx + r * width + i, n, grad[r]);
  });
}

template <class T, class W>
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
    for (; wide && row + kRows <= last; row += kRows) backward_rows<kRows, T, W, V>(a, scale, row, partial);
    for (; row < last; ++row) backward_rows<1, T, W, V>(a, scale, row, partial);
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
  with_types(a.dtype, a.w_dtype, [&](auto t, auto w) { forward<decltype(t), decltype(w)>(a, begin, end); });
}

void rms_norm_bwd(const RmsNormBwd& a, int64_t begin, int64_t end) {
  with_types(a.dtype, a.w_dtype, [&](auto t, auto w) { backward<decltype(t), decltype(w)>(a, begin, end); });
}

void rms_norm_bwd_dw(const RmsNormBwd& a, int64_t begin, int64_t end) {
  with_types(a.dtype, a.w_dtype, [&](auto t, auto w) {
    using S = typename VecOf<decltype(t)>::type::Scalar;
    sum_partitions<S, decltype(w)>(a, begin, end);
  });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
