// RMSNorm forward and backward, with or without a fused residual. Rows of full 128-bit vectors stay in registers between
// the sum and the result; any other row takes the plain kernels, which read it again.
#include "common.cuh"

namespace megatronish {
namespace cuda {
namespace {

// N neighbouring weights as they are stored; 1 where there are none, which factor_of() takes as it is.
template <class W, int N>
__device__ __forceinline__ Pack<W, N> load_weights(const void* w, int64_t column) {
  if (w != nullptr) return load<N>(static_cast<const W*>(w) + column);
  Pack<W, N> ones;
#pragma unroll
  for (int i = 0; i < N; ++i) ones.v[i] = narrow<W>(Wide<W>(1));
  return ones;
}

template <class S, class Args>
__device__ __forceinline__ S offset_of(const Args& a) {
  return a.w == nullptr ? S(0) : S(a.w_offset);
}

// ---- Forward.

// A row for THREADS threads, VECTORS vectors a thread; with one warp per row a block has four rows. All loads come before the first
// store, which the compiler moves none of them past, and the weights before the sum over the block, which hides their latency.
template <class T, class W, int THREADS, int VECTORS, int ROWS>
__global__ void __launch_bounds__(THREADS* ROWS) forward(RmsNormFwd a) {
  constexpr int n = kPerVector<T>;
  // Where registers are left for them: 1024 threads have 64 each, and fp32 weights of 16-bit elements take twice as many.
  constexpr bool weights_first = THREADS <= (sizeof(W) <= sizeof(T) ? 256 : 128);
  using S = Wide<T>;
  __shared__ S scratch[32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.y;
  if (row >= a.rows) return;  // with ROWS > 1 no barrier follows
  const int64_t start = row * a.width;
  const auto each = [&](auto body) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int64_t column = static_cast<int64_t>(k * THREADS + threadIdx.x) * n;
      if (column < a.width) body(k, column);
    }
  };
  Pack<T, n> x[VECTORS];
  Pack<W, n> w[VECTORS];
  each([&](int k, int64_t column) { x[k] = load<n>(static_cast<const T*>(a.x) + start + column); });
  const auto load_all_weights = [&] {
    each([&](int k, int64_t column) { w[k] = load_weights<W, n>(a.w, column); });
  };
  if (a.residual != nullptr) {
    Pack<T, n> residual[VECTORS];
    each([&](int k, int64_t column) { residual[k] = load<n>(static_cast<const T*>(a.residual) + start + column); });
    if (weights_first) load_all_weights();
    each([&](int k, int64_t column) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[k].v[i] = narrow<T>(widen(x[k].v[i]) + widen(residual[k].v[i]));
      store(static_cast<T*>(a.res_out) + start + column, x[k]);
    });
  } else if (weights_first) {
    load_all_weights();
  }
  S squares = S(0);
  each([&](int k, int64_t) {
#pragma unroll
    for (int i = 0; i < n; ++i) squares += widen(x[k].v[i]) * widen(x[k].v[i]);
  });
  squares = block_sum<THREADS>(squares, scratch);
  const S rstd = S(1) / sqrt(squares / S(a.width) + S(a.eps)), offset = offset_of<S>(a);
  if (threadIdx.x == 0) static_cast<S*>(a.rstd)[row] = rstd;
  each([&](int k, int64_t column) {
    if (!weights_first) w[k] = load_weights<W, n>(a.w, column);
#pragma unroll
    for (int i = 0; i < n; ++i) x[k].v[i] = narrow<T>(widen(x[k].v[i]) * rstd * (widen(w[k].v[i]) + offset));
    store(static_cast<T*>(a.y) + start + column, x[k]);
  });
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
    const S factor = widen(load_weights<W, 1>(a.w, i).v[0]) + offset_of<S>(a);
    static_cast<T*>(a.y)[start + i] = narrow<T>(widen(total == nullptr ? x[i] : total[i]) * rstd * factor);
  }
}

template <class T, class W, int THREADS, int VECTORS, int ROWS>
int launch_forward(const RmsNormFwd& a, cudaStream_t stream) {
  return on_grid((a.rows + ROWS - 1) / ROWS, [&](unsigned blocks) {
    forward<T, W, THREADS, VECTORS, ROWS><<<blocks, dim3(THREADS, ROWS), 0, stream>>>(a);
  });
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
  return on_grid(a.rows, [&](unsigned blocks) { forward_plain<T, W><<<blocks, kPlainThreads, 0, stream>>>(a); });
}

// ---- Backward: one block a partition of the rows. A thread keeps the same columns in every row, and the sums of its part
// of dw in registers; the next row is loaded while this one is summed up, and so is dres: no store is in between.

