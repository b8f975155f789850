// Causal attention on the CPU: the arguments of the kernels. Shapes: b batch, s sequence, h query heads, g
// key/value heads, d head_dim; query head i reads key/value head i / (h / g).
#pragma once

#include "../kernels.h"

namespace megatronish {

// A [b, s, heads, d] tensor whose channels are contiguous; strides count elements.
struct Heads {
  void* data;
  int64_t batch, seq, head;
};

// out = softmax(q k^T * scale, keys first_key[query] to query) v; log2_sum: log2 of each query's sum of e^score.
struct AttentionFwd {
  Heads q, k, v, out;
  const int32_t* first_key;  // [b, s], at most the query; or null for 0
  float* log2_sum;  // [b, h, s]
  int64_t batch, seq, heads, kv_heads, head_dim;
  float scale;
  DType dtype;
};

struct AttentionBwd {
  Heads dout, q, k, v, out, dq, dk, dv;
  const int32_t* first_key;
  const float* log2_sum;  // as returned by the forward pass
  int64_t batch, seq, heads, kv_heads, head_dim;
  float scale;
  DType dtype;
};

}  // namespace megatronish
