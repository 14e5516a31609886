// SparseGPT's sweep of one column block on the CPU: panels of 16 rows, independent of each other, in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>
#include <vector>

#include "common/bits.h"
#include "common/pruning_checks.h"
#include "cpu/pruning/kernels.h"
#include "cpu/scratch.h"

namespace losa::pruning {
namespace {

using torch::stable::Tensor;

constexpr int64_t kPanelRows = 16;
// Multiply-adds below which a second thread costs more than it saves.
constexpr int64_t kWorkPerTask = 1 << 19;

// To TF32's 10 bits after the point, halves away from zero.
float rounded_to_tf32(float value) {
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) + 0x1000u) & ~0x1fffu);
}

// Errors of one row -> their high part twice and their low part.
void split_errors(float* errors, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    const float high = rounded_to_tf32(errors[i]);
    errors[2 * width + i] = rounded_to_tf32(errors[i] - high);
    errors[i] = errors[width + i] = high;
  }
}

void sweep_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end, int64_t m, int64_t prune,
                 const std::optional<Tensor>& state, const std::optional<Tensor>& mask, const Tensor& kept,
                 const Tensor& errors, const Tensor& loss) {
  check_sweep_block(weight, factor, start, end, m, prune, state, mask, kept, errors, loss);
  const int64_t rows = weight.size(0), columns = weight.size(1), width = end - start;

  std::vector<float> upper(width * width);
  const auto* from = static_cast<const float*>(factor.const_data_ptr());
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = i; j < width; ++j) {
      upper[i * width + j] = from[(start + i) * factor.stride(0) + (start + j) * factor.stride(1)];
    }
  }
  const auto* bound = state ? static_cast<const int32_t*>(state->const_data_ptr()) : nullptr;
  const auto* mask_bits = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  auto* weights = static_cast<float*>(weight.mutable_data_ptr()) + start;
  auto* errors_out = static_cast<float*>(errors.mutable_data_ptr());
  auto* kept_bits = static_cast<uint8_t*>(kept.mutable_data_ptr());
  auto* losses = static_cast<float*>(loss.mutable_data_ptr());
  const int64_t stride = packed_width(columns), errors_stride = errors.stride(0);
  const bool split = errors.size(1) != width;
  const auto sweep = kernels().sweep_panel;

  const int64_t panels = (rows + kPanelRows - 1) / kPanelRows;
  const int64_t grain = std::max<int64_t>(1, kWorkPerTask / (kPanelRows * width * (width / 2 + 1)));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t first, int64_t last) {
    const Scratch<float> scratch(panel_scratch(width, m));
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t row = panel * kPanelRows, count = std::min(kPanelRows, rows - row);
      sweep({.weight = weights + row * columns,
             .weight_stride = columns,
             .errors = errors_out + row * errors_stride,
             .errors_stride = errors_stride,
             .kept = kept_bits + row * stride,
             .mask = mask_bits == nullptr ? nullptr : mask_bits + row * stride,
             .kept_stride = stride,
             .mask_stride = stride,
             .loss = losses + row,
             .upper = upper.data(),
             .first_column = start,
             .width = width,
             .rows = count,
             .m = m,
             .prune = prune,
             .key = bound == nullptr ? -1 : bound[0],
             .tied_columns = bound == nullptr ? 0 : bound[1],
             .tied_rows = bound == nullptr ? 0 : bound[2] - row,
             .scratch = scratch.get()});
      for (int64_t r = row; split && r < row + count; ++r) split_errors(errors_out + r * errors_stride, width);
    }
  });
}

// On rows [start, end) from the last to the first: each earlier row loses its multiple of the row, on the matrix and,
// in the columns that this leaves free, on an identity.
void factor_panel(const Tensor& matrix, int64_t start, int64_t end, const Tensor& inverse, const Tensor& failed) {
  check_factor_panel(matrix, start, end, inverse, failed);
  const int64_t stride = matrix.stride(0), width = end - start;
  float* const block = static_cast<float*>(matrix.mutable_data_ptr()) + start * (stride + 1);
  auto* out = static_cast<float*>(inverse.mutable_data_ptr());
  for (int64_t j = width - 1; j >= 0; --j) {
    const float* pivot_row = block + j * stride;
    const float pivot = pivot_row[j], scale = 1.0f / std::sqrt(pivot);
    if (!(pivot > 0.0f)) *static_cast<int32_t*>(failed.mutable_data_ptr()) = 1;
    for (int64_t i = 0; i < j; ++i) {
      float* row = block + i * stride;
      const float multiple = pivot_row[i] / pivot;
      for (int64_t c = 0; c < width; ++c) row[c] -= multiple * pivot_row[c];
      row[j] = -multiple;
    }
    for (int64_t c = 0; c < width; ++c) out[j * width + c] = c > j ? pivot_row[c] * scale : c == j ? scale : 0.0f;
  }
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t c = 0; c < width; ++c) block[i * stride + c] = c == i ? 1.0f : 0.0f;
  }
}

}  // namespace
}  // namespace losa::pruning

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("sweep_block", TORCH_BOX(&losa::pruning::sweep_block));
  library.impl("factor_panel", TORCH_BOX(&losa::pruning::factor_panel));
}
