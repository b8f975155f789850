// Tensors of torch's stable ABI as the operators need them: messages, checks, allocation. Included by the bindings alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace megatronish {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- Messages: operator, argument, expected, got.

[[noreturn]] void refuse(const char* op, const char* argument, const std::string& expected, const std::string& got) {
  throw std::runtime_error(std::string(op) + ": " + argument + ": expected " + expected + ", got " + got);
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

std::string dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype (torch's number " + std::to_string(static_cast<int>(type)) + ")";
  }
}

// ---- Checks.

DType dtype_of(const char* op, const char* argument, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: refuse(op, argument, "float32, bfloat16, float16 or float64", dtype_text(t.scalar_type()));
  }
}

// The same without float64, which attention and the products of few rows have no kernels for.
DType float_dtype_of(const char* op, const char* argument, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Double) refuse(op, argument, "float32, bfloat16 or float16", "float64");
  return dtype_of(op, argument, t);
}

void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType expected) {
  if (t.scalar_type() != expected) refuse(op, argument, dtype_text(expected), dtype_text(t.scalar_type()));
}

void check_shape(const char* op, const char* argument, const Tensor& t, const std::vector<int64_t>& expected) {
  const auto sizes = t.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
    refuse(op, argument, "shape " + shape_text(expected), shape_text(sizes));
  }
}

void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
#ifdef MEGATRONISH_CUDA
  const bool same = t.is_cuda() && t.get_device_index() == like.get_device_index();
#else
  const bool same = t.is_cpu() && like.is_cpu();
#endif
  if (!same) refuse(op, argument, "all tensors on one device", "one on another");
}

// `t` has the shape, dtype and device of `like`.
void check_same(const char* op, const char* argument, const Tensor& t, const Tensor& like) {
  check_device(op, argument, t, like);
  check_dtype(op, argument, t, like.scalar_type());
  const auto sizes = like.sizes();
  check_shape(op, argument, t, {sizes.begin(), sizes.end()});
}

void check_has_dims(const char* op, const char* argument, const Tensor& t) {
  if (t.dim() == 0) refuse(op, argument, "at least one dim", "a scalar");
}

// A norm's weight: one element a channel of x, in x's dtype or float32.
void check_weight(const char* op, const Tensor& w, const Tensor& x) {
  check_device(op, "w", w, x);
  check_shape(op, "w", w, {x.size(x.dim() - 1)});
  if (w.scalar_type() != x.scalar_type() && w.scalar_type() != ScalarType::Float) {
    refuse(op, "w", "float32 or the dtype of x, " + dtype_text(x.scalar_type()), dtype_text(w.scalar_type()));
  }
}

// ---- Tensors.

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

MaybeTensor dense(const MaybeTensor& t) { return t ? MaybeTensor(dense(*t)) : t; }

const void* data(const MaybeTensor& t) { return t ? t->data_ptr() : nullptr; }

int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    default: return aoti_torch_dtype_float32();
  }
}

// Uninitialised and contiguous, on the device of `like`. The C function, for the C++ one goes through the dispatcher.
Tensor make(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
#ifdef MEGATRONISH_CUDA
  const int32_t device_type = aoti_torch_device_type_cuda(), index = like.get_device_index();
#else
  (void)like;
  const int32_t device_type = aoti_torch_device_type_cpu(), index = 0;
#endif
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype_code(type), device_type, index, &handle));
  return Tensor(handle);
}

std::vector<int64_t> shape(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

std::vector<int64_t> shape_with_last(const Tensor& t, int64_t last) {
  auto sizes = shape(t);
  sizes.back() = last;
  return sizes;
}

ScalarType wide_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// Rows of the last dim; 0 where that is 0.
int64_t row_count(const Tensor& t) {
  const int64_t width = t.size(t.dim() - 1);
  return width == 0 ? 0 : t.numel() / width;
}

}  // namespace
}  // namespace megatronish
