// The CPU kernels of every instruction-set level, and the level in use.
#pragma once

#include "../kernels.h"
#include "attention.h"
#include "decode.h"

// X(result, kernel, arguments) for every CPU kernel. Each is called with the bounds [begin, end) of what one call works on:
// rows unless noted. A kernel that allocates memory returns false where there is none.
#define MEGATRONISH_CPU_KERNELS(X)                                           \
  X(void, rms_norm_fwd, RmsNormFwd)                                          \
  X(void, rms_norm_bwd, RmsNormBwd)            /* partitions */              \
  X(void, rms_norm_bwd_dw, RmsNormBwd)         /* columns */                 \
  X(void, swiglu_fwd, SwigluFwd)                                             \
  X(void, swiglu_bwd, SwigluBwd)                                             \
  X(void, rope, Rope)                          /* tokens */                  \
  X(void, qk_norm_rope_fwd, QkNormRopeFwd)     /* tokens */                  \
  X(void, qk_norm_rope_bwd, QkNormRopeBwd)     /* partitions */              \
  X(void, cross_entropy_fwd, CrossEntropyFwd)                                \
  X(void, cross_entropy_bwd, CrossEntropyBwd)                                \
  X(bool, attention_fwd, AttentionFwd)         /* (batch row, KV head) pairs */ \
  X(bool, attention_bwd, AttentionBwd)         /* the same */                \
  X(void, linear_rows_prepare, LinearRows)                                   \
  X(void, linear_rows, LinearRows)             /* output features */         \
  X(bool, cached_attention, CachedAttention)   /* (batch row, KV head) pairs */

namespace megatronish {

// Each file of cpu/ that defines kernels is compiled once per level, with -DMEGATRONISH_LEVEL=<namespace>; -DMEGATRONISH_HAS_*
// from setup.py lists the levels of this build.
#define MEGATRONISH_DECLARE(result, kernel, arguments) result kernel(const arguments&, int64_t begin, int64_t end);
namespace scalar {
MEGATRONISH_CPU_KERNELS(MEGATRONISH_DECLARE)
}
namespace avx2 {
MEGATRONISH_CPU_KERNELS(MEGATRONISH_DECLARE)
}
namespace avx512 {
MEGATRONISH_CPU_KERNELS(MEGATRONISH_DECLARE)
}
namespace avx512_bf16 {
MEGATRONISH_CPU_KERNELS(MEGATRONISH_DECLARE)
}
#undef MEGATRONISH_DECLARE

struct CpuKernels {
  const char* name;
#define MEGATRONISH_MEMBER(result, kernel, arguments) result (*kernel)(const arguments&, int64_t, int64_t);
  MEGATRONISH_CPU_KERNELS(MEGATRONISH_MEMBER)
#undef MEGATRONISH_MEMBER
};

// The level in use, or the scalar one for f64, which only that level computes.
const CpuKernels& cpu_kernels(DType dtype);

}  // namespace megatronish

// For diagnosis and tests: the level in use ("scalar", "avx2", "avx512", "avx512_bf16"), and a change of it, which returns 0, or
// -1 where this build or this CPU lacks the level. Not thread-safe.
extern "C" __attribute__((visibility("default"))) const char* megatronish_cpu_level();
extern "C" __attribute__((visibility("default"))) int megatronish_set_cpu_level(const char* name);
