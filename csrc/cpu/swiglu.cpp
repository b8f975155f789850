// SwiGLU on a packed [gate | up] row, forward and backward; the activation is computed again in the backward pass.
#include "vec.h"

namespace megatronish {
namespace MEGATRONISH_LEVEL {
namespace {

template <class T>
void forward(const SwigluFwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.width;
    const T* up = gate + a.width;
    T* y = static_cast<T*>(a.y) + row * a.width;
    each_vector<V>(a.width, [=](int64_t i, auto n) {
      const V g = load(gate + i, n, V{});
      store(y + i, n, g * reciprocal<T>(one_plus_exp_neg<T>(g)) * load(up + i, n, V{}));
    });
  }
}

template <class T>
void backward(const SwigluBwd& a, int64_t begin, int64_t end) {
  using V = typename VecOf<T>::type;
  const V one = fill(typename V::Scalar(1), V{});
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.width;
    const T* up = gate + a.width;
    const T* dy = static_cast<const T*>(a.dy) + row * a.width;
    T* dgate = static_cast<T*>(a.dgate_up) + row * 2 * a.width;
    T* dup = dgate + a.width;
    T* y = a.y == nullptr ? nullptr : static_cast<T*>(a.y) + row * a.width;
    each_vector<V>(a.width, [=](int64_t i, auto n) {
      const V g = load(gate + i, n, V{}), u = load(up + i, n, V{}), grad = load(dy + i, n, V{});
      const V sigmoid = reciprocal<T>(one_plus_exp_neg<T>(g));
      const V silu = g * sigmoid;
      store(dup + i, n, grad * silu);
      store(dgate + i, n, grad * u * fma(silu, one - sigmoid, sigmoid));
      if (y != nullptr) store(y + i, n, silu * u);
    });
  }
}

}  // namespace

void swiglu_fwd(const SwigluFwd& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}

void swiglu_bwd(const SwigluBwd& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MEGATRONISH_LEVEL
}  // namespace megatronish
