// Elements, 128-bit loads and stores, and sums over a block. No torch header: nvcc alone compiles these files.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "launch.h"

namespace megatronish {
namespace cuda {
namespace {

// The type of the arithmetic.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Wide<T> x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ double narrow<double>(double x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }

template <class T>
constexpr int kPerVector = 16 / sizeof(T);  // elements of 128 bits

// N neighbouring elements, moved 16 bytes at a time where that many are neighbours.
template <class T, int N>
struct Pack {
  static constexpr int bytes = N * sizeof(T);
  static constexpr int alignment = bytes % 16 == 0 ? 16 : static_cast<int>(sizeof(T));
  alignas(alignment) T v[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  Pack<T, N> pack;
  if constexpr (Pack<T, N>::bytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < Pack<T, N>::bytes / 16; ++i) {
      reinterpret_cast<uint4*>(&pack)[i] = reinterpret_cast<const uint4*>(p)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack.v[i] = p[i];
  }
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& pack) {
  if constexpr (Pack<T, N>::bytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < Pack<T, N>::bytes / 16; ++i) {
      // In assembly, for the compiler splits a store whose parts it has met one by one.
      const uint4 q = reinterpret_cast<const uint4*>(&pack)[i];
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(reinterpret_cast<uint4*>(p) + i)),
                   "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w)
                   : "memory");
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = pack.v[i];
  }
}

// The sum over a warp, in every lane.
template <class S>
__device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
  return x;
}

// The sum over a block of THREADS, in every thread. `scratch` holds THREADS / 32 numbers, and must be another one at the
// next call (or be separated from it by a barrier).
template <int THREADS, class S>
__device__ __forceinline__ S block_sum(S x, S* scratch) {
  x = warp_sum(x);
  if constexpr (THREADS > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = S(0);
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) x += scratch[warp];
  }
  return x;
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls run(T{}) with the element type that `dtype` names.
template <class Run>
int with_type(DType dtype, Run run) {
  switch (dtype) {
    case DType::f32: return run(float{});
    case DType::bf16: return run(__nv_bfloat16{});
    case DType::f16: return run(__half{});
    default: return run(double{});
  }
}

inline int last_error() { return static_cast<int>(cudaGetLastError()); }

// Calls launch(blocks), unless the number exceeds the limit of a grid (it would be truncated to 32 bits).
template <class Launch>
int on_grid(int64_t blocks, Launch launch) {
  if (blocks > 0x7FFFFFFF) return static_cast<int>(cudaErrorInvalidConfiguration);
  launch(static_cast<unsigned>(blocks));
  return last_error();
}

}  // namespace
}  // namespace cuda
}  // namespace megatronish
