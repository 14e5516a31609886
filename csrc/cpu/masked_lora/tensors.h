// What panels.cpp and products.cpp ask of their tensors, and how they share out their rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "common/tensor_checks.h"
#include "cpu/masked_lora/kernels.h"
#include "cpu/scratch.h"

namespace losa::masked_lora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The Python function's limit; a chunk of columns has at least as many.
constexpr int64_t kMaxRank = 128;
// Elements below which a second thread costs more than it saves.
constexpr int64_t kElementsPerTask = 1 << 14;
// Rows that share a partial dA, and how many partials there are at most. Only the shape sets them, so that the number
// of threads does not change a bit of the result.
constexpr int64_t kSegmentRows = 64, kMaxSegments = 16;

void check_factors(const Tensor& lora_A, const Tensor& lora_B, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.scalar_type() == ScalarType::Float && lora_A.size(0) <= kMaxRank &&
                      lora_A.size(1) == columns,
                  "lora_A: expected float32 (r, ", columns, ") with r <= ", kMaxRank);
  STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.scalar_type() == ScalarType::Float && lora_B.size(0) == rows &&
                      lora_B.size(1) == lora_A.size(0),
                  "lora_B: expected float32 (", rows, ", ", lora_A.size(0), ")");
}

void check_gradients(const std::optional<Tensor>& dA, const std::optional<Tensor>& dB, int64_t rows, int64_t columns,
                     int64_t rank) {
  STD_TORCH_CHECK(!dA ||
                      (dA->dim() == 2 && dA->scalar_type() == ScalarType::Float && dA->size(0) == rank &&
                       dA->size(1) == columns && has_dense_rows(*dA)),
                  "dA: expected float32 (", rank, ", ", columns, ") with dense rows");
  STD_TORCH_CHECK(!dB || (is_dense_float(*dB) && dB->dim() == 2 && dB->size(0) == rows && dB->size(1) == rank),
                  "dB: expected contiguous float32 (", rows, ", ", rank, ")");
}

// The inputs that say which entries of a panel are kept, in memory with dense rows.
struct Source {
  Tensor weight;
  FloatType type;
  std::optional<Tensor> mask;

  Source(const Tensor& weight_in, const std::optional<Tensor>& mask_in)
      : weight(with_dense_rows(weight_in)), type(float_type(weight_in, "weight")) {
    if (!mask_in) return;
    check_mask(*mask_in, weight.size(0), weight.size(1), "mask");
    mask = with_dense_rows(*mask_in);
  }

  Kept rows_from(int64_t row) const {
    const auto* elements = static_cast<const char*>(weight.const_data_ptr());
    return {.bits = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) + row * mask->stride(0) : nullptr,
            .bits_stride = mask ? mask->stride(0) : 0,
            .weight = elements + row * weight.stride(0) * float_type_size(type),
            .weight_stride = weight.stride(0),
            .weight_type = type};
  }
};

int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, columns));
}

// dA += the partials, in order: each is (r, padded columns), and they lie `size` apart.
void add_partials(const float* partials, int64_t count, int64_t size, const Tensor& dA) {
  const int64_t columns = dA.size(1);
  auto* to = static_cast<float*>(dA.mutable_data_ptr());
  for (int64_t k = 0; k < dA.size(0); ++k, to += dA.stride(0)) {
    for (int64_t part = 0; part < count; ++part) {
      const float* from = partials + part * size + k * padded(columns);
      for (int64_t j = 0; j < columns; ++j) to[j] += from[j];
    }
  }
}

// body(first row, last row, its partial dA of zeros, or null) for segments of rows in parallel; then dA += the
// partials, in order.
template <class Body>
void in_segments(int64_t rows, int64_t columns, int64_t rank, const std::optional<Tensor>& dA, const Body& body) {
  const int64_t segments = std::clamp<int64_t>(rows / kSegmentRows, 1, kMaxSegments), size = rank * padded(columns);
  const Scratch<float> partials(dA ? segments * size : 0);
  torch::stable::parallel_for(0, segments, std::max<int64_t>(1, segments * grain(columns) / std::max<int64_t>(1, rows)),
                              [&](int64_t first, int64_t last) {
                                for (int64_t segment = first; segment < last; ++segment) {
                                  float* partial = dA ? partials.get() + segment * size : nullptr;
                                  if (dA) std::fill_n(partial, size, 0.0f);
                                  body(rows * segment / segments, rows * (segment + 1) / segments, partial);
                                }
                              });
  if (dA) add_partials(partials.get(), segments, size, *dA);
}

}  // namespace
}  // namespace losa::masked_lora
