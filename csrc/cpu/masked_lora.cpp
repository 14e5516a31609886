// What a masked-LoRA linear does on the CPU beside the vendor's products: compose a panel of W_eff, and project a panel
// of G = dY^T x onto A and B. Rows in parallel.
#include "cpu/masked_lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "common/cpu_isa.h"
#include "common/tensor_checks.h"
#include "cpu/scratch.h"

namespace losa::masked_lora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements below which a second thread costs more than it saves.
constexpr int64_t kElementsPerTask = 1 << 14;
// Rows that share a partial dA, and how many partials there are at most: set by the shape alone, so that the number of
// threads does not change a bit of the result.
constexpr int64_t kSegmentRows = 64, kMaxSegments = 16;

FloatType float_type(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? FloatType::kFloat
      : type == ScalarType::Half   ? FloatType::kHalf
                                   : FloatType::kBFloat16;
}

bool has_dense_rows(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1;
}

Tensor with_dense_rows(const Tensor& matrix) {
  return has_dense_rows(matrix) ? matrix : torch::stable::contiguous(matrix);
}

void check_factors(const Tensor& lora_A, const Tensor& lora_B, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_A.scalar_type() == ScalarType::Float && lora_A.size(1) == columns,
                  "lora_A: expected float32 (r, ", columns, ")");
  STD_TORCH_CHECK(lora_B.dim() == 2 && lora_B.scalar_type() == ScalarType::Float && lora_B.size(0) == rows &&
                      lora_B.size(1) == lora_A.size(0),
                  "lora_B: expected float32 (", rows, ", ", lora_A.size(0), ")");
}

void check_gradients(const std::optional<Tensor>& dA, const std::optional<Tensor>& dB, int64_t rows, int64_t columns,
                     int64_t rank) {
  STD_TORCH_CHECK(!dA || (dA->dim() == 2 && dA->scalar_type() == ScalarType::Float && dA->size(0) == rank &&
                          dA->size(1) == columns && has_dense_rows(*dA)),
                  "dA: expected float32 (", rank, ", ", columns, ") with dense rows");
  STD_TORCH_CHECK(!dB || (is_dense_float(*dB) && dB->dim() == 2 && dB->size(0) == rows && dB->size(1) == rank),
                  "dB: expected contiguous float32 (", rows, ", ", rank, ")");
}

// The inputs that say which entries of a panel are kept, in memory with dense rows.
struct Source {
  Tensor weight;
  std::optional<Tensor> mask;

  Source(const Tensor& weight_in, const std::optional<Tensor>& mask_in) : weight(with_dense_rows(weight_in)) {
    if (!mask_in) return;
    STD_TORCH_CHECK(is_packed_mask(*mask_in, weight.size(0), weight.size(1)),
                    "mask: expected a uint8 tensor (out, ceil(in / 8)) for a weight (", weight.size(0), ", ",
                    weight.size(1), ")");
    mask = with_dense_rows(*mask_in);
  }

  Kept rows_from(int64_t row) const {
    const FloatType type = float_type(weight, "weight");
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

// body(first row, last row, its partial dA of zeros, or null) for segments of rows in parallel; then dA += the partials,
// in order.
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
  if (!dA) return;
  auto* to = static_cast<float*>(dA->mutable_data_ptr());
  for (int64_t k = 0; k < rank; ++k, to += dA->stride(0)) {
    for (int64_t segment = 0; segment < segments; ++segment) {
      const float* from = partials.get() + segment * size + k * padded(columns);
      for (int64_t j = 0; j < columns; ++j) to[j] += from[j];
    }
  }
}

void compose_masked_lora(const Tensor& weight, const std::optional<Tensor>& mask, bool base,
                         const std::optional<Tensor>& lora_A, const std::optional<Tensor>& lora_B, const Tensor& out) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected (out, in)");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == rows && out.size(1) == columns && has_dense_rows(out),
                  "out: expected (", rows, ", ", columns, ") with dense rows");
  STD_TORCH_CHECK(lora_A.has_value() == lora_B.has_value(), "lora_A and lora_B: expected both or neither");
  const Source source(weight, mask);
  std::optional<Tensor> A, B;
  if (lora_A) {
    check_factors(*lora_A, *lora_B, rows, columns);
    A = with_dense_rows(*lora_A);
    B = torch::stable::contiguous(*lora_B);
  }
  const FloatType out_type = float_type(out, "out");
  const int64_t rank = A ? A->size(0) : 0;
  const CpuIsa isa = selected_isa();
  const auto compose = isa == CpuIsa::kAvx512 ? compose_avx512 : isa == CpuIsa::kAvx2 ? compose_avx2 : compose_scalar;

  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch(compose_scratch(rank));
    compose({.kept = source.rows_from(begin),
             .base = base,
             .lora_A = A ? static_cast<const float*>(A->const_data_ptr()) : nullptr,
             .lora_B = B ? static_cast<const float*>(B->const_data_ptr()) + begin * rank : nullptr,
             .lora_A_stride = A ? A->stride(0) : 0,
             .rank = rank,
             .out = static_cast<char*>(out.mutable_data_ptr()) + begin * out.stride(0) * float_type_size(out_type),
             .out_stride = out.stride(0),
             .out_type = out_type,
             .rows = end - begin,
             .columns = columns,
             .scratch = scratch.get()});
  });
}

