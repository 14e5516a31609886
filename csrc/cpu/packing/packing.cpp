// pack_bitmask, pack_nm, largest_group and unpack_bitmask on the CPU: rows in parallel, each with its own place in
// `values`.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "common/bits.h"
#include "common/packing_checks.h"
#include "cpu/count_bits.h"
#include "cpu/packing/kernels.h"
#include "cpu/parallel_rows.h"

namespace losa::packing {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

PackRow pack_row_of(size_t element_size) {
  switch (element_size) {
    case 1: return kernels().pack_row8;
    case 2: return kernels().pack_row16;
    case 4: return kernels().pack_row32;
    default:
      STD_TORCH_CHECK(element_size == 8, "weight: expected elements of 1, 2, 4 or 8 bytes, got ", element_size);
      return kernels().pack_row64;
  }
}

UnpackRow unpack_row_of(size_t element_size) {
  switch (element_size) {
    case 1: return kernels().unpack_row8;
    case 2: return kernels().unpack_row16;
    case 4: return kernels().unpack_row32;
    default:
      STD_TORCH_CHECK(element_size == 8, "values: expected elements of 1, 2, 4 or 8 bytes, got ", element_size);
      return kernels().unpack_row64;
  }
}

bool bit_at(const uint8_t* mask, int64_t column) {
  return mask[column / 8] >> (column % 8) & 1;
}

int64_t count_group(const uint8_t* mask, int64_t begin, int64_t m) {
  int64_t count = 0;
  for (int64_t column = begin; column < begin + m; ++column) count += bit_at(mask, column);
  return count;
}

// What a packing function reads: rows of the weight and rows of its mask. Both may be strided.
struct Source {
  Tensor weight, mask;
  int64_t rows, columns, element_size;

  Source(const Tensor& weight_in, const Tensor& mask_in)
      : weight(with_dense_rows(weight_in)),
        mask(with_dense_rows(mask_in)),
        rows(weight_in.size(0)),
        columns(weight_in.size(1)),
        element_size(static_cast<int64_t>(weight_in.element_size())) {}