template <class T, class W, int THREADS, int VECTORS>
__global__ void __launch_bounds__(THREADS) backward(RmsNormBwd a) {
  constexpr int n = kPerVector<T>;
  using S = Wide<T>;
  __shared__ S scratch[2][THREADS / 32];
  const int64_t last = a.rows * (blockIdx.x + 1) / a.partitions;
  int64_t row = a.rows * blockIdx.x / a.partitions;
  const S offset = offset_of<S>(a);
  S dw[VECTORS][n] = {}, rstd = S(0), next_rstd = S(0);
  Pack<T, n> x[VECTORS], dy[VECTORS], next_x[VECTORS], next_dy[VECTORS], dres[VECTORS];
  Pack<W, n> w[VECTORS];
  const auto each = [&](auto body) {
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int64_t column = static_cast<int64_t>(k * THREADS + threadIdx.x) * n;
      if (column < a.width) body(k, column);
    }
  };
  const auto fetch = [&](int64_t from, Pack<T, n>(&to_x)[VECTORS], Pack<T, n>(&to_dy)[VECTORS], S& to_rstd) {
    to_rstd = static_cast<const S*>(a.rstd)[from];
    each([&](int k, int64_t column) {
      to_x[k] = load<n>(static_cast<const T*>(a.x) + from * a.width + column);
      to_dy[k] = load<n>(static_cast<const T*>(a.dy) + from * a.width + column);
    });
  };
  each([&](int k, int64_t column) { w[k] = load_weights<W, n>(a.w, column); });
  if (row < last) fetch(row, x, dy, rstd);
  for (int turn = 0; row < last; ++row, turn ^= 1) {
    const int64_t start = row * a.width;
    if (a.dres != nullptr) {
      each([&](int k, int64_t column) { dres[k] = load<n>(static_cast<const T*>(a.dres) + start + column); });
    }
    if (row + 1 < last) fetch(row + 1, next_x, next_dy, next_rstd);
    S dot = S(0);
    each([&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const S product = widen(dy[k].v[i]) * (widen(x[k].v[i]) * rstd);
        dw[k][i] += product;
        dot += product * (widen(w[k].v[i]) + offset);
      }
    });
    const S mean = block_sum<THREADS>(dot, scratch[turn]) / S(a.width);
    each([&](int k, int64_t column) {
      Pack<T, n> dx;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        S grad = (widen(dy[k].v[i]) * (widen(w[k].v[i]) + offset) - widen(x[k].v[i]) * rstd * mean) * rstd;
        if (a.dres != nullptr) grad += widen(dres[k].v[i]);
        dx.v[i] = narrow<T>(grad);
      }
      store(static_cast<T*>(a.dx) + start + column, dx);
      x[k] = next_x[k];
      dy[k] = next_dy[k];
    });
    rstd = next_rstd;
  }
  if (a.partial == nullptr) return;
  each([&](int k, int64_t column) {
    Pack<S, n> sums;
#pragma unroll
    for (int i = 0; i < n; ++i) sums.v[i] = dw[k][i];
    store(static_cast<S*>(a.partial) + blockIdx.x * a.width + column, sums);
  });
}

constexpr int kWideThreads = 512;

// Rows too wide for the registers: they are read twice, the second time from the caches, and dw is summed in shared memory,
// where each thread reads and writes its own columns only. kWideUnroll vectors a thread are in flight.
constexpr int kWideUnroll = 2;

