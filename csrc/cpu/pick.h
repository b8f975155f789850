// Which level's kernel to call, for the operators that only CPUs have. Included by their bindings alone; setup.py says with
// -DMEGATRONISH_HAS_* which levels exist.
#pragma once

#include <string.h>

#include "levels.h"

namespace megatronish {
namespace {

// The kernel of the level that levels.cpp chose.
template <class Kernel>
Kernel pick(Kernel scalar, Kernel avx2, Kernel avx512, Kernel avx512_bf16) {
  const char* level = megatronish_cpu_level();
  if (strcmp(level, "avx512_bf16") == 0) return avx512_bf16;
  if (strcmp(level, "avx512") == 0) return avx512;
  return strcmp(level, "avx2") == 0 ? avx2 : scalar;
}

#ifdef MEGATRONISH_HAS_avx2
#define MEGATRONISH_AVX2(f) avx2::f
#else
#define MEGATRONISH_AVX2(f) static_cast<decltype(&scalar::f)>(nullptr)
#endif
#ifdef MEGATRONISH_HAS_avx512
#define MEGATRONISH_AVX512(f) avx512::f
#else
#define MEGATRONISH_AVX512(f) static_cast<decltype(&scalar::f)>(nullptr)
#endif
#ifdef MEGATRONISH_HAS_avx512_bf16
#define MEGATRONISH_AVX512_BF16(f) avx512_bf16::f
#else
#define MEGATRONISH_AVX512_BF16(f) static_cast<decltype(&scalar::f)>(nullptr)
#endif
#define MEGATRONISH_PICK(f) pick(scalar::f, MEGATRONISH_AVX2(f), MEGATRONISH_AVX512(f), MEGATRONISH_AVX512_BF16(f))

}  // namespace
}  // namespace megatronish
