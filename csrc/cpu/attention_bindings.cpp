// torch.ops.megatronish.causal_attention_fwd and _bwd, on the CPU only: schemas, checks, allocation. Like bindings.cpp it
// talks to torch through its stable ABI.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "../tensors.h"
#include "levels.h"

namespace megatronish {
namespace {

// A [b, s, heads, d] tensor like q, its channels side by side; made so where they are not (an expanded gradient).
Tensor checked(const char* op, const char* argument, const Tensor& t, const Tensor& q, int64_t heads) {
  if (!t.is_cpu() || t.scalar_type() != q.scalar_type()) refuse(op, argument, "the dtype and device of q", "another");
  if (t.dim() != 4 || t.size(0) != q.size(0) || t.size(1) != q.size(1) || t.size(2) != heads || t.size(3) != q.size(3)) {
    refuse(op, argument,
           "[" + std::to_string(q.size(0)) + ", " + std::to_string(q.size(1)) + ", " + std::to_string(heads) + ", " +
               std::to_string(q.size(3)) + "]",
           shape_text(t.sizes()));
  }
  return t.stride(3) == 1 ? t : dense(t);
}

int64_t check_shapes(const char* op, const Tensor& q, const Tensor& k) {
  if (q.dim() != 4 || k.dim() != 4) refuse(op, "q and k", "[batch, seq, heads, head_dim]", shape_text(q.sizes()) + " and " + shape_text(k.sizes()));
  if (q.size(3) <= 0 || q.size(3) % 32 != 0) refuse(op, "q", "a head_dim that is a multiple of 32", std::to_string(q.size(3)));
  const int64_t kv_heads = k.size(2);
  if (kv_heads <= 0 || q.size(2) % kv_heads != 0) {
    refuse(op, "q", "a multiple of k's " + std::to_string(kv_heads) + " heads", std::to_string(q.size(2)));
  }
  return kv_heads;
}

const int32_t* first_keys(const char* op, const MaybeTensor& t, const Tensor& q) {
  if (!t) return nullptr;
  if (!t->is_cpu() || t->scalar_type() != ScalarType::Int || !t->is_contiguous() || t->dim() != 2 || t->size(0) != q.size(0) ||
      t->size(1) != q.size(1)) {
    refuse(op, "first_key", "contiguous int32 [batch, seq]", shape_text(t->sizes()));
  }
  const auto* keys = static_cast<const int32_t*>(t->data_ptr());
  for (int64_t i = 0; i < t->numel(); ++i) {
    if (keys[i] < 0 || keys[i] > i % q.size(1)) refuse(op, "first_key", "0 to the query's own position", std::to_string(keys[i]));
  }
  return keys;
}

Heads heads_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

template <class Args>
void run(const char* op, const Args& a, bool (*kernel)(const Args&, int64_t, int64_t)) {
  if (a.seq == 0) return;
  std::atomic<bool> good{true};
  torch::stable::parallel_for(0, a.batch * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
    if (!kernel(a, begin, end)) good = false;
  });
  if (!good) throw std::runtime_error(std::string(op) + ": out of memory for the packed blocks of " + std::to_string(a.seq) + " tokens");
}

std::tuple<Tensor, Tensor> causal_attention_fwd(Tensor q, Tensor k, Tensor v, MaybeTensor first_key, double scale) {
  const char* op = "causal_attention_fwd";
  const int64_t kv_heads = check_shapes(op, q, k);
  AttentionFwd a{};
  a.dtype = float_dtype_of(op, "q", q);
  q = checked(op, "q", q, q, q.size(2)), k = checked(op, "k", k, q, kv_heads), v = checked(op, "v", v, q, kv_heads);
  a.batch = q.size(0), a.seq = q.size(1), a.heads = q.size(2), a.kv_heads = kv_heads, a.head_dim = q.size(3);
  a.scale = static_cast<float>(scale);
  if (!(scale > 0)) refuse(op, "scale", "a positive number", std::to_string(scale));
  a.first_key = first_keys(op, first_key, q);
  const Tensor out = make({a.batch, a.seq, a.heads, a.head_dim}, q.scalar_type(), q);
  const Tensor log2_sum = make({a.batch, a.heads, a.seq}, ScalarType::Float, q);
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v), a.out = heads_of(out);
  a.log2_sum = static_cast<float*>(log2_sum.data_ptr());
  run<AttentionFwd>(op, a, cpu_kernels(a.dtype).attention_fwd);
  return {out, log2_sum};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log2_sum, MaybeTensor first_key,
    double scale) {
  const char* op = "causal_attention_bwd";
  const int64_t kv_heads = check_shapes(op, q, k);
  AttentionBwd a{};
  a.dtype = float_dtype_of(op, "q", q);
  a.batch = q.size(0), a.seq = q.size(1), a.heads = q.size(2), a.kv_heads = kv_heads, a.head_dim = q.size(3);
  q = checked(op, "q", q, q, a.heads), k = checked(op, "k", k, q, kv_heads), v = checked(op, "v", v, q, kv_heads);
  dout = checked(op, "dout", dout, q, a.heads), out = checked(op, "out", out, q, a.heads);
  if (log2_sum.scalar_type() != ScalarType::Float || !log2_sum.is_contiguous() ||
      log2_sum.numel() != a.batch * a.heads * a.seq) {
    refuse(op, "log2_sum", "what causal_attention_fwd returned", shape_text(log2_sum.sizes()));
  }
  a.scale = static_cast<float>(scale);
  if (!(scale > 0)) refuse(op, "scale", "a positive number", std::to_string(scale));
  a.first_key = first_keys(op, first_key, q);
  const Tensor dq = make({a.batch, a.seq, a.heads, a.head_dim}, q.scalar_type(), q);
  const Tensor dk = make({a.batch, a.seq, kv_heads, a.head_dim}, q.scalar_type(), q);
  const Tensor dv = make({a.batch, a.seq, kv_heads, a.head_dim}, q.scalar_type(), q);
  a.dout = heads_of(dout), a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v), a.out = heads_of(out);
  a.dq = heads_of(dq), a.dk = heads_of(dk), a.dv = heads_of(dv);
  a.log2_sum = static_cast<const float*>(log2_sum.data_ptr());
  run<AttentionBwd>(op, a, cpu_kernels(a.dtype).attention_bwd);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace megatronish

STABLE_TORCH_LIBRARY_FRAGMENT(megatronish, m) {
  m.def("causal_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? first_key, float scale) -> (Tensor out, Tensor log2_sum)");
  m.def(
      "causal_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log2_sum, Tensor? first_key, "
      "float scale) -> "
      "(Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(megatronish, CPU, m) {
  m.impl("causal_attention_fwd", TORCH_BOX(&megatronish::causal_attention_fwd));
  m.impl("causal_attention_bwd", TORCH_BOX(&megatronish::causal_attention_bwd));
}
