// RMSNorm forward and backward, with or without a fused residual. Rows of whole 128-bit vectors stay in registers between
// the sum and the result; any other row takes the plain kernels, which read it again.
#include "common.cuh"

namespace megatronish {
namespace cuda {
namespace {

// ---- Forward.

template <class W, int N, class S>
__device__ __forceinline__ void load_factor(const W* w, int64_t column, S offset, S (&factor)[N]) {
  if (w == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) factor[i] = S(1);
    return;
  }
  const auto pack = load<N>(w + column);
#pragma unroll
  for (int i = 0; i < N; ++i) factor[i] = widen(pack.v[i]) + offset;
}

// A row for THREADS threads, VECTORS vectors a thread; a warp a row takes four rows a block.
template <class T, class W, int THREADS, int VECTORS, int ROWS>
__global__ void __launch_bounds__(THREADS* ROWS) forward(RmsNormFwd a) {
  constexpr int n = kPerVector<T>;
  using S = Wide<T>;
  __shared__ S scratch[32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.y;
  if (row >= a.rows) return;  // with ROWS > 1 no barrier follows
  const int64_t start = row * a.width;
  Pack<T, n> x[VECTORS];
  S squares = S(0);
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    const int64_t column = static_cast<int64_t>(k * THREADS + threadIdx.x) * n;
    if (column >= a.width) continue;
    x[k] = load<n>(static_cast<const T*>(a.x) + start + column);
    if (a.residual != nullptr) {
      const auto residual = load<n>(static_cast<const T*>(a.residual) + start + column);
#pragma unroll
      for (int i = 0; i < n; ++i) x[k].v[i] = narrow<T>(widen(x[k].v[i]) + widen(residual.v[i]));
      store(static_cast<T*>(a.res_out) + start + column, x[k]);
    }
#pragma unroll
    for (int i = 0; i < n; ++i) squares += widen(x[k].v[i]) * widen(x[k].v[i]);
  }
  squares = block_sum<THREADS>(squares, scratch);
  const S rstd = S(1) / sqrt(squares / S(a.width) + S(a.eps));
  if (threadIdx.x == 0) static_cast<S*>(a.rstd)[row] = rstd;
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    const int64_t column = static_cast<int64_t>(k * THREADS + threadIdx.x) * n;
    if (column >= a.width) continue;
    S factor[n];
    load_factor<W, n, S>(static_cast<const W*>(a.w), column, S(a.w_offset), factor);
#pragma unroll
    for (int i = 0; i < n; ++i) x[k].v[i] = narrow<T>(widen(x[k].v[i]) * rstd * factor[i]);
    store(static_cast<T*>(a.y) + start + column, x[k]);
  }
}

constexpr int kPlainThreads = 256;

template <class T, class W>
__global__ void __launch_bounds__(kPlainThreads) forward_plain(RmsNormFwd a) {
  using S = Wide<T>;
  __shared__ S scratch[kPlainThreads / 32];
  const int64_t start = static_cast<int64_t>(blockIdx.x) * a.width;
  const T* x = static_cast<const T*>(a.x) + start;
  const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + start;
  T* total = residual == nullptr ? nullptr : static_cast<T*>(a.res_out) + start;
  S squares = S(0);
  for (int64_t i = threadIdx.x; i < a.width; i += kPlainThreads) {
    T value = x[i];
    if (residual != nullptr) total[i] = value = narrow<T>(widen(value) + widen(residual[i]));
    squares += widen(value) * widen(value);
  }
  squares = block_sum<kPlainThreads>(squares, scratch);
  const S rstd = S(1) / sqrt(squares / S(a.width) + S(a.eps));
  if (threadIdx.x == 0) static_cast<S*>(a.rstd)[blockIdx.x] = rstd;
  for (int64_t i = threadIdx.x; i < a.width; i += kPlainThreads) {
    S factor[1];
    load_factor<W, 1, S>(static_cast<const W*>(a.w), i, S(a.w_offset), factor);
    static_cast<T*>(a.y)[start + i] = narrow<T>(widen(total == nullptr ? x[i] : total[i]) * rstd * factor[0]);
  }
}

template <class T, class W, int THREADS, int VECTORS, int ROWS>
int launch_forward(const RmsNormFwd& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((a.rows + ROWS - 1) / ROWS);
  forward<T, W, THREADS, VECTORS, ROWS><<<blocks, dim3(THREADS, ROWS), 0, stream>>>(a);
  return last_error();
}

template <class T, class W>
int run_forward(const RmsNormFwd& a, cudaStream_t stream) {
  if (a.rows == 0) return 0;
  const bool packed = a.width % kPerVector<T> == 0 && aligned(a.x) && aligned(a.residual) && aligned(a.w) && aligned(a.y) &&
                      aligned(a.res_out);
  const int64_t vectors = a.width / kPerVector<T>;
  if (packed && vectors <= 32 * 4) return launch_forward<T, W, 32, 4, 4>(a, stream);
  if (packed && vectors <= 128 * 4) return launch_forward<T, W, 128, 4, 1>(a, stream);
  if (packed && vectors <= 256 * 4) return launch_forward<T, W, 256, 4, 1>(a, stream);
  if (packed && vectors <= 1024 * 4) return launch_forward<T, W, 1024, 4, 1>(a, stream);
  forward_plain<T, W><<<static_cast<unsigned>(a.rows), kPlainThreads, 0, stream>>>(a);
  return last_error();
}

// ---- Backward: one block a partition of the rows. A thread keeps the same columns in every row, and the sums of its part
// of dw in registers; the next row is loaded while this one is summed up.

template <class T, class W, int THREADS, int VECTORS>
__global__ void __launch_bounds__(THREADS) backward(RmsNormBwd a) {
  constexpr int n = kPerVector<T>;
  using S = Wide<T>;
  __shared__ S scratch[2][THREADS / 32];
  const int64_t last = a.rows * (blockIdx.x + 1) / a.partitions;
  int64_t row = a.rows * blockIdx.x / a.partitions;
  S dw[VECTORS][n] = {};
  Pack<T, n> x[VECTORS], dy[VECTORS], next_x[VECTORS], next_dy[VECTORS];
  const auto fetch = [&](int64_t from, Pack<T, n>(&to_x)[VECTORS], Pack<T, n>(&to_dy)[VECTORS]) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int64_t column = static_cast<int64_t>(k * THREADS + threadIdx.x) * n;
      if (column >= a.width) continue;
      to_x[k] = load<n>(static_cast<const T*>(a.x) + from * a.width + column);
      to_dy[k] = load<n>(static_cast<const T*>(a.dy) + from * a.width + column);
    }
  };
  if (row < last) fetch(row, x, dy);
  for (int turn = 0; row < last; ++row, turn ^= 1) {
    const S rstd = static_cast<const S*>(a.rstd)[row];
    if (row + 1 < last) fetch(row + 1, next_x, next_dy);
    S dot = S(0);
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int64_t column = static_cast<int64_t>(k * THREADS + threadIdx.x) * n;
      if (column >= a.width) continue;
      S factor[n];
      load_factor<W, n, S>(static_cast<const W*>(a.w), column, S(a.w_offset), factor);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const S product = widen(dy[k].v[i]) * (widen(x[k].v[i]) * rstd);
        dw[k][i] += product;
        dot += product * factor[i];
      }
    }
    const S mean = block_sum<THREADS>(dot, scratch[turn]) / S(a.width);
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int64_t column = static_cast<int64_t>(k * THREADS + threadIdx.x) * n;
      if (column >= a.width) continue;
      const int64_t at = row * a.width + column;
      S factor[n];
      load_factor<W, n, S>(static_cast<const W*>(a.w), column, S(a.w_offset), factor);
      Pack<T, n> dx, dres;
      if (a.dres != nullptr) dres = load<n>(static_cast<const T*>(a.dres) + at);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        S grad = (widen(dy[k].v[i]) * factor[i] - widen(x[k].v[i]) * rstd * mean) * rstd;
        if (a.dres != nullptr) grad += widen(dres.v[i]);
        dx.v[i] = narrow<T>(grad);
      }
      store(static_cast<T*>(a.dx) + at, dx);
      x[k] = next_x[k];
      dy[k] = next_dy[k];
    }
  }
  if (a.partial == nullptr) return;
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    const int64_t column = static_cast<int64_t>(k * THREADS + threadIdx.x) * n;
    if (column >= a.width) continue;
    Pack<S, n> sums;