void project_masked_lora(const Tensor& gradient, const Tensor& weight, const std::optional<Tensor>& mask,
                         const Tensor& lora_A, const Tensor& lora_B, const std::optional<Tensor>& dA,
                         const std::optional<Tensor>& dB) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected (out, in)");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == rows && gradient.size(1) == columns &&
                      has_dense_rows(gradient),
                  "gradient: expected (", rows, ", ", columns, ") with dense rows");
  check_factors(lora_A, lora_B, rows, columns);
  const int64_t rank = lora_A.size(0);
  check_gradients(dA, dB, rows, columns, rank);
  const Source source(weight, mask);
  const Tensor A = with_dense_rows(lora_A), B = torch::stable::contiguous(lora_B);
  const FloatType gradient_type = float_type(gradient, "gradient");
  const CpuIsa isa = selected_isa();
  const auto project = isa == CpuIsa::kAvx512 ? project_avx512 : isa == CpuIsa::kAvx2 ? project_avx2 : project_scalar;

  in_segments(rows, columns, rank, dA, [&](int64_t begin, int64_t end, float* partial) {
    const Scratch<float> scratch(project_scratch(rank));
    project({.kept = source.rows_from(begin),
             .gradient = static_cast<const char*>(gradient.const_data_ptr()) +
                 begin * gradient.stride(0) * float_type_size(gradient_type),
             .gradient_stride = gradient.stride(0),
             .gradient_type = gradient_type,
             .lora_A = static_cast<const float*>(A.const_data_ptr()),
             .lora_B = static_cast<const float*>(B.const_data_ptr()) + begin * rank,
             .lora_A_stride = A.stride(0),
             .rank = rank,
             .dA = partial,
             .dB = dB ? static_cast<float*>(dB->mutable_data_ptr()) + begin * rank : nullptr,
             .rows = end - begin,
             .columns = columns,
             .scratch = scratch.get()});
  });
}

void sample_masked_lora(const Tensor& dy, const Tensor& x, const Tensor& mask, const Tensor& lora_A,
                        const Tensor& lora_B, const std::optional<Tensor>& dA, const std::optional<Tensor>& dB,
                        const Tensor& scratch) {
  for (const auto& [tensor, name] : {std::pair{&dy, "dy"}, std::pair{&x, "x"}}) {
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->scalar_type() == ScalarType::Float && has_dense_rows(*tensor), name,
                    ": expected float32 (tokens, features) with dense rows");
  }
  const int64_t tokens = x.size(0), rows = dy.size(1), columns = x.size(1), rank = lora_A.size(0);
  STD_TORCH_CHECK(dy.size(0) == tokens, "dy: expected ", tokens, " tokens, got ", dy.size(0));
  STD_TORCH_CHECK(is_packed_mask(mask, rows, columns), "mask: expected a uint8 tensor (", rows, ", ",
                  packed_width(columns), ")");
  check_factors(lora_A, lora_B, rows, columns);
  check_gradients(dA, dB, rows, columns, rank);
  const int64_t padded_tokens = (tokens + kTokens - 1) / kTokens * kTokens;
  STD_TORCH_CHECK(is_dense_float(scratch) && scratch.numel() >= (rows + columns) * padded_tokens,
                  "scratch: expected at least ", (rows + columns) * padded_tokens, " contiguous float32");
  const Tensor bits = with_dense_rows(mask), A = with_dense_rows(lora_A), B = torch::stable::contiguous(lora_B);
  const CpuIsa isa = selected_isa();
  const auto sample = isa == CpuIsa::kAvx512 ? sample_avx512 : isa == CpuIsa::kAvx2 ? sample_avx2 : sample_scalar;
  const auto split = isa == CpuIsa::kAvx512 ? split_avx512 : isa == CpuIsa::kAvx2 ? split_avx2 : split_scalar;

  auto* dy_passes = static_cast<float*>(scratch.mutable_data_ptr());
  float* x_passes = dy_passes + rows * padded_tokens;
  const auto split_features = [&](const Tensor& from, float* to) {
    torch::stable::parallel_for(0, from.size(1), grain(tokens), [&](int64_t begin, int64_t end) {
      split({.from = static_cast<const float*>(from.const_data_ptr()),
             .stride = from.stride(0),
             .tokens = tokens,
             .features = from.size(1),
             .begin = begin,
             .end = end,
             .to = to});
    });
  };
  split_features(dy, dy_passes);
  split_features(x, x_passes);
  in_segments(rows, columns, rank, dA, [&](int64_t begin, int64_t end, float* partial) {
    const Scratch<float> own(sample_scratch(rank));
    sample({.bits = static_cast<const uint8_t*>(bits.const_data_ptr()) + begin * bits.stride(0),
            .bits_stride = bits.stride(0),
            .dy = {dy_passes, rows, begin},
            .x = {x_passes, columns, 0},
            .tokens = padded_tokens,
            .lora_A = static_cast<const float*>(A.const_data_ptr()),
            .lora_B = static_cast<const float*>(B.const_data_ptr()) + begin * rank,
            .lora_A_stride = A.stride(0),
            .rank = rank,
            .dA = partial,
            .dB = dB ? static_cast<float*>(dB->mutable_data_ptr()) + begin * rank : nullptr,
            .rows = end - begin,
            .columns = columns,
            .scratch = own.get()});
  });
}

}  // namespace
}  // namespace losa::masked_lora

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("compose_masked_lora", TORCH_BOX(&losa::masked_lora::compose_masked_lora));
  library.impl("project_masked_lora", TORCH_BOX(&losa::masked_lora::project_masked_lora));
  library.impl("sample_masked_lora", TORCH_BOX(&losa::masked_lora::sample_masked_lora));
}
