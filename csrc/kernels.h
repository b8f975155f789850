// What bindings.cpp hands to a kernel: raw pointers and sizes, the same on the CPU and on CUDA. No torch here.
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

// Rotates the leading 2 * half channels of heads. A token's heads lie in `groups` groups of `heads` rotated ones; strides
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

}  // namespace megatronish