#pragma unroll
    for (int i = 0; i < n; ++i) sums.v[i] = dw[k][i];
    store(static_cast<S*>(a.partial) + blockIdx.x * a.width + column, sums);
  }
}

template <class T, class W>
__global__ void __launch_bounds__(kPlainThreads) backward_plain(RmsNormBwd a) {
  using S = Wide<T>;
  __shared__ S scratch[2][kPlainThreads / 32];
  const int64_t last = a.rows * (blockIdx.x + 1) / a.partitions;
  S* partial = a.partial == nullptr ? nullptr : static_cast<S*>(a.partial) + blockIdx.x * a.width;
  const W* w = static_cast<const W*>(a.w);
  // Each thread reads and writes its own columns of `partial` only.
  for (int64_t i = threadIdx.x; partial != nullptr && i < a.width; i += kPlainThreads) partial[i] = S(0);
  int turn = 0;
  for (int64_t row = a.rows * blockIdx.x / a.partitions; row < last; ++row, turn ^= 1) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    const T* dy = static_cast<const T*>(a.dy) + row * a.width;
    const S rstd = static_cast<const S*>(a.rstd)[row];
    S dot = S(0), factor[1];
    for (int64_t i = threadIdx.x; i < a.width; i += kPlainThreads) {
      const S product = widen(dy[i]) * (widen(x[i]) * rstd);
      if (partial != nullptr) partial[i] += product;
      load_factor<W, 1, S>(w, i, S(a.w_offset), factor);
      dot += product * factor[0];
    }
    const S mean = block_sum<kPlainThreads>(dot, scratch[turn]) / S(a.width);
    for (int64_t i = threadIdx.x; i < a.width; i += kPlainThreads) {
      load_factor<W, 1, S>(w, i, S(a.w_offset), factor);
      S grad = (widen(dy[i]) * factor[0] - widen(x[i]) * rstd * mean) * rstd;
      if (a.dres != nullptr) grad += widen(static_cast<const T*>(a.dres)[row * a.width + i]);
      static_cast<T*>(a.dx)[row * a.width + i] = narrow<T>(grad);
    }
  }
}

