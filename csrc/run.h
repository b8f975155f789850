// The way from an operator's arguments to its kernel: queued on torch's stream on CUDA, divided over torch's threads on the
// CPU. Included by bindings.cpp alone.
#pragma once

#include "tensors.h"

#ifdef MEGATRONISH_CUDA
#include "cuda/launch.h"
// Weak: the library can be linked against a torch without CUDA, which lacks it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#else
#include "cpu/levels.h"
#endif

namespace megatronish {
namespace {

#ifdef MEGATRONISH_CUDA

struct DeviceGuard {
  explicit DeviceGuard(const Tensor& t) : guard(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};

template <class Args>
void launch(const char* op, const Tensor& on, int (*kernel)(const Args&, void* stream), const Args& args) {
  if (aoti_torch_get_current_cuda_stream == nullptr) throw std::runtime_error("this build of torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  const int error = kernel(args, stream);
  if (error != 0) throw std::runtime_error(std::string(op) + ": CUDA: " + cuda::error_text(error));
}

void run(const RmsNormFwd& a, const Tensor& on) { launch("rms_norm_fwd", on, cuda::rms_norm_fwd, a); }
void run(const RmsNormBwd& a, const Tensor& on) { launch("rms_norm_bwd", on, cuda::rms_norm_bwd, a); }
void run(const SwigluFwd& a, const Tensor& on) { launch("swiglu_fwd", on, cuda::swiglu_fwd, a); }
void run(const SwigluBwd& a, const Tensor& on) { launch("swiglu_bwd", on, cuda::swiglu_bwd, a); }
void run(const Rope& a, const Tensor& on) { launch("rope", on, cuda::rope, a); }
void run(const QkNormRopeFwd& a, const Tensor& on) { launch("qk_norm_rope_fwd", on, cuda::qk_norm_rope_fwd, a); }
void run(const QkNormRopeBwd& a, const Tensor& on) { launch("qk_norm_rope_bwd", on, cuda::qk_norm_rope_bwd, a); }
void run(const CrossEntropyFwd& a, const Tensor& on) { launch("cross_entropy_fwd", on, cuda::cross_entropy_fwd, a); }
void run(const CrossEntropyBwd& a, const Tensor& on) { launch("cross_entropy_bwd_", on, cuda::cross_entropy_bwd, a); }

// The partitions' rows of `partial` added up in order.
void sum_partitions(const RmsNormBwd& a, const Tensor& on) { launch("qk_norm_rope_bwd", on, cuda::sum_partitions, a); }

int64_t partition_count(int64_t rows, int64_t width) { return cuda::rms_norm_partitions(rows, width); }

#else

struct DeviceGuard {
  explicit DeviceGuard(const Tensor&) {}
};

constexpr int64_t kGrain = 32768;  // elements below which another thread costs more than it gains

template <class Args>
void in_parallel(int64_t count, int64_t width, void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1));
  if (count <= grain) {
    if (count > 0) kernel(args, 0, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void run(const RmsNormFwd& a, const Tensor&) { in_parallel(a.rows, a.width, cpu_kernels(a.dtype).rms_norm_fwd, a); }

void run(const RmsNormBwd& a, const Tensor&) {
  const CpuKernels& kernels = cpu_kernels(a.dtype);
  const int64_t rows_each = (a.rows + a.partitions - 1) / std::max<int64_t>(a.partitions, 1);
  in_parallel(a.partitions, a.width * rows_each, kernels.rms_norm_bwd, a);
  if (a.dw != nullptr) in_parallel(a.width, a.partitions, kernels.rms_norm_bwd_dw, a);
}

void run(const SwigluFwd& a, const Tensor&) { in_parallel(a.rows, a.width, cpu_kernels(a.dtype).swiglu_fwd, a); }
void run(const SwigluBwd& a, const Tensor&) { in_parallel(a.rows, a.width, cpu_kernels(a.dtype).swiglu_bwd, a); }
void run(const Rope& a, const Tensor&) {
  in_parallel(a.batch * a.seq, a.groups * a.heads * a.head_dim, cpu_kernels(a.dtype).rope, a);
}

int64_t heads_of(const QkHeads& a) { return a.groups * (a.q_heads + a.k_heads + a.v_heads); }

void run(const QkNormRopeFwd& a, const Tensor&) {
  in_parallel(a.batch * a.seq, heads_of(a) * a.head_dim, cpu_kernels(a.dtype).qk_norm_rope_fwd, a);
}

void run(const QkNormRopeBwd& a, const Tensor&) {
  const int64_t tokens_each = (a.batch * a.seq + a.partitions - 1) / std::max<int64_t>(a.partitions, 1);
  in_parallel(a.partitions, tokens_each * heads_of(a) * a.head_dim, cpu_kernels(a.dtype).qk_norm_rope_bwd, a);
}

void run(const CrossEntropyFwd& a, const Tensor&) {
  in_parallel(a.rows, a.width, cpu_kernels(a.dtype).cross_entropy_fwd, a);
}

void run(const CrossEntropyBwd& a, const Tensor&) {
  in_parallel(a.rows, a.width, cpu_kernels(a.dtype).cross_entropy_bwd, a);
}

// The partitions' rows of `partial` added up in order.
void sum_partitions(const RmsNormBwd& a, const Tensor&) {
  in_parallel(a.width, a.partitions, cpu_kernels(a.dtype).rms_norm_bwd_dw, a);
}

// By the number of rows alone, so that the order of the sums does not depend on the number of threads.
int64_t partition_count(int64_t rows, int64_t) { return std::min<int64_t>(64, (rows + 15) / 16); }

#endif

}  // namespace
}  // namespace megatronish
