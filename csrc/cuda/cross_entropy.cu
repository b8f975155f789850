// Cross-entropy over the vocabulary (or a shard of it): one block a row for its statistics, blocks of a few thousand logits
// for the gradient written over them.
#include "common.cuh"

namespace megatronish {
namespace cuda {
namespace {

constexpr int kForwardThreads = 512;
constexpr int kBackwardThreads = 256;
constexpr int kUnroll = 4;  // vectors a thread has in flight

__device__ __forceinline__ double power_of_e(double x, double) { return exp(x); }
__device__ __forceinline__ float power_of_e(float x, float) { return expf(x); }
// The fast exponential is off by at most 2 + 1.2 |x| units of 2^-23. In a sum of exponentials the mean of |x|, weighted by its
// terms, is at most log(width): the sum, and so the loss, of 2^17 logits is off by 2e-6, where 16 bits round a logit by 2e-3
// (bf16) or 2e-4 (fp16) of itself. A probability of weight has a small |x| as well.
template <class T>
__device__ __forceinline__ float power_of_e(float x, T) { return __expf(x); }

// The largest of some logits, and the sum of exp(logit - largest). The empty one is (-infinity, 0).
template <class S>
struct Softmax {
  S largest, total;

  // What to subtract: where all is -infinity still, anything finite gives exponentials of 0 instead of NaN.
  __device__ __forceinline__ S shift() const { return largest == -S(INFINITY) ? S(0) : largest; }

  __device__ __forceinline__ void raise(S to) {
    if (to <= largest) return;
    total *= exp(largest - to);
    largest = to;
  }

  __device__ __forceinline__ void merge(S other_largest, S other_total) {
    raise(other_largest);
    total += other_total * exp(other_largest - shift());
  }
};

template <int THREADS, class S>
__device__ __forceinline__ Softmax<S> block_merge(Softmax<S> own) {
  __shared__ S largest[THREADS / 32], total[THREADS / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const S other = __shfl_xor_sync(0xFFFFFFFFu, own.largest, offset);
    const S sum = __shfl_xor_sync(0xFFFFFFFFu, own.total, offset);
    own.merge(other, sum);
  }
  if (threadIdx.x % 32 == 0) {
    largest[threadIdx.x / 32] = own.largest;
    total[threadIdx.x / 32] = own.total;
  }
  __syncthreads();
  own = {largest[0], total[0]};
  for (int warp = 1; warp < THREADS / 32; ++warp) own.merge(largest[warp], total[warp]);
  return own;
}

template <class T, int N>
__device__ __forceinline__ void add(Softmax<Wide<T>>& softmax, const Pack<T, N>& pack) {
  using S = Wide<T>;
  S top = widen(pack.v[0]);
#pragma unroll
  for (int i = 1; i < N; ++i) top = fmax(top, widen(pack.v[i]));
  softmax.raise(top);
  const S shift = softmax.shift();
#pragma unroll
  for (int i = 0; i < N; ++i) softmax.total += power_of_e(widen(pack.v[i]) - shift, T{});
}

// A row that may begin and end anywhere: `before` elements up to the first 128-bit boundary, vectors, `after` elements.
template <class T>
struct Row {
  int64_t before, vectors, after;

