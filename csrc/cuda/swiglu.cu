// SwiGLU on a packed [gate | up] row, forward and backward: one thread an item of 128 bits.
#include "common.cuh"

namespace megatronish {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ double sigmoid(double x, double) { return 1.0 / (1.0 + exp(-x)); }
__device__ __forceinline__ float sigmoid(float x, float) { return 1.0f / (1.0f + expf(-x)); }
// Results of 16 bits do not show the few units in the last place of fp32 that the fast functions are off by.
template <class T>
__device__ __forceinline__ float sigmoid(float x, T) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// Item -> its row and its first channel; Index is 32-bit where the number of items allows it: division is slow.
template <int N, class Index>
struct Place {
  int64_t row, column;
  __device__ __forceinline__ Place(Index item, Index items_a_row)
      : row(item / items_a_row), column(static_cast<int64_t>(item % items_a_row) * N) {}
};

template <class T, int N, class Index>
__global__ void __launch_bounds__(kThreads) forward(SwigluFwd a, Index items) {
  const Index item = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items) return;
  const Place<N, Index> at(item, static_cast<Index>(a.width / N));
  const T* gate = static_cast<const T*>(a.gate_up) + at.row * 2 * a.width + at.column;
  const auto g = load<N>(gate), u = load<N>(gate + a.width);
  Pack<T, N> y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const auto x = widen(g.v[i]);
    y.v[i] = narrow<T>(x * sigmoid(x, T{}) * widen(u.v[i]));
  }
  store(static_cast<T*>(a.y) + at.row * a.width + at.column, y);
}

template <class T, int N, class Index>
__global__ void __launch_bounds__(kThreads) backward(SwigluBwd a, Index items) {
  const Index item = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items) return;
  const Place<N, Index> at(item, static_cast<Index>(a.width / N));
  const int64_t packed = at.row * 2 * a.width + at.column, plain = at.row * a.width + at.column;
  const T* gate = static_cast<const T*>(a.gate_up) + packed;
  const auto g = load<N>(gate), u = load<N>(gate + a.width), dy = load<N>(static_cast<const T*>(a.dy) + plain);
  Pack<T, N> dgate, dup, y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const auto x = widen(g.v[i]), up = widen(u.v[i]), grad = widen(dy.v[i]);
    const auto s = sigmoid(x, T{}), silu = x * s;
    dup.v[i] = narrow<T>(grad * silu);
    dgate.v[i] = narrow<T>(grad * up * (s + silu * (1 - s)));
    y.v[i] = narrow<T>(silu * up);
  }
  T* out = static_cast<T*>(a.dgate_up) + packed;
  store(out, dgate);
  store(out + a.width, dup);
  if (a.y != nullptr) store(static_cast<T*>(a.y) + plain, y);
}

template <int N>
struct Size {
  static constexpr int n = N;
};

// Calls run(pack size, index type) that fit the width, the alignment and the number of elements.
template <class T, class Run>
int choose(int64_t rows, int64_t width, bool all_aligned, Run run) {
  const bool packed = all_aligned && width % kPerVector<T> == 0;
  const int64_t items = rows * (packed ? width / kPerVector<T> : width);
  if (items == 0) return 0;
  return on_grid((items + kThreads - 1) / kThreads, [&](unsigned blocks) {
    const bool small = items <= 0x7FFFFFFF - kThreads;
    if (packed && small) run(Size<kPerVector<T>>{}, static_cast<uint32_t>(items), blocks);
    if (packed && !small) run(Size<kPerVector<T>>{}, items, blocks);
    if (!packed && small) run(Size<1>{}, static_cast<uint32_t>(items), blocks);
    if (!packed && !small) run(Size<1>{}, items, blocks);
  });
}

}  // namespace

int swiglu_fwd(const SwigluFwd& a, void* stream) {
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    return choose<T>(a.rows, a.width, aligned(a.gate_up) && aligned(a.y), [&](auto n, auto items, unsigned blocks) {
      forward<T, decltype(n)::n><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, items);
    });
  });
}

int swiglu_bwd(const SwigluBwd& a, void* stream) {
  const bool all_aligned = aligned(a.gate_up) && aligned(a.dy) && aligned(a.dgate_up) && aligned(a.y);
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    return choose<T>(a.rows, a.width, all_aligned, [&](auto n, auto items, unsigned blocks) {
      backward<T, decltype(n)::n><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, items);
    });
  });
}

}  // namespace cuda
}  // namespace megatronish
