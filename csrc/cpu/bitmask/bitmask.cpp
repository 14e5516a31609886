// pack_mask and unpack_mask on the CPU: rows in parallel; and how much masks keep.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/bits.h"
#include "common/tensor_checks.h"
#include "cpu/bitmask/kernels.h"
#include "cpu/count_bits.h"
#include "cpu/parallel_rows.h"

namespace losa::bitmask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor pack_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 2 && mask.scalar_type() == ScalarType::Bool, "mask: expected a bool tensor (out, in)");
  const Tensor source = with_dense_rows(mask);
  const int64_t rows = mask.size(0), columns = mask.size(1), stride = source.stride(0), width = packed_width(columns);
  Tensor packed = torch::stable::new_empty(source, {rows, width}, ScalarType::Byte);

  const auto pack_row = kernels().pack_row;
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  for_each_row(rows, columns, [&](int64_t row) { pack_row(from + row * stride, columns, to + row * width); });
  return packed;
}

Tensor unpack_mask(const Tensor& packed, int64_t in_features) {
  STD_TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == ScalarType::Byte,
                  "packed: expected a uint8 tensor (out, ceil(in / 8))");
  STD_TORCH_CHECK(in_features >= 0 && packed.size(1) == packed_width(in_features), "in_features: ", in_features,
                  " columns do not fit packed rows of ", packed.size(1), " bytes");
  const Tensor source = with_dense_rows(packed);
  const int64_t rows = packed.size(0), stride = source.stride(0);
  Tensor mask = torch::stable::new_empty(source, {rows, in_features}, ScalarType::Bool);

  const auto unpack_row = kernels().unpack_row;
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(mask.mutable_data_ptr());
  for_each_row(rows, in_features,
               [&](int64_t row) { unpack_row(from + row * stride, in_features, to + row * in_features); });
  return mask;
}

// Rows of a mask that tell how much it keeps.
constexpr int64_t kCountedRows = 64;

double kept_share(std::vector<Tensor> masks, int64_t in_features) {
  int64_t kept = 0, counted = 0;
  for (const Tensor& mask : masks) {
    const int64_t rows = mask.dim() == 2 ? mask.size(0) : 0;
    // Odd, so that it meets every place in a head, whose size is even.
    const int64_t step = (rows + kCountedRows - 1) / kCountedRows | 1;
    check_mask(mask, rows, in_features, "masks");
    const Tensor source = with_dense_rows(mask);
    const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
    for (int64_t row = 0; row < rows; row += step) {
      kept += count_bits(from + row * source.stride(0), 0, in_features);
      counted += in_features;
    }
  }
  return counted == 0 ? 0.0 : static_cast<double>(kept) / static_cast<double>(counted);
}

}  // namespace
}  // namespace losa::bitmask

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("pack_mask", TORCH_BOX(&losa::bitmask::pack_mask));
  library.impl("unpack_mask", TORCH_BOX(&losa::bitmask::unpack_mask));
  library.impl("kept_share", TORCH_BOX(&losa::bitmask::kept_share));
}
