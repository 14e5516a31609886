// Questions that many operators ask of a tensor.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/bits.h"

namespace losa {

inline bool is_packed_mask(const torch::stable::Tensor& mask, int64_t rows, int64_t columns) {
  return mask.scalar_type() == torch::headeronly::ScalarType::Byte && mask.dim() == 2 && mask.size(0) == rows &&
      mask.size(1) == packed_width(columns);
}

inline bool is_dense_float(const torch::stable::Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.is_contiguous();
}

}  // namespace losa
