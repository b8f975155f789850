// Decode on the CPU: skinny GEMMs (products of few rows with a weight matrix) and attention over a key/value cache; the
// arguments of the kernels. The order of a row's sums does not depend on the number of rows, so that a batch is bitwise equal
// to its rows computed one by one.
#pragma once

#include "../kernels.h"

namespace megatronish {

enum class WeightFormat : int { dense, int8, int4 };

constexpr int64_t kInt4Block = 32;  // values that 16 bytes hold: the low halves are values 0 to 15, the high ones 16 to 31

// y[m, n] = x w^T + bias. dense: w [n, k] of dtype. int8: w int8 [n, k] times scales[n]. int4: w uint8 [n, k / 2], value q of a
// group of `group` times its scale plus its low end.
struct LinearRows {
  const void* x;        // [m, k] dtype; rows x_row elements apart
  const void* w;
  const float* scales;  // int8: [n]
  const void* ranges;   // int4: bf16 [n, k / group, 2], scale and low end
  const void* bias;     // [n] dtype, or null
  void* y;              // [m, n] dtype
  float* wide_x;        // int8, int4: [m, k], set by linear_rows_prepare
  float* group_sums;    // int4: [m, k / group], set by linear_rows_prepare
  int64_t m, n, k, x_row, group;
  DType dtype;
  WeightFormat format;
};

// The new keys and values are written into the cache, then each query reads the positions max(0, p - window + 1) to p of its
// row, p its own; position p is stored at p % capacity. Query head i reads key/value head i / (heads / kv_heads).
struct CachedAttention {
  const void* q;             // [batch, new, heads, head_dim] dtype; strides of batch, new; the channels of a token contiguous
  const void* k;             // [batch, new, kv_heads, head_dim]; the same
  const void* v;             // the same
  void* keys;                // [rows, capacity, kv_heads, head_dim] dtype
  void* values;              // the same
  void* out;                 // [batch, new, heads, head_dim]
  const int32_t* rows;       // [batch]
  const int32_t* positions;  // [batch, new], each one more than the one before
  int64_t batch, new_tokens, heads, kv_heads, head_dim, capacity, window;  // window 0: all
  int64_t q_batch, q_new, k_batch, k_new, v_batch, v_new;
  float scale;
  DType dtype;
};

}  // namespace megatronish
