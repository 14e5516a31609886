// What the packing operators ask of their tensors on every device.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <optional>

#include "common/tensor_checks.h"

namespace losa::packing {

inline void check_pack(const torch::stable::Tensor& weight, const torch::stable::Tensor& mask) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected (out, in)");
  check_mask(mask, weight.size(0), weight.size(1), "mask");
}

inline void check_pattern(int64_t in_features, int64_t keep_n, int64_t m) {
  STD_TORCH_CHECK(0 < keep_n && keep_n <= m && in_features % m == 0, "m: expected a divisor of in_features ",
                  in_features, " and 0 < keep_n <= m, got ", keep_n, " of ", m);
}

inline void check_groups(const torch::stable::Tensor& mask, int64_t in_features, int64_t m) {
  STD_TORCH_CHECK(mask.dim() == 2, "mask: expected a uint8 tensor (out, ceil(in / 8))");
  check_mask(mask, mask.size(0), in_features, "mask");
  STD_TORCH_CHECK(m > 0 && in_features % m == 0, "m: expected a divisor of in_features ", in_features, ", got ", m);
}

// What every operator that reads packed rows asks of their values and offsets.
inline void check_values(const torch::stable::Tensor& values, const std::optional<torch::stable::Tensor>& row_offsets,
                         int64_t rows) {
  const int64_t total = values.numel();
  STD_TORCH_CHECK(!row_offsets.has_value() ||
                      (row_offsets->dim() == 1 && row_offsets->size(0) == rows && row_offsets->is_contiguous() &&
                       row_offsets->scalar_type() == torch::headeronly::ScalarType::Long),
                  "row_offsets: expected int64 (", rows, ",), contiguous");
  STD_TORCH_CHECK(row_offsets.has_value() || total == 0 || (rows > 0 && total % rows == 0),
                  "values: expected rows of equal length, got ", total, " values for ", rows, " rows");
}

inline void check_unpack(const torch::stable::Tensor& dense, const torch::stable::Tensor& values,
                         const torch::stable::Tensor& bitmask,
                         const std::optional<torch::stable::Tensor>& row_offsets) {
  STD_TORCH_CHECK(dense.dim() == 2 && dense.is_contiguous(), "dense: expected a contiguous tensor (out, in)");
  check_mask(bitmask, dense.size(0), dense.size(1), "bitmask");
  STD_TORCH_CHECK(values.scalar_type() == dense.scalar_type() && values.is_contiguous(),
                  "values: expected a contiguous tensor of the dtype of dense");
  check_values(values, row_offsets, dense.size(0));
}

inline void check_sparse_linear(const torch::stable::Tensor& x, const torch::stable::Tensor& values,
                                const torch::stable::Tensor& bitmask,
                                const std::optional<torch::stable::Tensor>& row_offsets,
                                const std::optional<torch::stable::Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected (..., in)");
  STD_TORCH_CHECK(
      bitmask.dim() == 2 && bitmask.scalar_type() == torch::headeronly::ScalarType::Byte && bitmask.is_contiguous(),
      "bitmask: expected a contiguous uint8 tensor (out, ceil(in / 8))");
  STD_TORCH_CHECK(values.is_contiguous(), "values: expected a contiguous tensor");
  const int64_t out = bitmask.size(0), columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(bitmask.size(1) == packed_width(columns), "x: ", columns, " columns do not fit packed rows of ",
                  bitmask.size(1), " bytes");
  check_values(values, row_offsets, out);
  STD_TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == out && bias->is_contiguous()),
                  "bias: expected a contiguous tensor (", out, ",)");
}

inline void check_per_byte(const torch::stable::Tensor& x, const torch::stable::Tensor& values,
                           const torch::stable::Tensor& bitmask, int64_t per_byte) {
  const int64_t columns = x.dim() > 0 ? x.size(x.dim() - 1) : 0, rows = bitmask.dim() > 0 ? bitmask.size(0) : 0;
  STD_TORCH_CHECK(
      columns % 8 == 0 && 0 < per_byte && per_byte <= 8 && values.numel() == rows * (columns / 8) * per_byte,
      "per_byte: expected the number of values of every 8 columns, got ", per_byte);
}

}  // namespace losa::packing
