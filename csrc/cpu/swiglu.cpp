// SwiGLU on a packed [gate | up] row, forward and backward; the activation is computed again in the backward pass.
#include "vec.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

template <class T, class How>
void forward(const SwigluFwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  const int64_t later = ahead<T>(2 * a.width);
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.width;
    const T* up = gate + a.width;
    T* y = static_cast<T*>(a.y) + row * a.width;
    const auto body = [=](int64_t i, auto n) {
      const V g = load(gate + i, n, V{});
      store(y + i, n, g * reciprocal<T>(one_plus_exp_neg<T>(g)) * load(up + i, n, V{}));
    };
    each_vector<V, How>(a.width, body, gate + later, up + later);
  }
}

template <class T, class How>
void backward(const SwigluBwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  const V one = fill(typename V::Scalar(1), V{});
  const int64_t later = ahead<T>(2 * a.width), later_dy = ahead<T>(a.width);
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.width;
    const T* up = gate + a.width;
    const T* dy = static_cast<const T*>(a.dy) + row * a.width;
    T* dgate = static_cast<T*>(a.dgate_up) + row * 2 * a.width;
    T* dup = dgate + a.width;
    T* y = a.y == nullptr ? nullptr : static_cast<T*>(a.y) + row * a.width;
    const auto body = [=](int64_t i, auto n) {
      const V g = load(gate + i, n, V{}), u = load(up + i, n, V{}), grad = load(dy + i, n, V{});
      const V sigmoid = reciprocal<T>(one_plus_exp_neg<T>(g));
      const V silu = g * sigmoid;
      store(dup + i, n, grad * silu);
      store(dgate + i, n, grad * u * fma(silu, one - sigmoid, sigmoid));
      if (y != nullptr) store(y + i, n, silu * u);
    };
    each_vector<V, How>(a.width, body, gate + later, up + later, dy + later_dy);
  }
}

}  // namespace

void swiglu_fwd(const SwigluFwd& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t bytes = a.width * static_cast<int64_t>(sizeof(T));
    const bool streamed = beyond_caches(3 * a.rows * bytes) && aligned(a.y, bytes);
    with_stores(streamed, [&](auto how) { forward<T, decltype(how)>(a, begin, end); });
  });
}

void swiglu_bwd(const SwigluBwd& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t bytes = a.width * static_cast<int64_t>(sizeof(T));
    const bool streamed = beyond_caches(5 * a.rows * bytes) && aligned(a.dgate_up, bytes) && aligned(a.y, bytes);
    with_stores(streamed, [&](auto how) { backward<T, decltype(how)>(a, begin, end); });
  });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
