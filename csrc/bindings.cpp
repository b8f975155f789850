// The operators of torch.ops.megatronish: schemas, checks, allocation, and the way to the CPU and CUDA kernels. With its three
// headers the only file that talks to torch's dispatcher, and only through torch's stable ABI, so that one binary serves torch
// 2.10 and later. Compiled twice: plainly for the schemas and the CPU, with -DMEGATRONISH_CUDA for CUDA.
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <tuple>
#include <utility>

#include "rope_operators.h"

namespace megatronish {
namespace {

// ---- RMSNorm.

std::tuple<Tensor, Tensor, Tensor> norm_forward(const char* op, const Tensor& x_in, const MaybeTensor& residual_in,
                                                const MaybeTensor& w_in, double eps, double w_offset) {
  check_has_dims(op, "x", x_in);
  const DType dtype = dtype_of(op, "x", x_in);
  check_device(op, "x", x_in, x_in);
  if (residual_in) check_same(op, "residual", *residual_in, x_in);
  if (w_in) check_weight(op, *w_in, x_in);
  const DeviceGuard guard(x_in);
  const Tensor x = dense(x_in);
  const MaybeTensor residual = dense(residual_in), w = dense(w_in);
  const Tensor y = make(shape(x), x.scalar_type(), x);
  const Tensor res_out = residual ? make(shape(x), x.scalar_type(), x) : y;
  const Tensor rstd = make(shape_with_last(x, 1), wide_type(dtype), x);
  RmsNormFwd a{};
  a.x = x.data_ptr();
  a.residual = data(residual);
  a.w = data(w);
  a.y = y.data_ptr();
  a.res_out = residual ? res_out.data_ptr() : nullptr;
  a.rstd = rstd.data_ptr();
  a.rows = row_count(x);
  a.width = x.size(x.dim() - 1);
  a.eps = eps;
  a.w_offset = w_offset;
  a.dtype = dtype;
  a.w_dtype = w ? dtype_of(op, "w", *w) : dtype;
  run(a, x);
  return {y, res_out, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_fwd(Tensor x, MaybeTensor w, double eps, double w_offset) {
  auto [y, same, rstd] = norm_forward("rms_norm_fwd", x, std::nullopt, w, eps, w_offset);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(Tensor x, Tensor residual, MaybeTensor w, double eps,
                                                    double w_offset) {
  return norm_forward("add_rms_norm_fwd", x, residual, w, eps, w_offset);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(Tensor dy_in, MaybeTensor dres_in, Tensor x_in, MaybeTensor w_in, Tensor rstd_in,
                                        double w_offset, bool need_dw) {
  const char* op = "rms_norm_bwd";
  check_has_dims(op, "x", x_in);
  const DType dtype = dtype_of(op, "x", x_in);
  check_same(op, "dy", dy_in, x_in);
  if (dres_in) check_same(op, "dres", *dres_in, x_in);
  if (w_in) check_weight(op, *w_in, x_in);
  check_device(op, "rstd", rstd_in, x_in);
  check_dtype(op, "rstd", rstd_in, wide_type(dtype));
  check_shape(op, "rstd", rstd_in, shape_with_last(x_in, 1));
  const DeviceGuard guard(x_in);
  const Tensor dy = dense(dy_in), x = dense(x_in), rstd = dense(rstd_in);
  const MaybeTensor dres = dense(dres_in), w = dense(w_in);
  const bool with_dw = need_dw && w;
  RmsNormBwd a{};
  a.rows = row_count(x);
  a.width = x.size(x.dim() - 1);
  a.partitions = partition_count(a.rows, a.width);
  const Tensor dx = make(shape(x), x.scalar_type(), x);
  const Tensor dw = make({with_dw ? a.width : 0}, w ? w->scalar_type() : x.scalar_type(), x);
  const Tensor partial = make({with_dw ? a.partitions : 0, a.width}, wide_type(dtype), x);
  a.dy = dy.data_ptr();
  a.dres = data(dres);
  a.x = x.data_ptr();
  a.w = data(w);
  a.rstd = rstd.data_ptr();
  a.dx = dx.data_ptr();
  a.dw = with_dw ? dw.data_ptr() : nullptr;
  a.partial = with_dw ? partial.data_ptr() : nullptr;
  a.w_offset = w_offset;
  a.dtype = dtype;
  a.w_dtype = w ? dtype_of(op, "w", *w) : dtype;
  run(a, x);
  return {dx, dw};
}

// ---- SwiGLU.

int64_t half_width(const char* op, const Tensor& gate_up) {
  check_has_dims(op, "gate_up", gate_up);
  const int64_t width = gate_up.size(gate_up.dim() - 1);
  if (width % 2 != 0) refuse(op, "gate_up", "an even last dim, gate and up", std::to_string(width));
  return width / 2;
}

Tensor swiglu_fwd(Tensor gate_up_in) {
  const char* op = "swiglu_fwd";
  const int64_t width = half_width(op, gate_up_in);
  const DType dtype = dtype_of(op, "gate_up", gate_up_in);
  const DeviceGuard guard(gate_up_in);
  const Tensor gate_up = dense(gate_up_in);
  const Tensor y = make(shape_with_last(gate_up, width), gate_up.scalar_type(), gate_up);
  SwigluFwd a{};
  a.gate_up = gate_up.data_ptr();
  a.y = y.data_ptr();
  a.rows = row_count(gate_up);
  a.width = width;
  a.dtype = dtype;
  run(a, gate_up);
  return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd(Tensor dy_in, Tensor gate_up_in, bool recompute_y) {
  const char* op = "swiglu_bwd";
  const int64_t width = half_width(op, gate_up_in);
  const DType dtype = dtype_of(op, "gate_up", gate_up_in);
  check_device(op, "dy", dy_in, gate_up_in);
  check_dtype(op, "dy", dy_in, gate_up_in.scalar_type());
  check_shape(op, "dy", dy_in, shape_with_last(gate_up_in, width));
  const DeviceGuard guard(gate_up_in);
  const Tensor dy = dense(dy_in), gate_up = dense(gate_up_in);
  const Tensor dgate_up = make(shape(gate_up), gate_up.scalar_type(), gate_up);
  const Tensor y = make(recompute_y ? shape(dy) : std::vector<int64_t>{0}, gate_up.scalar_type(), gate_up);
  SwigluBwd a{};
  a.dy = dy.data_ptr();
  a.gate_up = gate_up.data_ptr();
  a.dgate_up = dgate_up.data_ptr();
  a.y = recompute_y ? y.data_ptr() : nullptr;
  a.rows = row_count(gate_up);
  a.width = width;
  a.dtype = dtype;
  run(a, gate_up);
  return {dgate_up, y};
}

// ---- QK-norm and RoPE.

// What forward and backward share: weights, angles, and the layout of the heads of qkv. Returns the tensors that own the memory.
struct QkKept {
  Angles rotation;
  Tensor qkv, q_weight, k_weight;
};

QkKept qk_heads(const char* op, const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos,
                const Tensor& sin, const MaybeTensor& positions, int64_t offset, const std::vector<int64_t>& heads,
                QkHeads& a) {
  const Angles rotation = angles(op, qkv, cos, sin, positions, offset, a);
  if (heads.size() != 4 || *std::min_element(heads.begin(), heads.end()) < 0) {
    refuse(op, "heads", "groups, and q, k and v heads of each", shape_text(heads));
  }
  a.groups = heads[0];
  a.q_heads = heads[1];
  a.k_heads = heads[2];
  a.v_heads = heads[3];
  const int64_t all = a.groups * (a.q_heads + a.k_heads + a.v_heads);
  if (all != qkv.size(2)) {
    refuse(op, "qkv", "groups * (q + k + v heads) = " + std::to_string(all) + " heads", std::to_string(qkv.size(2)));
  }
  if (a.head_dim > kMaxNormedHeadDim) {
    refuse(op, "qkv", "head_dim of at most " + std::to_string(kMaxNormedHeadDim), std::to_string(a.head_dim));
  }
  for (const auto& [name, w] : {std::pair<const char*, const Tensor&>("q_weight", q_weight), {"k_weight", k_weight}}) {
    check_device(op, name, w, qkv);
    check_shape(op, name, w, {a.head_dim});
    if (w.scalar_type() != qkv.scalar_type() && w.scalar_type() != ScalarType::Float) {
      refuse(op, name, "float32 or the dtype of qkv, " + dtype_text(qkv.scalar_type()), dtype_text(w.scalar_type()));
    }
  }
  check_dtype(op, "k_weight", k_weight, q_weight.scalar_type());
  const bool heads_dense = qkv.numel() == 0 || (qkv.stride(3) == 1 && qkv.stride(2) == a.head_dim);
  QkKept kept{rotation, heads_dense ? qkv : dense(qkv), dense(q_weight), dense(k_weight)};
  a.qkv = kept.qkv.data_ptr();
  a.q_weight = kept.q_weight.data_ptr();
  a.k_weight = kept.k_weight.data_ptr();
  a.qkv_batch = kept.qkv.stride(0);
  a.qkv_seq = kept.qkv.stride(1);
  a.w_dtype = dtype_of(op, "q_weight", q_weight);
  return kept;
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_fwd(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,
                                                    MaybeTensor positions, int64_t offset, std::vector<int64_t> heads,
                                                    double eps, double w_offset, bool interleaved) {
  QkNormRopeFwd a{};
  const DeviceGuard guard(qkv);
  const QkKept kept = qk_heads("qk_norm_rope_fwd", qkv, q_weight, k_weight, cos, sin, positions, offset, heads, a);
  const Tensor q = make({a.batch, a.seq, a.groups * a.q_heads, a.head_dim}, qkv.scalar_type(), qkv);
  const Tensor k = make({a.batch, a.seq, a.groups * a.k_heads, a.head_dim}, qkv.scalar_type(), qkv);
  const Tensor rstd = make({a.batch, a.seq, a.groups * (a.q_heads + a.k_heads)}, wide_type(a.dtype), qkv);
  a.q = q.data_ptr();
  a.k = k.data_ptr();
  a.rstd = rstd.data_ptr();
  a.eps = eps;
  a.w_offset = w_offset;
  a.interleaved = interleaved;
  run(a, qkv);
  return {q, k, rstd};
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_bwd(Tensor dq_in, Tensor dk_in, Tensor dv_in, Tensor qkv, Tensor q_weight,
                                                    Tensor k_weight, Tensor cos, Tensor sin, MaybeTensor positions,
                                                    Tensor rstd_in, int64_t offset, std::vector<int64_t> heads,
                                                    double w_offset, bool interleaved, bool need_dw) {
  const char* op = "qk_norm_rope_bwd";
  QkNormRopeBwd a{};
  const DeviceGuard guard(qkv);
  const QkKept kept = qk_heads(op, qkv, q_weight, k_weight, cos, sin, positions, offset, heads, a);
  const auto grad_shape = [&](int64_t each) { return std::vector<int64_t>{a.batch, a.seq, a.groups * each, a.head_dim}; };
  const Tensor dq = head_grads(op, "dq", dq_in, grad_shape(a.q_heads), qkv);
  const Tensor dk = head_grads(op, "dk", dk_in, grad_shape(a.k_heads), qkv);
  const Tensor dv = head_grads(op, "dv", dv_in, grad_shape(a.v_heads), qkv);
  check_device(op, "rstd", rstd_in, qkv);
  check_dtype(op, "rstd", rstd_in, wide_type(a.dtype));
  check_shape(op, "rstd", rstd_in, {a.batch, a.seq, a.groups * (a.q_heads + a.k_heads)});
  const Tensor rstd = dense(rstd_in), dqkv = make(shape(qkv), qkv.scalar_type(), qkv);
  a.partitions = partition_count(a.batch * a.seq, a.groups * (a.q_heads + a.k_heads) * a.head_dim);
  const Tensor partial = make({2, need_dw ? a.partitions : 0, a.head_dim}, wide_type(a.dtype), qkv);
  const Tensor dq_weight = make({need_dw ? a.head_dim : 0}, q_weight.scalar_type(), qkv);
  const Tensor dk_weight = make({need_dw ? a.head_dim : 0}, q_weight.scalar_type(), qkv);
  a.dq = dq.data_ptr();
  a.dk = dk.data_ptr();
  a.dv = dv.data_ptr();
  a.dqkv = dqkv.data_ptr();
  a.rstd = rstd.data_ptr();
  a.partial = need_dw ? partial.data_ptr() : nullptr;
  a.dq_batch = dq.stride(0), a.dq_seq = dq.stride(1), a.dq_head = dq.stride(2);
  a.dk_batch = dk.stride(0), a.dk_seq = dk.stride(1), a.dk_head = dk.stride(2);
  a.dv_batch = dv.stride(0), a.dv_seq = dv.stride(1), a.dv_head = dv.stride(2);
  a.w_offset = w_offset;
  a.interleaved = interleaved;
  run(a, qkv);
  const int64_t kind_bytes = a.partitions * a.head_dim * (a.dtype == DType::f64 ? 8 : 4);
  for (int kind = 0; need_dw && kind < 2; ++kind) {
    RmsNormBwd sums{};
    sums.partial = static_cast<char*>(a.partial) + kind * kind_bytes;
    sums.dw = (kind == 0 ? dq_weight : dk_weight).data_ptr();
    sums.width = a.head_dim;
    sums.partitions = a.partitions;
    sums.dtype = a.dtype;
    sums.w_dtype = a.w_dtype;
    sum_partitions(sums, qkv);
  }
  return {dqkv, dq_weight, dk_weight};
}

// ---- Cross-entropy.

DType logits_dtype(const char* op, const Tensor& logits, const Tensor& target) {
  if (logits.dim() != 2) refuse(op, "logits", "shape [rows, vocabulary]", shape_text(logits.sizes()));
  check_device(op, "target", target, logits);
  check_dtype(op, "target", target, ScalarType::Long);
  check_shape(op, "target", target, {logits.size(0)});
  return dtype_of(op, "logits", logits);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(Tensor logits_in, Tensor target_in, int64_t vocab_start,
                                                     int64_t vocab_size, int64_t ignore_index) {
  const char* op = "cross_entropy_fwd";
  CrossEntropyFwd a{};
  a.dtype = logits_dtype(op, logits_in, target_in);
  a.rows = logits_in.size(0);
  a.width = logits_in.size(1);
  if (vocab_start < 0 || vocab_start + a.width > vocab_size) {
    refuse(op, "vocab_start", "a shard of " + std::to_string(a.width) + " columns within the vocabulary of " +
                                  std::to_string(vocab_size), std::to_string(vocab_start));
  }
  const DeviceGuard guard(logits_in);
  const Tensor logits = a.width <= 1 || logits_in.stride(1) == 1 ? logits_in : dense(logits_in);
  const Tensor target = dense(target_in);
  const auto make_row = [&] { return make({a.rows}, wide_type(a.dtype), logits); };
  const Tensor max = make_row(), sum = make_row(), target_logit = make_row();
  a.logits = logits.data_ptr();
  a.target = static_cast<const int64_t*>(target.data_ptr());
  a.max = max.data_ptr();
  a.sum = sum.data_ptr();
  a.target_logit = target_logit.data_ptr();
  a.row_stride = logits.stride(0);
  a.vocab_start = vocab_start;
  a.vocab_size = vocab_size;
  a.ignore_index = ignore_index;
#ifndef MEGATRONISH_CUDA  // on CUDA a look would stall the stream: the kernel makes such a row NaN
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t token = a.target[row];
    if (token != ignore_index && (token < 0 || token >= vocab_size)) {
      refuse(op, "target", "tokens from 0 to " + std::to_string(vocab_size - 1) + ", or " + std::to_string(ignore_index),
             std::to_string(token) + " in row " + std::to_string(row));
    }
  }
#endif
  run(a, logits);
  return {max, sum, target_logit};
}

void cross_entropy_bwd_(Tensor logits, Tensor target_in, Tensor grad, Tensor max_in, Tensor sum_in, int64_t vocab_start,
                        int64_t ignore_index) {
  const char* op = "cross_entropy_bwd_";
  CrossEntropyBwd a{};
  a.dtype = logits_dtype(op, logits, target_in);
  a.rows = logits.size(0);
  a.width = logits.size(1);
  if (a.width > 1 && logits.stride(1) != 1) refuse(op, "logits", "strides [..., 1]", shape_text(logits.strides()));
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("grad", grad), {"max", max_in}, {"sum", sum_in}}) {
    check_device(op, name, t, logits);
    check_dtype(op, name, t, wide_type(a.dtype));
    check_shape(op, name, t, {a.rows});
  }
  const DeviceGuard guard(logits);
  const Tensor target = dense(target_in), max = dense(max_in), sum = dense(sum_in);
  a.logits = logits.data_ptr();
  a.target = static_cast<const int64_t*>(target.data_ptr());
  a.grad = grad.data_ptr();
  a.max = max.data_ptr();
  a.sum = sum.data_ptr();
  a.row_stride = logits.stride(0);
  a.grad_stride = grad.stride(0);
  a.vocab_start = vocab_start;
  a.ignore_index = ignore_index;
  run(a, logits);
}

}  // namespace
}  // namespace megatronish

#ifndef MEGATRONISH_CUDA
STABLE_TORCH_LIBRARY(megatronish, m) {
  m.def("rms_norm_fwd(Tensor x, Tensor? w, float eps, float w_offset) -> (Tensor y, Tensor rstd)");
  m.def(
      "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? w, float eps, float w_offset) -> "
      "(Tensor y, Tensor res_out, Tensor rstd)");
  m.def(
      "rms_norm_bwd(Tensor dy, Tensor? dres, Tensor x, Tensor? w, Tensor rstd, float w_offset, bool need_dw) -> "
      "(Tensor dx, Tensor dw)");
  m.def("swiglu_fwd(Tensor gate_up) -> Tensor");
  m.def("swiglu_bwd(Tensor dy, Tensor gate_up, bool recompute_y) -> (Tensor dgate_up, Tensor y)");
  m.def(
      "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int offset, bool interleaved, bool inverse) -> Tensor");
  m.def(
      "rope_qkv_(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor? positions, int groups, int q_per_group, "
      "int k_per_group, int v_per_group, bool interleaved, bool inverse) -> ()");
  m.def(
      "rope_qkv_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor? positions, int groups, "
      "bool interleaved) -> Tensor");
  m.def(
      "qk_norm_rope_fwd(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? positions, int offset, "
      "int[] heads, float eps, float w_offset, bool interleaved) -> (Tensor q, Tensor k, Tensor rstd)");
  m.def(
      "qk_norm_rope_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, "
      "Tensor sin, Tensor? positions, Tensor rstd, int offset, int[] heads, float w_offset, bool interleaved, bool need_dw) "
      "-> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight)");
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor target, int vocab_start, int vocab_size, int ignore_index) -> "
      "(Tensor max, Tensor sum, Tensor target_logit)");
  m.def(
      "cross_entropy_bwd_(Tensor(a!) logits, Tensor target, Tensor grad, Tensor max, Tensor sum, int vocab_start, "
      "int ignore_index) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(megatronish, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(megatronish, CUDA, m) {
#endif
  m.impl("rms_norm_fwd", TORCH_BOX(&megatronish::rms_norm_fwd));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&megatronish::add_rms_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&megatronish::rms_norm_bwd));
  m.impl("swiglu_fwd", TORCH_BOX(&megatronish::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&megatronish::swiglu_bwd));
  m.impl("rope", TORCH_BOX(&megatronish::rope));
  m.impl("rope_qkv_", TORCH_BOX(&megatronish::rope_qkv_));
  m.impl("rope_qkv_bwd", TORCH_BOX(&megatronish::rope_qkv_bwd));
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&megatronish::qk_norm_rope_fwd));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&megatronish::qk_norm_rope_bwd));
  m.impl("cross_entropy_fwd", TORCH_BOX(&megatronish::cross_entropy_fwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&megatronish::cross_entropy_bwd_));
}
