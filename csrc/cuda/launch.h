// The CUDA kernels as bindings.cpp calls them: queued on `stream` (a cudaStream_t), on the current device. The result is a
// cudaError_t, 0 when all went well.
#pragma once

#include "../kernels.h"

namespace megatronish {
namespace cuda {

int rms_norm_fwd(const RmsNormFwd& args, void* stream);
int rms_norm_bwd(const RmsNormBwd& args, void* stream);
int swiglu_fwd(const SwigluFwd& args, void* stream);
int swiglu_bwd(const SwigluBwd& args, void* stream);
int rope(const Rope& args, void* stream);

// RmsNormBwd::partitions for this shape on the current device.
int64_t rms_norm_partitions(int64_t rows, int64_t width);

const char* error_text(int error);

}  // namespace cuda
}  // namespace megatronish
