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
int qk_norm_rope_fwd(const QkNormRopeFwd& args, void* stream);
int qk_norm_rope_bwd(const QkNormRopeBwd& args, void* stream);
int cross_entropy_fwd(const CrossEntropyFwd& args, void* stream);
int cross_entropy_bwd(const CrossEntropyBwd& args, void* stream);

// RmsNormBwd::dw from RmsNormBwd::partial, the last step of every sum over partitions.
int sum_partitions(const RmsNormBwd& args, void* stream);

// RmsNormBwd::partitions for this shape on the current device.
int64_t rms_norm_partitions(int64_t rows, int64_t width);

const char* error_text(int error);

}  // namespace cuda
}  // namespace megatronish
