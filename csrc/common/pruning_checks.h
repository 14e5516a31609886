// What the pruning operators ask of their tensors on every device; a device adds its own limits.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <optional>

#include "common/tensor_checks.h"

namespace losa::pruning {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_wanda_select(const Tensor& weight, const Tensor& input_norms, int64_t count, int64_t m,
                               const std::optional<Tensor>& mask) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(
      weight.dim() == 2 && (dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16),
      "weight: expected a float, half or bfloat16 tensor (out, in)");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK(
      input_norms.dim() == 1 && input_norms.size(0) == columns && input_norms.scalar_type() == ScalarType::Float,
      "input_norms: expected a float tensor (", columns, ",)");
  STD_TORCH_CHECK(m >= 0 && (m == 0 || columns % m == 0), "m: expected 0 or a divisor of ", columns, ", got ", m);
  STD_TORCH_CHECK(0 <= count && count <= (m == 0 ? columns : m), "count: got ", count);
  STD_TORCH_CHECK(!mask || is_packed_mask(*mask, rows, columns), "mask: expected a uint8 tensor (", rows, ", ",
                  packed_width(columns), ")");
}

inline void check_pruned_per_block(const Tensor& mask, int64_t in_features, int64_t block_size) {
  STD_TORCH_CHECK(in_features >= 0 && mask.dim() == 2 && is_packed_mask(mask, mask.size(0), in_features),
                  "mask: expected a uint8 tensor (out, ceil(in / 8))");
  STD_TORCH_CHECK(0 < block_size && block_size <= int64_t{1} << 40, "block_size: expected 1 to 2^40, got ", block_size);
}

// Columns [start, end) of a weight, with the factor of all columns and a mask.
inline void check_column_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end,
                               const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(weight.dim() == 2 && is_dense_float(weight), "weight: expected a contiguous float tensor (out, in)");
  const int64_t columns = weight.size(1);
  STD_TORCH_CHECK(0 <= start && start < end && end <= columns, "start, end: got ", start, ", ", end);
  STD_TORCH_CHECK(factor.dim() == 2 && factor.size(0) == columns && factor.size(1) == columns &&
                      factor.scalar_type() == ScalarType::Float,
                  "factor: expected a float tensor (", columns, ", ", columns, ")");
  STD_TORCH_CHECK(!mask || (is_packed_mask(*mask, weight.size(0), columns) && mask->is_contiguous()),
                  "mask: expected a contiguous packed uint8 tensor");
}

// state_ints: int32s that the device's state takes.
inline void check_state(const Tensor& state, int64_t state_ints) {
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Int && state.is_contiguous() && state.numel() >= state_ints,
                  "state: expected a contiguous int32 tensor of ", state_ints, " elements");
}

inline void check_select_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end,
                               const Tensor& counts, int64_t index, const std::optional<Tensor>& mask,
                               const Tensor& scratch, const Tensor& state, int64_t state_ints) {
  check_column_block(weight, factor, start, end, mask);
  const int64_t entries = weight.size(0) * (end - start);
  STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.dim() == 1 && counts.is_contiguous() &&
                      counts.get_device_index() == weight.get_device_index(),
                  "counts: expected a contiguous int64 tensor (blocks,) on the weight's device");
  STD_TORCH_CHECK(0 <= index && index < counts.size(0), "index: expected one of ", counts.size(0), " counts, got ",
                  index);
  STD_TORCH_CHECK(is_dense_float(scratch) && scratch.numel() >= entries,
                  "scratch: expected a contiguous float tensor of ", entries, " elements");
  check_state(state, state_ints);
}

inline void check_factor_panel(const Tensor& matrix, int64_t start, int64_t end, const Tensor& inverse,
                               const Tensor& failed) {
  constexpr int64_t kMost = 128;
  STD_TORCH_CHECK(matrix.dim() == 2 && is_dense_float(matrix) && matrix.size(0) == matrix.size(1),
                  "matrix: expected a contiguous float tensor (n, n)");
  STD_TORCH_CHECK(0 <= start && start < end && end <= matrix.size(0) && end - start <= kMost,
                  "start, end: expected up to ", kMost, " of ", matrix.size(0), " columns, got ", start, ", ", end);
  STD_TORCH_CHECK(is_dense_float(inverse) && inverse.dim() == 2 && inverse.size(0) == end - start &&
                      inverse.size(1) == end - start && inverse.get_device_index() == matrix.get_device_index(),
                  "inverse: expected a contiguous float tensor (", end - start, ", ", end - start,
                  ") on the matrix's device");
  STD_TORCH_CHECK(failed.scalar_type() == ScalarType::Int && failed.numel() == 1 &&
                      failed.get_device_index() == matrix.get_device_index(),
                  "failed: expected an int32 tensor of one element on the matrix's device");
}

inline void check_sweep_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end, int64_t m,
                              int64_t prune, const std::optional<Tensor>& state, const std::optional<Tensor>& mask,
                              const Tensor& kept, const Tensor& errors, const Tensor& loss) {
  check_column_block(weight, factor, start, end, mask);
  const int64_t rows = weight.size(0), width = end - start;
  STD_TORCH_CHECK(m == 0 ? state.has_value() : m > 0 && width % m == 0 && 0 <= prune && prune <= m, "m, prune: got ", m,
                  ", ", prune);
  if (state) check_state(*state, 3);
  STD_TORCH_CHECK(is_packed_mask(kept, rows, weight.size(1)) && kept.is_contiguous(),
                  "kept: expected a contiguous packed uint8 tensor");
  STD_TORCH_CHECK(errors.scalar_type() == ScalarType::Float && errors.dim() == 2 && errors.size(0) == rows &&
                      (errors.size(1) == width || errors.size(1) == 3 * width) && has_dense_rows(errors),
                  "errors: expected a float tensor (", rows, ", ", width, ") or three times as wide, with dense rows");
  STD_TORCH_CHECK(is_dense_float(loss) && loss.dim() == 1 && loss.size(0) == rows, "loss: expected a float tensor (",
                  rows, ",)");
}

}  // namespace losa::pruning
