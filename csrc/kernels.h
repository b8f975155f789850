// The arguments of the kernels: raw pointers and sizes, the same on the CPU and on CUDA. Independent of torch.
// Tensors are contiguous unless strides are given. "wide" is the type of the arithmetic: float, or double for f64.
#pragma once

#include <stdint.h>

namespace megatronish {

enum class DType : int { f32, bf16, f16, f64 };

// y = x * rstd * (w + w_offset), rstd = 1 / sqrt(mean(x^2) + eps) a row. With a residual, x + residual is rounded into
// res_out and the norm is that of the rounded sum, so that the backward pass sees what the forward pass saw.
struct RmsNormFwd {
  const void* x;         // [rows, width] dtype
  const void* residual;  // the same, or null
  const void* w;         // [width] w_dtype, or null for 1
  void* y;               // [rows, width] dtype
  void* res_out;         // the same; null without a residual
  void* rstd;            // [rows] wide
  int64_t rows, width;
  double eps, w_offset;
  DType dtype, w_dtype;
};

// dx = rstd * (dy (w + w_offset) - n * mean(dy (w + w_offset) n)) + dres with n = x * rstd; dw = sum over rows of dy n.
// dw is summed in two steps, each in a fixed order: rows of one partition into a row of `partial`, then the partitions.
struct RmsNormBwd {
  const void* dy;    // [rows, width] dtype
  const void* dres;  // the same, or null
  const void* x;     // [rows, width] dtype
  const void* w;     // [width] w_dtype, or null for 1
  const void* rstd;  // [rows] wide
  void* dx;          // [rows, width] dtype
  void* dw;          // [width] w_dtype, or null
  void* partial;     // [partitions, width] wide, unset; null without dw
  int64_t rows, width, partitions;
  double w_offset;
  DType dtype, w_dtype;
};

// y = silu(gate) * up, gate_up [rows, 2 * width] with the gate in the first half of each row.
struct SwigluFwd {
  const void* gate_up;
  void* y;  // [rows, width]
  int64_t rows, width;
  DType dtype;
};

struct SwigluBwd {
  const void* dy;  // [rows, width]
  const void* gate_up;
  void* dgate_up;  // [rows, 2 * width]
  void* y;         // [rows, width], or null when it is not wanted again
  int64_t rows, width;
  DType dtype;
};

// Rotates the leading 2 * half channels of heads. A token's heads form `groups` groups of `heads` rotated ones; strides
// count elements. Out of place (in != out) the other channels of a rotated head are copied.
struct Rope {
  const void* in;
  void* out;
  const void* cos;           // [table_rows, half] float (double for f64)
  const void* sin;           // the same
  const int32_t* positions;  // [batch, seq], or null: token i of a row sits at offset + i
  int64_t batch, seq, groups, heads, head_dim, half, table_rows, offset;
  int64_t in_batch, in_seq, in_group, in_head;      // strides
  int64_t out_batch, out_seq, out_group, out_head;  // strides
  bool interleaved, inverse;
  DType dtype;
};

// The q and k heads of a packed projection, each normalised by RMSNorm with the weight of its kind and then rotated like a
// head of Rope. A token's heads form groups of q_heads, k_heads and v_heads in this order.
struct QkHeads {
  const void* qkv;           // [batch, seq, groups * (q_heads + k_heads + v_heads), head_dim] dtype; strides of batch, seq
  const void* q_weight;      // [head_dim] w_dtype
  const void* k_weight;      // the same
  const void* cos;           // [table_rows, half] wide
  const void* sin;           // the same
  const int32_t* positions;  // [batch, seq], or null: token i of a row sits at offset + i
  void* rstd;                // [batch, seq, groups * (q_heads + k_heads)] wide; written forward, read backward
  int64_t batch, seq, groups, q_heads, k_heads, v_heads, head_dim, half, table_rows, offset;
  int64_t qkv_batch, qkv_seq;  // strides
  double eps, w_offset;
  bool interleaved;
  DType dtype, w_dtype;
};

constexpr int64_t kMaxNormedHeadDim = 1024;  // what a head may have at most: the CPU kernels keep one on the stack

struct QkNormRopeFwd : QkHeads {
  void* q;  // [batch, seq, groups * q_heads, head_dim] dtype
  void* k;  // [batch, seq, groups * k_heads, head_dim] dtype
};

// The weight gradients are summed as in RmsNormBwd: a partition of the tokens into one row of `partial`, then those rows.
struct QkNormRopeBwd : QkHeads {
  const void* dq;         // as q, but for the strides
  const void* dk;         // as k
  const void* dv;         // [batch, seq, groups * v_heads, head_dim]
  void* dqkv;             // as qkv, contiguous; dv is copied into it
  void* partial;          // [2, partitions, head_dim] wide, unset; null without weight gradients
  int64_t dq_batch, dq_seq, dq_head, dk_batch, dk_seq, dk_head, dv_batch, dv_seq, dv_head;  // strides
  int64_t partitions;
};

// Cross-entropy of a vocabulary shard: this rank's columns are the tokens vocab_start to vocab_start + width - 1.
// A row: its largest logit, the sum of exp(logit - that), and the logit of its target (0 when that is in another shard, or
// is ignore_index; NaN when it is outside vocab_size).
struct CrossEntropyFwd {
  const void* logits;     // [rows, width] dtype, row_stride apart
  const int64_t* target;  // [rows]
  void* max;              // [rows] wide
  void* sum;              // the same
  void* target_logit;     // the same
  int64_t rows, width, row_stride, vocab_start, vocab_size, ignore_index;
  DType dtype;
};

// logits become (exp(logit - max) / sum - [is target]) * grad; rows of an ignored target become 0. max and sum are those of
// all shards together.
struct CrossEntropyBwd {
  void* logits;
  const int64_t* target;
  const void* grad;  // [rows] wide, grad_stride apart: 0 where all rows have one gradient
  const void* max;   // [rows] wide
  const void* sum;   // the same
  int64_t rows, width, row_stride, grad_stride, vocab_start, ignore_index;
  DType dtype;
};

}  // namespace megatronish
