// Selects the instruction-set level by CPUID, and reads the size of the last-level cache, when the library is loaded.
#include "levels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cache.h"

namespace megatronish {
namespace {

// In ascending order of speed.
constexpr CpuKernels kLevels[] = {
#define MEGATRONISH_ENTRY(result, kernel, arguments) kernel,
#define MEGATRONISH_LEVEL_ENTRIES(level) \
  [] {                                   \
    using namespace level;               \
    return CpuKernels{#level, MEGATRONISH_CPU_KERNELS(MEGATRONISH_ENTRY)}; \
  }()
    MEGATRONISH_LEVEL_ENTRIES(scalar),
#ifdef MEGATRONISH_HAS_avx2
    MEGATRONISH_LEVEL_ENTRIES(avx2),
#endif
#ifdef MEGATRONISH_HAS_avx512
    MEGATRONISH_LEVEL_ENTRIES(avx512),
#endif
#ifdef MEGATRONISH_HAS_avx512_bf16
    MEGATRONISH_LEVEL_ENTRIES(avx512_bf16),
#endif
};
constexpr int kCount = sizeof(kLevels) / sizeof(kLevels[0]);

bool cpu_runs(const char* name) {
  if (strcmp(name, "scalar") == 0) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (strcmp(name, "avx2") == 0) return avx2;
  if (strcmp(name, "avx512") == 0) return avx512;
#ifdef MEGATRONISH_HAS_avx512_bf16  // an older compiler does not know the name of the feature either
  if (strcmp(name, "avx512_bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return false;
}

// torch's environment variable for the same choice applies here too: one setting selects the arithmetic of an older CPU.
bool torch_allows(const char* name) {
  const char* cap = getenv("ATEN_CPU_CAPABILITY");
  if (cap == nullptr) return true;
  if (strcmp(cap, "default") == 0) return strcmp(name, "scalar") == 0;
  if (strcmp(cap, "avx2") == 0) return strncmp(name, "avx512", 6) != 0;
  return true;
}

const CpuKernels* pick() {
  const CpuKernels* best = &kLevels[0];
  for (int i = 1; i < kCount; ++i) {
    if (cpu_runs(kLevels[i].name) && torch_allows(kLevels[i].name)) best = &kLevels[i];
  }
  return best;
}

const CpuKernels* chosen = pick();

// As Linux reports it for the first CPU, or 32 MiB. (sysconf returns the sum over the core complexes of an AMD CPU.)
int64_t read_cache_bytes() {
  for (int index = 4; index >= 2; --index) {
    char path[64];
    snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    FILE* file = fopen(path, "r");
    if (file == nullptr) continue;
    long long size = 0;
    char unit = 'B';
    const int fields = fscanf(file, "%lld%c", &size, &unit);
    fclose(file);
    if (fields >= 1 && size > 0) return size << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0);
  }
  return int64_t{32} << 20;
}

int64_t cache_bytes = read_cache_bytes();

}  // namespace

const CpuKernels& cpu_kernels(DType dtype) { return dtype == DType::f64 ? kLevels[0] : *chosen; }

bool beyond_caches(int64_t bytes) { return bytes > cache_bytes; }

}  // namespace megatronish

extern "C" int64_t megatronish_set_cache_bytes(int64_t bytes) {
  const int64_t before = megatronish::cache_bytes;
  megatronish::cache_bytes = bytes;
  return before;
}

extern "C" const char* megatronish_cpu_level() { return megatronish::chosen->name; }

extern "C" int megatronish_set_cpu_level(const char* name) {
  for (const auto& level : megatronish::kLevels) {
    if (strcmp(level.name, name) == 0 && megatronish::cpu_runs(name)) {
      megatronish::chosen = &level;
      return 0;
    }
  }
  return -1;
}