  __device__ __forceinline__ Row(const T* x, int64_t width) {
    constexpr int n = kPerVector<T>;
    const int64_t gap = (n - static_cast<int64_t>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T))) % n;
    before = gap < width ? gap : width;
    vectors = (width - before) / n;
    after = width - before - vectors * n;
  }
};

template <class T>
__global__ void __launch_bounds__(kForwardThreads) forward(CrossEntropyFwd a) {
  using S = Wide<T>;
  constexpr int n = kPerVector<T>;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
  const Row<T> parts(x, a.width);
  const T* body = x + parts.before;
  Softmax<S> softmax{-S(INFINITY), S(0)};
  int64_t i = threadIdx.x;
  if (i < parts.before) add<T, 1>(softmax, load<1>(x + i));
  if (i < parts.after) add<T, 1>(softmax, load<1>(body + parts.vectors * n + i));
  for (; i + (kUnroll - 1) * kForwardThreads < parts.vectors; i += kUnroll * kForwardThreads) {
    Pack<T, n> pack[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) pack[k] = load<n>(body + (i + k * kForwardThreads) * n);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) add<T, n>(softmax, pack[k]);
  }
#pragma unroll 1
  for (; i < parts.vectors; i += kForwardThreads) add<T, n>(softmax, load<n>(body + i * n));
  softmax = block_merge<kForwardThreads>(softmax);
  if (threadIdx.x != 0) return;
  const int64_t target = a.target[row], local = target - a.vocab_start;
  const bool known = target == a.ignore_index || (target >= 0 && target < a.vocab_size);
  const bool here = target != a.ignore_index && local >= 0 && local < a.width;
  static_cast<S*>(a.max)[row] = softmax.largest;
  static_cast<S*>(a.sum)[row] = softmax.total;
  static_cast<S*>(a.target_logit)[row] = !known ? S(NAN) : here ? widen(x[local]) : S(0);
}

// Block: one row and kBackwardThreads * kUnroll vectors of it; the first block of a row also has its ends.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads) backward(CrossEntropyBwd a, int64_t blocks_a_row) {
  using S = Wide<T>;
  constexpr int n = kPerVector<T>;
  const int64_t row = blockIdx.x / blocks_a_row, block = blockIdx.x - row * blocks_a_row;
  T* x = static_cast<T*>(a.logits) + row * a.row_stride;
  const Row<T> parts(x, a.width);
  const int64_t target = a.target[row], local = target - a.vocab_start;
  const bool ignored = target == a.ignore_index;
  const S grad = static_cast<const S*>(a.grad)[row * a.grad_stride];
  const S largest = static_cast<const S*>(a.max)[row], factor = grad / static_cast<const S*>(a.sum)[row];
  const auto gradient = [&](T logit, int64_t column) {
    if (ignored) return narrow<T>(S(0));
    if (column != local) return narrow<T>(power_of_e(widen(logit) - largest, T{}) * factor);
    // Exactly: the difference to 1 of a probability near 1 is all that is left of it.
    return narrow<T>(exp(widen(logit) - largest) * factor - grad);
  };
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t vector = (block * kUnroll + k) * kBackwardThreads + threadIdx.x;
    if (vector >= parts.vectors) continue;
    const int64_t column = parts.before + vector * n;
    auto pack = load<n>(x + column);
#pragma unroll
    for (int i = 0; i < n; ++i) pack.v[i] = gradient(pack.v[i], column + i);
    store(x + column, pack);
  }
  // The ends: fewer elements than a vector each.
  const int64_t column = threadIdx.x < parts.before ? threadIdx.x : a.width - 1 - (threadIdx.x - parts.before);
  if (block == 0 && threadIdx.x < parts.before + parts.after) x[column] = gradient(x[column], column);
}

}  // namespace

int cross_entropy_fwd(const CrossEntropyFwd& a, void* stream) {
  if (a.rows == 0) return 0;
  return with_type(a.dtype, [&](auto t) {
    return on_grid(a.rows, [&](unsigned blocks) {
      forward<decltype(t)><<<blocks, kForwardThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    });
  });
}

int cross_entropy_bwd(const CrossEntropyBwd& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return 0;
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int64_t columns = static_cast<int64_t>(kBackwardThreads) * kUnroll * kPerVector<T>;
    const int64_t blocks_a_row = (a.width + columns - 1) / columns;
    return on_grid(a.rows * blocks_a_row, [&](unsigned blocks) {
      backward<T><<<blocks, kBackwardThreads, 0, static_cast<cudaStream_t>(stream)>>>(a, blocks_a_row);
    });
  });
}

}  // namespace cuda
}  // namespace megatronish
