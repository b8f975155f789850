// The CPU kernels of every instruction-set level, and which of them this machine runs.
#pragma once

#include "../kernels.h"

// Each unit of cpu/ is compiled once a level with -DMEGATRONISH_LEVEL=<namespace>; setup.py says with -DMEGATRONISH_HAS_*
// which levels exist. `begin` and `end` bound what one call works on: rows, or tokens, partitions or columns where said.
#define MEGATRONISH_DECLARE_LEVEL(level)                                    \
  namespace level {                                                        \
  void rms_norm_fwd(const RmsNormFwd&, int64_t begin, int64_t end);        \
  void rms_norm_bwd(const RmsNormBwd&, int64_t begin, int64_t end);    /* partitions */ \
  void rms_norm_bwd_dw(const RmsNormBwd&, int64_t begin, int64_t end); /* columns */    \
  void swiglu_fwd(const SwigluFwd&, int64_t begin, int64_t end);           \
  void swiglu_bwd(const SwigluBwd&, int64_t begin, int64_t end);           \
  void rope(const Rope&, int64_t begin, int64_t end); /* tokens */         \
  void qk_norm_rope_fwd(const QkNormRopeFwd&, int64_t begin, int64_t end); /* tokens */     \
  void qk_norm_rope_bwd(const QkNormRopeBwd&, int64_t begin, int64_t end); /* partitions */ \
  void cross_entropy_fwd(const CrossEntropyFwd&, int64_t begin, int64_t end);               \
  void cross_entropy_bwd(const CrossEntropyBwd&, int64_t begin, int64_t end);               \
  }

namespace megatronish {

MEGATRONISH_DECLARE_LEVEL(scalar)
MEGATRONISH_DECLARE_LEVEL(avx2)
MEGATRONISH_DECLARE_LEVEL(avx512)
MEGATRONISH_DECLARE_LEVEL(avx512_bf16)

struct CpuKernels {
  const char* name;
  void (*rms_norm_fwd)(const RmsNormFwd&, int64_t, int64_t);
  void (*rms_norm_bwd)(const RmsNormBwd&, int64_t, int64_t);
  void (*rms_norm_bwd_dw)(const RmsNormBwd&, int64_t, int64_t);
  void (*swiglu_fwd)(const SwigluFwd&, int64_t, int64_t);
  void (*swiglu_bwd)(const SwigluBwd&, int64_t, int64_t);
  void (*rope)(const Rope&, int64_t, int64_t);
  void (*qk_norm_rope_fwd)(const QkNormRopeFwd&, int64_t, int64_t);
  void (*qk_norm_rope_bwd)(const QkNormRopeBwd&, int64_t, int64_t);
  void (*cross_entropy_fwd)(const CrossEntropyFwd&, int64_t, int64_t);
  void (*cross_entropy_bwd)(const CrossEntropyBwd&, int64_t, int64_t);
};

// The level in use, or the scalar one for f64, which only that level computes.
const CpuKernels& cpu_kernels(DType dtype);

}  // namespace megatronish

// For diagnosis and tests: the level in use ("scalar", "avx2", "avx512", "avx512_bf16"), and a change of it, which returns
// 0, or -1 when this build or this CPU has no such level. Not to be called while kernels run.
extern "C" __attribute__((visibility("default"))) const char* megatronish_cpu_level();
extern "C" __attribute__((visibility("default"))) int megatronish_set_cpu_level(const char* name);