template <class T, class W>
__global__ void __launch_bounds__(kWideThreads) backward_wide(RmsNormBwd a) {
  constexpr int n = kPerVector<T>;
  extern __shared__ float4 sums_memory[];  // [width] floats, in vectors
  __shared__ float scratch[2][kWideThreads / 32];
  float* sums = reinterpret_cast<float*>(sums_memory);
  const int64_t last = a.rows * (blockIdx.x + 1) / a.partitions;
  const float offset = offset_of<float>(a);
  // body(first column of up to kWideUnroll vectors, kWideThreads vectors apart)
  const auto each = [&](auto body) {
    for (int64_t vector = threadIdx.x; vector * n < a.width; vector += kWideThreads * kWideUnroll) body(vector * n);
  };
  const auto each_of = [&](int64_t first, auto body) {
#pragma unroll
    for (int k = 0; k < kWideUnroll; ++k) {
      const int64_t column = first + static_cast<int64_t>(k) * kWideThreads * n;
      if (column < a.width) body(k, column);
    }
  };
  each([&](int64_t first) {
    each_of(first, [&](int, int64_t column) {
#pragma unroll
      for (int i = 0; i < n; ++i) sums[column + i] = 0.0f;
    });
  });
  int turn = 0;
  for (int64_t row = a.rows * blockIdx.x / a.partitions; row < last; ++row, turn ^= 1) {
    const int64_t start = row * a.width;
    const T *x_row = static_cast<const T*>(a.x) + start, *dy_row = static_cast<const T*>(a.dy) + start;
    const float rstd = static_cast<const float*>(a.rstd)[row];
    float dot = 0.0f;
    each([&](int64_t first) {
      Pack<T, n> x[kWideUnroll], dy[kWideUnroll];
      Pack<W, n> w[kWideUnroll];
      each_of(first, [&](int k, int64_t column) {
        x[k] = load<n>(x_row + column);
        dy[k] = load<n>(dy_row + column);
        w[k] = load_weights<W, n>(a.w, column);
      });
      each_of(first, [&](int k, int64_t column) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const float product = widen(dy[k].v[i]) * (widen(x[k].v[i]) * rstd);
          sums[column + i] += product;
          dot += product * (widen(w[k].v[i]) + offset);
        }
      });
    });
    const float mean = block_sum<kWideThreads>(dot, scratch[turn]) / static_cast<float>(a.width);
    each([&](int64_t first) {
      Pack<T, n> x[kWideUnroll], dy[kWideUnroll], dres[kWideUnroll];
      Pack<W, n> w[kWideUnroll];
      each_of(first, [&](int k, int64_t column) {
        x[k] = load<n>(x_row + column);
        dy[k] = load<n>(dy_row + column);
        w[k] = load_weights<W, n>(a.w, column);
        if (a.dres != nullptr) dres[k] = load<n>(static_cast<const T*>(a.dres) + start + column);
      });
      each_of(first, [&](int k, int64_t column) {
        Pack<T, n> dx;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          float grad = (widen(dy[k].v[i]) * (widen(w[k].v[i]) + offset) - widen(x[k].v[i]) * rstd * mean) * rstd;
          if (a.dres != nullptr) grad += widen(dres[k].v[i]);
          dx.v[i] = narrow<T>(grad);
        }
        store(static_cast<T*>(a.dx) + start + column, dx);
      });
    });
  }
  if (a.partial == nullptr) return;
  each([&](int64_t first) {
    each_of(first, [&](int, int64_t column) {
      Pack<float, n> out;
#pragma unroll
      for (int i = 0; i < n; ++i) out.v[i] = sums[column + i];
      store(static_cast<float*>(a.partial) + blockIdx.x * a.width + column, out);
    });
  });
}

template <class T, class W>
__global__ void __launch_bounds__(kPlainThreads) backward_plain(RmsNormBwd a) {
  using S = Wide<T>;
  __shared__ S scratch[2][kPlainThreads / 32];
  const int64_t last = a.rows * (blockIdx.x + 1) / a.partitions;
  S* partial = a.partial == nullptr ? nullptr : static_cast<S*>(a.partial) + blockIdx.x * a.width;
  const S offset = offset_of<S>(a);
  // Each thread reads and writes its own columns of `partial` only.
  for (int64_t i = threadIdx.x; partial != nullptr && i < a.width; i += kPlainThreads) partial[i] = S(0);
  int turn = 0;
  for (int64_t row = a.rows * blockIdx.x / a.partitions; row < last; ++row, turn ^= 1) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    const T* dy = static_cast<const T*>(a.dy) + row * a.width;
    const S rstd = static_cast<const S*>(a.rstd)[row];
    S dot = S(0);
    for (int64_t i = threadIdx.x; i < a.width; i += kPlainThreads) {
      const S product = widen(dy[i]) * (widen(x[i]) * rstd);
      if (partial != nullptr) partial[i] += product;
      dot += product * (widen(load_weights<W, 1>(a.w, i).v[0]) + offset);
    }
    const S mean = block_sum<kPlainThreads>(dot, scratch[turn]) / S(a.width);
    for (int64_t i = threadIdx.x; i < a.width; i += kPlainThreads) {
      const S factor = widen(load_weights<W, 1>(a.w, i).v[0]) + offset;
      S grad = (widen(dy[i]) * factor - widen(x[i]) * rstd * mean) * rstd;
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
  return on_grid((a.width + kColumns - 1) / kColumns, [&](unsigned blocks) {
    sum_partitions<S, W><<<blocks, dim3(kColumns, kLanes), 0, stream>>>(a);
  });
}

// Launches backward_wide where shared memory holds a row of sums; whether it did. Devices give more than the default 48 KB
// (64 KB of sm_75 to 227 KB of sm_90) to a kernel that asks for it.
template <class T, class W>
bool launch_wide(const RmsNormBwd& a, unsigned blocks, cudaStream_t stream) {
  if constexpr (sizeof(T) == 8) {
    return false;  // float64 is for checks of gradients, not for speed
  } else {
    constexpr int64_t own = 2 * kWideThreads / 32 * sizeof(float);  // its static shared memory
    int device = 0, most = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
      return false;
    }
    const int64_t bytes = a.width * static_cast<int64_t>(sizeof(float));
    if (bytes + own > most) return false;
    if (cudaFuncSetAttribute(backward_wide<T, W>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) !=
        cudaSuccess) {
      return false;
    }
    backward_wide<T, W><<<blocks, kWideThreads, static_cast<size_t>(bytes), stream>>>(a);
    return true;
  }
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
  } else if (!packed || !launch_wide<T, W>(a, blocks, stream)) {
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