constexpr int kColumns = 32, kLanes = 16;  // of a block that adds up the partitions

template <class S, class W>
__global__ void __launch_bounds__(kColumns* kLanes) sum_partitions(RmsNormBwd a) {
  __shared__ S sums[kLanes][kColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  S total = S(0);
  if (column < a.width) {
    for (int64_t part = threadIdx.y; part < a.partitions; part += kLanes) {
      total += static_cast<const S*>(a.partial)[part * a.width + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || column >= a.width) return;
#pragma unroll
  for (int lane = 1; lane < kLanes; ++lane) total += sums[lane][threadIdx.x];
  static_cast<W*>(a.dw)[column] = narrow<W>(total);
}

template <class S, class W>
int run_sum(const RmsNormBwd& a, cudaStream_t stream) {
  if (a.dw == nullptr || a.width == 0) return last_error();
  const auto columns = static_cast<unsigned>((a.width + kColumns - 1) / kColumns);
  sum_partitions<S, W><<<columns, dim3(kColumns, kLanes), 0, stream>>>(a);
  return last_error();
}

template <class T, class W>
int run_backward(const RmsNormBwd& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(a.partitions);
  const bool packed = a.width % kPerVector<T> == 0 && aligned(a.x) && aligned(a.dy) && aligned(a.dres) && aligned(a.w) &&
                      aligned(a.dx) && aligned(a.partial);
  const int64_t vectors = a.width / kPerVector<T>;
  if (a.rows == 0) {
    // Nothing to run over: the sum of no partitions, below, sets dw to 0.
  } else if (packed && vectors <= 128) {
    backward<T, W, 128, 1><<<blocks, 128, 0, stream>>>(a);
  } else if (packed && vectors <= 256) {
    backward<T, W, 256, 1><<<blocks, 256, 0, stream>>>(a);
  } else if (packed && vectors <= 512) {
    backward<T, W, 256, 2><<<blocks, 256, 0, stream>>>(a);
  } else if (packed && vectors <= 1024) {
    backward<T, W, 512, 2><<<blocks, 512, 0, stream>>>(a);
  } else {
    backward_plain<T, W><<<blocks, kPlainThreads, 0, stream>>>(a);
  }
  return run_sum<Wide<T>, W>(a, stream);
}

// Calls run(T{}, W{}): the weight has the elements' type, or fp32.
template <class Run>
int with_types(DType dtype, DType w_dtype, Run run) {
  return with_type(dtype, [&](auto t) {
    using T = decltype(t);
    return w_dtype == dtype ? run(T{}, T{}) : run(T{}, float{});
  });
}

}  // namespace

int rms_norm_fwd(const RmsNormFwd& a, void* stream) {
  return with_types(a.dtype, a.w_dtype, [&](auto t, auto w) {
    return run_forward<decltype(t), decltype(w)>(a, static_cast<cudaStream_t>(stream));
  });
}

int rms_norm_bwd(const RmsNormBwd& a, void* stream) {
  return with_types(a.dtype, a.w_dtype, [&](auto t, auto w) {
    return run_backward<decltype(t), decltype(w)>(a, static_cast<cudaStream_t>(stream));
  });
}

int sum_partitions(const RmsNormBwd& a, void* stream) {
  return with_types(a.dtype, a.w_dtype, [&](auto t, auto w) {
    return run_sum<Wide<decltype(t)>, decltype(w)>(a, static_cast<cudaStream_t>(stream));
  });
}

int64_t rms_norm_partitions(int64_t rows, int64_t width) {
  int device = 0, multiprocessors = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const int64_t blocks = static_cast<int64_t>(multiprocessors) * (width <= 1024 ? 8 : width <= 4096 ? 4 : 2);
  return rows < blocks ? rows : blocks;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace megatronish
