// The operators of the rotary position embedding, and what the fused QK-norm shares with them. Included by bindings.cpp alone.
#pragma once

#include <initializer_list>
#include <utility>

#include "run.h"

namespace megatronish {
namespace {

// cos or sin in the type of the arithmetic; float64 elements take fp32 tables too.
Tensor table(const char* op, const char* argument, const Tensor& t, const Tensor& x, DType dtype) {
  check_device(op, argument, t, x);
  if (dtype == DType::f64 && t.scalar_type() == ScalarType::Float) return dense(torch::stable::to(t, ScalarType::Double));
  check_dtype(op, argument, t, wide_type(dtype));
  return dense(t);
}

// Tables and positions of a rotation of x [b, s, heads, head_dim], checked; the tensors that own the memory are kept.
struct Angles {
  Tensor cos, sin;
  MaybeTensor positions;
};

template <class Args>
Angles angles(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, const MaybeTensor& positions,
              int64_t offset, Args& a) {
  if (x.dim() != 4) refuse(op, "x", "shape [batch, seq, heads, head_dim]", shape_text(x.sizes()));
  a.dtype = dtype_of(op, "x", x);
  if (cos.dim() != 2 || 2 * cos.size(1) > x.size(3)) {
    refuse(op, "cos", "shape [positions, rotary / 2] with rotary at most head_dim " + std::to_string(x.size(3)),
           shape_text(cos.sizes()));
  }
  check_shape(op, "sin", sin, shape(cos));
  Angles kept{table(op, "cos", cos, x, a.dtype), table(op, "sin", sin, x, a.dtype), positions};
  a.batch = x.size(0);
  a.seq = x.size(1);
  a.head_dim = x.size(3);
  a.half = cos.size(1);
  a.table_rows = cos.size(0);
  a.offset = offset;
  a.cos = kept.cos.data_ptr();
  a.sin = kept.sin.data_ptr();
  if (!positions) {
    if (offset < 0 || offset + a.seq > a.table_rows) {
      refuse(op, "offset", "0 <= offset and offset + seq " + std::to_string(a.seq) + " <= the tables' " +
                               std::to_string(a.table_rows) + " rows", std::to_string(offset));
    }
    return kept;
  }
  check_device(op, "positions", *positions, x);
  check_dtype(op, "positions", *positions, ScalarType::Int);
  check_shape(op, "positions", *positions, {a.batch, a.seq});
  kept.positions = dense(positions);
  a.positions = static_cast<const int32_t*>(kept.positions->data_ptr());
#ifndef MEGATRONISH_CUDA  // on CUDA a look would stall the stream: the kernel writes NaN for such a token
  for (int64_t i = 0; i < a.batch * a.seq; ++i) {
    if (a.positions[i] < 0 || a.positions[i] >= a.table_rows) {
      refuse(op, "positions", "numbers from 0 to " + std::to_string(a.table_rows - 1), std::to_string(a.positions[i]));
    }
  }
#endif
  return kept;
}

Tensor rope(Tensor x_in, Tensor cos, Tensor sin, MaybeTensor positions, int64_t offset, bool interleaved, bool inverse) {
  Rope a{};
  const DeviceGuard guard(x_in);
  const Angles kept = angles("rope", x_in, cos, sin, positions, offset, a);
  const Tensor x = x_in.stride(3) == 1 ? x_in : dense(x_in);
  const Tensor out = make(shape(x), x.scalar_type(), x);
  a.in = x.data_ptr();
  a.out = out.data_ptr();
  a.groups = 1;
  a.heads = x.size(2);
  a.in_batch = x.stride(0);
  a.in_seq = x.stride(1);
  a.in_head = x.stride(2);
  a.out_batch = out.stride(0);
  a.out_seq = out.stride(1);
  a.out_head = out.stride(2);
  a.interleaved = interleaved;
  a.inverse = inverse;
  run(a, x);
  return out;
}

void rope_qkv_(Tensor qkv, Tensor cos, Tensor sin, MaybeTensor positions, int64_t groups, int64_t q_per_group,
               int64_t k_per_group, int64_t v_per_group, bool interleaved, bool inverse) {
  const char* op = "rope_qkv_";
  Rope a{};
  const DeviceGuard guard(qkv);
  const Angles kept = angles(op, qkv, cos, sin, positions, 0, a);
  const int64_t heads = q_per_group + k_per_group + v_per_group;
  if (std::min({groups, q_per_group, k_per_group, v_per_group}) < 0 || groups * heads != qkv.size(2)) {
    refuse(op, "qkv", "groups * (q_per_group + k_per_group + v_per_group) = " + std::to_string(groups * heads) + " heads",
           std::to_string(qkv.size(2)));
  }
  if (qkv.numel() > 0 && (qkv.stride(3) != 1 || qkv.stride(2) != a.head_dim)) {
    refuse(op, "qkv", "strides [..., " + std::to_string(a.head_dim) + ", 1]", shape_text(qkv.strides()));
  }
  a.in = qkv.data_ptr();
  a.out = qkv.data_ptr();
  a.groups = groups;
  a.heads = q_per_group + k_per_group;
  a.in_batch = a.out_batch = qkv.stride(0);
  a.in_seq = a.out_seq = qkv.stride(1);
  a.in_group = a.out_group = heads * a.head_dim;
  a.in_head = a.out_head = a.head_dim;
  a.interleaved = interleaved;
  a.inverse = inverse;
  run(a, qkv);
}

// A gradient of [batch, seq, heads, head_dim] with any stride between heads.
Tensor head_grads(const char* op, const char* argument, const Tensor& grad, const std::vector<int64_t>& sizes,
                  const Tensor& like) {
  check_device(op, argument, grad, like);
  check_dtype(op, argument, grad, like.scalar_type());
  check_shape(op, argument, grad, sizes);
  return grad.numel() == 0 || grad.stride(3) == 1 ? grad : dense(grad);
}

// The gradient of rope_qkv_: dq and dk rotated back and dv, with any stride between their heads, into one packed gradient.
Tensor rope_qkv_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, MaybeTensor positions, int64_t groups,
                    bool interleaved) {
  const char* op = "rope_qkv_bwd";
  Rope a{};
  const DeviceGuard guard(dq);
  const Angles kept = angles(op, dq, cos, sin, positions, 0, a);
  if (dk.dim() != 4) refuse(op, "dk", "shape [batch, seq, heads, head_dim]", shape_text(dk.sizes()));
  if (dv.dim() != 4) refuse(op, "dv", "shape [batch, seq, heads, head_dim]", shape_text(dv.sizes()));
  const int64_t heads[] = {dq.size(2), dk.size(2), dv.size(2)};
  if (groups < 1 || heads[0] % groups != 0 || heads[1] % groups != 0 || heads[2] % groups != 0) {
    refuse(op, "groups", "a divisor of the q, k and v heads " + shape_text(std::vector<int64_t>(heads, heads + 3)),
           std::to_string(groups));
  }
  const int64_t all = heads[0] + heads[1] + heads[2];
  const Tensor dqkv = make({a.batch, a.seq, all, a.head_dim}, dq.scalar_type(), dq);
  const int64_t size = a.dtype == DType::f64 ? 8 : a.dtype == DType::f32 ? 4 : 2;
  a.groups = groups;
  a.interleaved = interleaved;
  a.inverse = true;
  a.out_batch = a.seq * all * a.head_dim;
  a.out_seq = all * a.head_dim;
  a.out_group = all / groups * a.head_dim;
  a.out_head = a.head_dim;
  char* out = static_cast<char*>(dqkv.data_ptr());
  const std::pair<const char*, const Tensor&> parts[] = {{"dq", dq}, {"dk", dk}, {"dv", dv}};
  Tensor dense_parts[3];
  for (int i = 0; i < 3; ++i) {
    dense_parts[i] = head_grads(op, parts[i].first, parts[i].second, {a.batch, a.seq, heads[i], a.head_dim}, dq);
  }
  for (int i = 0; i < 3; ++i) {
    const Tensor& in = dense_parts[i];
    a.in = in.data_ptr();
    a.out = out;
    a.heads = heads[i] / groups;
    a.in_batch = in.stride(0);
    a.in_seq = in.stride(1);
    a.in_head = in.stride(2);
    a.in_group = a.heads * a.in_head;
    if (i == 2) a.half = 0;  // nothing of v is rotated: all of it is copied
    if (in.numel() > 0) run(a, dq);
    out += a.heads * a.head_dim * size;
  }
  return dqkv;
}

}  // namespace
}  // namespace megatronish
