// Questions that many operators ask of a tensor, and the memory layout that many need.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "common/bits.h"
#include "common/float_type.h"

namespace losa {

inline bool is_packed_mask(const torch::stable::Tensor& mask, int64_t rows, int64_t columns) {
  return mask.scalar_type() == torch::headeronly::ScalarType::Byte && mask.dim() == 2 && mask.size(0) == rows &&
      mask.size(1) == packed_width(columns);
}

inline void check_mask(const torch::stable::Tensor& mask, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(is_packed_mask(mask, rows, columns), name,
                  ": expected a uint8 tensor (out, ceil(in / 8)) for a weight (", rows, ", ", columns, ")");
}

inline bool is_dense_float(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.is_contiguous();
}

inline bool has_dense_rows(const torch::stable::Tensor& matrix) {
  // Strides of nothing mean nothing, and torch does not change them.
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 || matrix.numel() == 0;
}

// The matrix itself, or a copy where its rows have gaps.
inline torch::stable::Tensor with_dense_rows(const torch::stable::Tensor& matrix) {
  return has_dense_rows(matrix) ? matrix : torch::stable::contiguous(matrix);
}

inline std::vector<int64_t> sizes_of(const torch::stable::Tensor& tensor) {
  std::vector<int64_t> sizes(static_cast<size_t>(tensor.dim()));
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes[static_cast<size_t>(d)] = tensor.size(d);
  return sizes;
}

inline FloatType float_type(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? FloatType::kFloat
      : type == ScalarType::Half   ? FloatType::kHalf
                                   : FloatType::kBFloat16;
}

}  // namespace losa