  const uint8_t* weight_row(int64_t row) const {
    return static_cast<const uint8_t*>(weight.const_data_ptr()) + row * weight.stride(0) * element_size;
  }
  const uint8_t* mask_row(int64_t row) const {
    return static_cast<const uint8_t*>(mask.const_data_ptr()) + row * mask.stride(0);
  }
};

std::tuple<Tensor, Tensor> pack_bitmask(const Tensor& weight, const Tensor& mask) {
  check_pack(weight, mask);
  const Source source(weight, mask);
  const PackRow pack_row = pack_row_of(weight.element_size());
  Tensor row_offsets = torch::stable::new_empty(weight, {source.rows}, ScalarType::Long);
  auto* offsets = static_cast<int64_t*>(row_offsets.mutable_data_ptr());

  for_each_row(source.rows, std::max<int64_t>(1, source.columns),
               [&](int64_t row) { offsets[row] = count_bits(source.mask_row(row), 0, source.columns); });
  int64_t total = 0;
  for (int64_t row = 0; row < source.rows; ++row) {
    const int64_t count = offsets[row];
    offsets[row] = total;
    total += count;
  }

  Tensor values = torch::stable::new_empty(weight, {total});
  auto* to = static_cast<uint8_t*>(values.mutable_data_ptr());
  for_each_row(source.rows, source.columns, [&](int64_t row) {
    const int64_t end = row + 1 < source.rows ? offsets[row + 1] : total;
    pack_row(source.weight_row(row), source.mask_row(row), source.columns, to + offsets[row] * source.element_size,
             end - offsets[row]);
  });
  return {values, row_offsets};
}

// For every byte of a mask, whether a group of m in it keeps fewer than keep_n. Empty if m does not divide 8.
std::vector<uint8_t> short_groups(int64_t keep_n, int64_t m) {
  if (m > 8 || 8 % m != 0) return {};
  std::vector<uint8_t> is_short(256);
  for (int bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<uint8_t>(bits);
    for (int64_t begin = 0; begin < 8; begin += m) is_short[bits] |= count_group(&byte, begin, m) < keep_n;
  }
  return is_short;
}

// Adds the first pruned columns of the group at `begin` until it stores keep_n. True if there were any to add.
bool fill_group(uint8_t* stored, int64_t begin, int64_t keep_n, int64_t m) {
  const int64_t missing = keep_n - count_group(stored, begin, m);
  int64_t left = missing;
  for (int64_t column = begin; left > 0 && column < begin + m; ++column) {
    if (bit_at(stored, column)) continue;
    stored[column / 8] |= static_cast<uint8_t>(1 << (column % 8));
    --left;
  }
  return missing > 0;
}

std::tuple<Tensor, Tensor> pack_nm(const Tensor& weight, const Tensor& mask, int64_t keep_n, int64_t m) {
  check_pack(weight, mask);
  check_pattern(weight.size(1), keep_n, m);
  const Source source(weight, mask);
  const PackRow pack_row = pack_row_of(weight.element_size());
  const int64_t width = packed_width(source.columns), length = source.columns / m * keep_n;
  const std::vector<uint8_t> short_byte = short_groups(keep_n, m);
  Tensor stored = torch::stable::new_empty(weight, {source.rows, width}, ScalarType::Byte);
  Tensor values = torch::stable::new_empty(weight, {source.rows, length});
  auto* const stored_data = static_cast<uint8_t*>(stored.mutable_data_ptr());
  auto* const to = static_cast<uint8_t*>(values.mutable_data_ptr());
  std::atomic<bool> too_many = false;

  for_each_row(source.rows, source.columns, [&](int64_t row) {
    const uint8_t* const kept = source.mask_row(row);
    uint8_t* const bits = stored_data + row * width;
    uint8_t* const row_values = to + row * length * source.element_size;
    std::copy_n(kept, width, bits);
    if (width > 0) bits[width - 1] &= column_bits(source.columns - 8 * (width - 1));

    bool filled = false;
    for (int64_t begin = 0; begin < source.columns; begin += short_byte.empty() ? m : 8) {
      if (short_byte.empty()) {
        filled |= fill_group(bits, begin, keep_n, m);
      } else if (short_byte[bits[begin / 8]]) {
        const int64_t end = std::min(begin + 8, source.columns);
        for (int64_t group = begin; group < end; group += m) filled |= fill_group(bits, group, keep_n, m);
      }
    }
    if (count_bits(bits, 0, source.columns) != length) {
      too_many.store(true, std::memory_order_relaxed);
      return;
    }
    pack_row(source.weight_row(row), bits, source.columns, row_values, length);
    if (!filled) return;
    int64_t place = 0;
    for (int64_t column = 0; column < source.columns; ++column) {
      if (!bit_at(bits, column)) continue;
      if (!bit_at(kept, column)) std::memset(row_values + place * source.element_size, 0, source.element_size);
      ++place;
    }
  });
  STD_TORCH_CHECK(!too_many.load(), "mask: expected at most ", keep_n, " kept of every ", m);
  return {values, stored};
}

Tensor largest_group(const Tensor& mask, int64_t in_features, int64_t m) {
  check_groups(mask, in_features, m);
  const Tensor source = with_dense_rows(mask);
  std::vector<uint8_t> of_byte;
  if (m <= 8 && 8 % m == 0) {
    of_byte.resize(256);
    for (int bits = 0; bits < 256; ++bits) {
      const auto byte = static_cast<uint8_t>(bits);
      for (int64_t begin = 0; begin < 8; begin += m) {
        of_byte[bits] = std::max(of_byte[bits], static_cast<uint8_t>(count_group(&byte, begin, m)));
      }
    }
  }
  std::atomic<int64_t> largest = 0;
  for_each_row(mask.size(0), in_features, [&](int64_t row) {
    const auto* bits = static_cast<const uint8_t*>(source.const_data_ptr()) + row * source.stride(0);
    int64_t most = 0;
    if (of_byte.empty()) {
      for (int64_t begin = 0; begin < in_features; begin += m) most = std::max(most, count_group(bits, begin, m));
    } else {
      for (int64_t left = in_features; left > 0; left -= 8, ++bits) {
        most = std::max<int64_t>(most, of_byte[*bits & column_bits(left)]);
      }
    }
    int64_t before = largest.load(std::memory_order_relaxed);
    while (before < most && !largest.compare_exchange_weak(before, most, std::memory_order_relaxed)) {
    }
  });
  Tensor result = torch::stable::new_empty(mask, {}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = largest.load();
  return result;
}

void unpack_bitmask(const Tensor& dense, const Tensor& values, const Tensor& bitmask,
                    const std::optional<Tensor>& row_offsets) {
  check_unpack(dense, values, bitmask, row_offsets);
  const int64_t rows = dense.size(0), columns = dense.size(1), total = values.numel();
  const Tensor mask = with_dense_rows(bitmask);
  const auto size = static_cast<int64_t>(dense.element_size());
  const UnpackRow unpack_row = unpack_row_of(dense.element_size());
  const auto* offsets = row_offsets.has_value() ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr;
  const int64_t length = rows > 0 ? total / rows : 0;
  const auto* from = static_cast<const uint8_t*>(values.const_data_ptr());
  const auto* bits = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* to = static_cast<uint8_t*>(dense.mutable_data_ptr());
  for_each_row(rows, columns, [&](int64_t row) {
    // Offsets from a damaged file must not lead out of the buffer.
    const int64_t first = std::clamp<int64_t>(offsets != nullptr ? offsets[row] : row * length, 0, total);
    unpack_row(from + first * size, total - first, bits + row * mask.stride(0), columns, to + row * columns * size);
  });
}

}  // namespace
}  // namespace losa::packing

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("pack_bitmask", TORCH_BOX(&losa::packing::pack_bitmask));
  library.impl("pack_nm", TORCH_BOX(&losa::packing::pack_nm));
  library.impl("largest_group", TORCH_BOX(&losa::packing::largest_group));
  library.impl("unpack_bitmask", TORCH_BOX(&losa::packing::unpack_bitmask));
}
