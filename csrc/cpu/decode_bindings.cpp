// torch.ops.megatronish.linear_rows (also of int8 and int4 weights) and cached_attention_, on the CPU only: schemas, checks,
// allocation. Like bindings.cpp it talks to torch through its stable ABI.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "../tensors.h"
#include "levels.h"

namespace megatronish {
namespace {

constexpr int64_t kWeightsAThread = 32768;  // below this another thread costs more than it gains

void require(bool good, const char* op, const char* expected) {
  if (!good) throw std::runtime_error(std::string(op) + ": expected " + expected);
}

// Common to the three formats; x [m, k] with contiguous channels.
Tensor multiply(const char* op, LinearRows& a, const Tensor& x_in, const Tensor& w, const MaybeTensor& bias) {
  require(x_in.is_cpu() && w.is_cpu() && x_in.dim() == 2 && w.dim() == 2 && w.is_contiguous(), op,
          "x [m, k] and a contiguous weight of two dims, on the CPU");
  const Tensor x = x_in.stride(1) == 1 ? x_in : dense(x_in);
  a.dtype = float_dtype_of(op, "x", x);
  a.m = x.size(0), a.k = x.size(1), a.n = w.size(0);
  require(w.size(1) == (a.format == WeightFormat::int4 ? a.k / 2 : a.k), op, "as many columns of the weight as x has");
  if (bias) {
    require(bias->is_cpu() && bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == a.n &&
                bias->scalar_type() == x.scalar_type(),
            op, "a bias with one element an output, of the dtype of x");
    a.bias = bias->data_ptr();
  }
  const Tensor y = make({a.m, a.n}, x.scalar_type(), x);
  a.x = x.data_ptr();
  a.x_row = x.stride(0);
  a.w = w.data_ptr();
  a.y = y.data_ptr();
  if (a.m == 0 || a.n == 0) return y;
  const bool quantized = a.format != WeightFormat::dense;
  const Tensor wide = make({quantized ? a.m : 0, a.k}, ScalarType::Float, x);
  const Tensor sums = make({a.format == WeightFormat::int4 ? a.m * (a.k / a.group) : 0}, ScalarType::Float, x);
  a.wide_x = static_cast<float*>(wide.data_ptr());
  a.group_sums = static_cast<float*>(sums.data_ptr());
  const CpuKernels& kernels = cpu_kernels(a.dtype);
  if (quantized) kernels.linear_rows_prepare(a, 0, a.m);
  const int64_t grain = std::max<int64_t>(4, kWeightsAThread / std::max<int64_t>(a.k, 1) + 3 & ~int64_t{3});
  if (a.n <= grain) {
    kernels.linear_rows(a, 0, a.n);
  } else {
    torch::stable::parallel_for(0, a.n, grain, [&](int64_t begin, int64_t end) { kernels.linear_rows(a, begin, end); });
  }
  return y;
}

Tensor linear_rows(Tensor x, Tensor w, MaybeTensor bias) {
  LinearRows a{};
  a.format = WeightFormat::dense;
  require(w.scalar_type() == x.scalar_type(), "linear_rows", "x and the weight in one dtype");
  return multiply("linear_rows", a, x, w, bias);
}

Tensor linear_rows_int8(Tensor x, Tensor w, Tensor scales, MaybeTensor bias) {
  const char* op = "linear_rows_int8";
  LinearRows a{};
  a.format = WeightFormat::int8;
  require(w.scalar_type() == ScalarType::Char, op, "an int8 weight");
  require(scales.is_cpu() && scales.is_contiguous() && scales.scalar_type() == ScalarType::Float && scales.dim() == 1 &&
              scales.size(0) == w.size(0),
          op, "float32 scales, one per row of the weight");
  a.scales = static_cast<const float*>(scales.data_ptr());
  return multiply(op, a, x, w, bias);
}

Tensor linear_rows_int4(Tensor x, Tensor w, Tensor ranges, MaybeTensor bias) {
  const char* op = "linear_rows_int4";
  LinearRows a{};
  a.format = WeightFormat::int4;
  require(w.scalar_type() == ScalarType::Byte && w.dim() == 2, op, "a uint8 weight [n, k / 2]");
  require(ranges.is_cpu() && ranges.is_contiguous() && ranges.scalar_type() == ScalarType::BFloat16 && ranges.dim() == 3 &&
              ranges.size(0) == w.size(0) && ranges.size(1) > 0 && ranges.size(2) == 2,
          op, "bfloat16 ranges [n, groups, 2]");
  a.group = 2 * w.size(1) / ranges.size(1);
  require(a.group % kInt4Block == 0 && a.group * ranges.size(1) == 2 * w.size(1) && x.dim() == 2 && x.size(1) == 2 * w.size(1),
          op, "groups of a multiple of 32 columns that make up a row");
  a.ranges = ranges.data_ptr();
  return multiply(op, a, x, w, bias);
}

void check_heads(const char* op, const Tensor& t, const Tensor& q, int64_t heads) {
  require(t.is_cpu() && t.scalar_type() == q.scalar_type() && t.dim() == 4 && t.size(2) == heads && t.size(3) == q.size(3) &&
              t.stride(3) == 1 && t.stride(2) == t.size(3),
          op, "q, k and v [batch, new, heads, head_dim] of one dtype, the heads of a token contiguous");
}

Tensor cached_attention_(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, Tensor rows, Tensor positions,
                         int64_t window, double scale) {
  const char* op = "cached_attention_";
  CachedAttention a{};
  a.dtype = float_dtype_of(op, "q", q);
  require(q.dim() == 4 && k.dim() == 4 && keys.dim() == 4 && values.dim() == 4, op, "tensors of four dims");
  a.batch = q.size(0), a.new_tokens = q.size(1), a.heads = q.size(2), a.head_dim = q.size(3);
  a.kv_heads = k.size(2), a.capacity = keys.size(1);
  require(a.kv_heads > 0 && a.heads % a.kv_heads == 0 && a.head_dim % 16 == 0, op,
          "a multiple of the key/value heads, and a head_dim that is a multiple of 16");
  check_heads(op, q, q, a.heads);
  for (const Tensor* t : {&k, &v}) {
    check_heads(op, *t, q, a.kv_heads);
    require(t->size(0) == a.batch && t->size(1) == a.new_tokens, op, "as many keys and values as queries");
  }
  for (const Tensor* t : {&keys, &values}) {
    check_heads(op, *t, q, a.kv_heads);
    require(t->is_contiguous() && t->size(0) == keys.size(0) && t->size(1) == a.capacity, op,
            "a contiguous cache [rows, capacity, kv_heads, head_dim] twice");
  }
  for (const Tensor* t : {&rows, &positions}) {
    require(t->is_cpu() && t->is_contiguous() && t->scalar_type() == ScalarType::Int, op, "int32 rows and positions");
  }
  require(rows.numel() == a.batch && positions.numel() == a.batch * a.new_tokens, op, "rows [batch], positions [batch, new]");
  a.rows = static_cast<const int32_t*>(rows.data_ptr());
  a.positions = static_cast<const int32_t*>(positions.data_ptr());
  // A slot that a later position of the row has overwritten would be read as that position.
  const int64_t reach = window > 0 ? std::min(a.capacity, window) : a.capacity;
  for (int64_t i = 0; i < a.batch; ++i) {
    require(a.rows[i] >= 0 && a.rows[i] < keys.size(0), op, "rows of the cache");
    for (int64_t j = 0; j < a.new_tokens; ++j) {
      const int32_t p = a.positions[i * a.new_tokens + j], first = a.positions[i * a.new_tokens];
      require(first >= 0 && p == first + j, op, "positions of a row that count up from 0 or later");
      require(p < a.capacity || (window > 0 && reach + a.new_tokens - 1 <= a.capacity), op,
              "a cache with room for the positions, or for a window and the new tokens");
    }
  }
  const Tensor out = make({a.batch, a.new_tokens, a.heads, a.head_dim}, q.scalar_type(), q);
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
  a.keys = keys.data_ptr(), a.values = values.data_ptr(), a.out = out.data_ptr();
  a.q_batch = q.stride(0), a.q_new = q.stride(1), a.k_batch = k.stride(0), a.k_new = k.stride(1);
  a.v_batch = v.stride(0), a.v_new = v.stride(1);
  a.window = window;
  a.scale = static_cast<float>(scale);
  std::atomic<bool> good{true};
  const auto kernel = cpu_kernels(a.dtype).cached_attention;
  torch::stable::parallel_for(0, a.batch * a.kv_heads, 1, [&](int64_t begin, int64_t end) {
    if (!kernel(a, begin, end)) good = false;
  });
  if (!good) throw std::runtime_error("cached_attention_: out of memory for the scores");
  return out;
}

}  // namespace
}  // namespace megatronish

STABLE_TORCH_LIBRARY_FRAGMENT(megatronish, m) {
  m.def("linear_rows(Tensor x, Tensor w, Tensor? bias) -> Tensor");
  m.def("linear_rows_int8(Tensor x, Tensor w, Tensor scales, Tensor? bias) -> Tensor");
  m.def("linear_rows_int4(Tensor x, Tensor w, Tensor ranges, Tensor? bias) -> Tensor");
  m.def(
      "cached_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor rows, Tensor positions, "
      "int window, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatronish, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&megatronish::linear_rows));
  m.impl("linear_rows_int8", TORCH_BOX(&megatronish::linear_rows_int8));
  m.impl("linear_rows_int4", TORCH_BOX(&megatronish::linear_rows_int4));
  m.impl("cached_attention_", TORCH_BOX(&megatronish::cached_attention_));
}
