// What a masked-LoRA linear does on the CPU beside the vendor's products: compose a panel of W_eff, and project a panel
// of G = dY^T x onto A and B. Rows in parallel.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/masked_lora/kernels.h"
#include "cpu/masked_lora/tensors.h"

namespace losa::masked_lora {
namespace {

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
  const auto compose = kernels().compose;

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
  STD_TORCH_CHECK(
      gradient.dim() == 2 && gradient.size(0) == rows && gradient.size(1) == columns && has_dense_rows(gradient),
      "gradient: expected (", rows, ", ", columns, ") with dense rows");
  check_factors(lora_A, lora_B, rows, columns);
  const int64_t rank = lora_A.size(0);
  check_gradients(dA, dB, rows, columns, rank);
  const Source source(weight, mask);
  const Tensor A = with_dense_rows(lora_A), B = torch::stable::contiguous(lora_B);
  const FloatType gradient_type = float_type(gradient, "gradient");
  const auto project = kernels().project;

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

}  // namespace
}  // namespace losa::masked_lora

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("compose_masked_lora", TORCH_BOX(&losa::masked_lora::compose_masked_lora));
  library.impl("project_masked_lora", TORCH_BOX(&losa::masked_lora::project_masked_lora));
}
