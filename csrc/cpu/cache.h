// The size of the last-level cache, for the choice between ordinary and streaming stores.
#pragma once

#include <stdint.h>

namespace megatronish {

// Whether an operator that moves `bytes` bytes evicts its first results from the last-level cache before it ends. Their next
// reader would miss the cache anyway, so streaming stores cost nothing and avoid reading each line before it is written.
bool beyond_caches(int64_t bytes);

}  // namespace megatronish

// For tests: sets the size of the last-level cache, which is read from the operating system when the library is loaded, and
// returns the previous size. Not thread-safe.
extern "C" __attribute__((visibility("default"))) int64_t megatronish_set_cache_bytes(int64_t bytes);
