// How large the caches are, for the choice between results that stay in them and results that go past them.
#pragma once

#include <stdint.h>

namespace megatronish {

// Whether an operator that moves so many bytes has pushed its first results out of the last-level cache by the time it ends.
// Whoever reads them next finds none of them there, so that streaming stores lose nothing, and spare the reading of each line
// before it is written.
bool beyond_caches(int64_t bytes);

}  // namespace megatronish

// For tests: sets the size of the last-level cache, which the operating system told when the library was loaded, and returns
// the size before. Not to be called while kernels run.
extern "C" __attribute__((visibility("default"))) int64_t megatronish_set_cache_bytes(int64_t bytes);
