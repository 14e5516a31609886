// Exact selection on the CPU: the k-th smallest score by bisection on the float's bits (a radix select of one bit a
// pass: counting keys up to a bound is one compare and one subtract per register). No sort, no index tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/bits.h"
#include "common/pruning_checks.h"
#include "cpu/bitmask/kernels.h"
#include "cpu/count_bits.h"
#include "cpu/scratch.h"
#include "cpu/selection/kernels.h"

namespace losa::selection {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many keys of work a second thread costs more than it saves.
constexpr int64_t kKeysPerTask = 1 << 15;
// Keys that are counted together, so that they stay in the first-level cache.
constexpr int64_t kKeysPerChunk = 1 << 13;
// Keys are gathered once one in kGatherShare can still be the bound; one pass of gathering costs about six of counting.
constexpr int64_t kGatherShare = 8;

KeyRange merged(const KeyRange& a, const KeyRange& b) {
  return {std::min(a.least, b.least), std::max(a.most, b.most), a.lost + b.lost};
}

// Selected are all keys below `key` and `room` of the `ties` equal to it.
struct Bound {
  int32_t key;
  int64_t room, ties;
};

// The bound of the k smallest of `total` keys. count(bound): how many keys are <= bound. narrowed(least, most, below,
// inside): `below` keys are < least, and later bounds lie in [least, most], as do `inside` keys.
template <class Count, class Narrowed>
Bound smallest(const KeyRange& range, int64_t total, int64_t k, const Count& count, const Narrowed& narrowed) {
  if (k <= range.lost) return {-1, k, range.lost};
  int32_t least = range.least, most = range.most;
  int64_t below = range.lost, up_to = total;
  if (k == up_to) return {most, 1, 1};
  while (least < most) {
    const int32_t middle = least + (most - least) / 2;
    const int64_t found = count(middle);
    if (found == k) return {middle, 1, 1};
    if (found > k) {
      most = middle;
      up_to = found;
    } else {
      least = middle + 1;
      below = found;
    }
    narrowed(least, most, below, up_to - below);
  }
  return {least, k - below, up_to - below};
}

Tensor wanda_select(const Tensor& weight, const Tensor& input_norms, int64_t count, int64_t m,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& faults) {
  pruning::check_wanda_select(weight, input_norms, count, m, mask);
  STD_TORCH_CHECK(!faults, "faults: expected none on a CPU");
  const FloatType type = float_type(weight, "weight");
  const int64_t rows = weight.size(0), columns = weight.size(1), width = packed_width(columns);
  const Tensor source = torch::stable::contiguous(weight), norms = torch::stable::contiguous(input_norms);
  std::optional<Tensor> before;
  if (mask) before = torch::stable::contiguous(*mask);
  Tensor packed = torch::stable::new_empty(source, {rows, width}, ScalarType::Byte);
  if (rows == 0 || columns == 0) return packed;

  const Kernels& run = kernels();
  const bitmask::Kernels& packed_rows = bitmask::kernels();
  const auto* weights = static_cast<const uint8_t*>(source.const_data_ptr());
  const int64_t row_bytes = columns * float_type_size(type);
  const auto* scale = static_cast<const float*>(norms.const_data_ptr());
  const auto* kept_before = before ? static_cast<const uint8_t*>(before->const_data_ptr()) : nullptr;
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());

  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kKeysPerTask / std::max<int64_t>(1, columns)), [&](int64_t begin, int64_t end) {
        const Scratch<int32_t> keys(columns), groups(group_scratch(m));
        const Scratch<uint8_t> kept(columns);
        for (int64_t row = begin; row < end; ++row) {
          run.wanda_keys(weights + row * row_bytes, type, scale, columns, keys.get());
          if (kept_before != nullptr) {
            packed_rows.unpack_row(kept_before + row * width, columns, kept.get());
            run.drop_pruned(kept.get(), columns, keys.get());
          }
          if (m > 0) {
            run.keep_of_groups(keys.get(), columns, m, count, kept.get(), groups.get());
          } else {
            const auto counted = [&](int32_t bound) { return run.count_up_to(keys.get(), columns, bound); };
            const auto all_stay = [](int32_t, int32_t, int64_t, int64_t) {};
            const Bound bound = smallest(run.range(keys.get(), columns), columns, count, counted, all_stay);
            int64_t ties = columns;
            if (bound.room < bound.ties) {
              ties = 0;
              for (int64_t left = bound.room; left > 0; ++ties) left -= keys[ties] == bound.key;
            }
            run.keep_above(keys.get(), columns, bound.key, ties, kept.get());
          }
          packed_rows.pack_row(kept.get(), columns, to + row * width);
        }
      });
  return packed;
}

Tensor pruned_per_block(const Tensor& mask, int64_t in_features, int64_t block_size) {
  pruning::check_pruned_per_block(mask, in_features, block_size);
  const Tensor source = torch::stable::contiguous(mask);
  const int64_t rows = mask.size(0), width = mask.size(1), blocks = (in_features + block_size - 1) / block_size;
  Tensor counts = torch::stable::new_empty(source, {blocks}, ScalarType::Long);
  const auto* bits = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* pruned = static_cast<int64_t*>(counts.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kKeysPerTask / std::max<int64_t>(1, rows * block_size / 8));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * block_size, end = std::min(begin + block_size, in_features);
      int64_t kept = 0;
      for (int64_t row = 0; row < rows; ++row) kept += count_bits(bits + row * width, begin, end);
      pruned[block] = rows * (end - begin) - kept;
    }
  });
  return counts;
}

// The keys of one row of a column block.
struct BlockRows {
  const Kernels& run;
  const bitmask::Kernels& packed_rows;
  const float* weight;  // at the block's first column
  int64_t stride;
  const float* diagonal;
  const uint8_t* mask;
  int64_t mask_stride, first_column, width;

  void keys(int64_t row, int32_t* out, uint8_t* kept) const {
    run.sweep_keys(weight + row * stride, diagonal, width, out);
    if (mask == nullptr) return;
    const int64_t byte = first_column / 8, skipped = first_column % 8;
    packed_rows.unpack_row(mask + row * mask_stride + byte, skipped + width, kept);
    run.drop_pruned(kept + skipped, width, out);
  }
};

// Where the `room` first ties end, in the order of columns, then rows: all of the first `column` columns and `row` rows
// of the next.
void place_ties(const BlockRows& block, int64_t rows, const Bound& bound, int32_t* column, int32_t* row) {
  const Scratch<int32_t> keys(block.width);
  const Scratch<uint8_t> kept(block.width + 8);
  std::vector<int64_t> ties(block.width, 0);
  for (int64_t r = 0; r < rows; ++r) {
    block.keys(r, keys.get(), kept.get());
    for (int64_t j = 0; j < block.width; ++j) ties[j] += keys[j] == bound.key;
  }
  int64_t left = bound.room, j = 0;
  while (left >= ties[j]) left -= ties[j++];
  int64_t r = 0;
  for (; left > 0; ++r) {
    block.keys(r, keys.get(), kept.get());
    left -= keys[j] == bound.key;
  }
  *column = static_cast<int32_t>(j);
  *row = static_cast<int32_t>(r);
}

void select_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end, const Tensor& counts,
                  int64_t index, const std::optional<Tensor>& mask, const Tensor& scratch, const Tensor& state) {
  pruning::check_select_block(weight, factor, start, end, counts, index, mask, scratch, state, 3);
  const int64_t rows = weight.size(0), columns = weight.size(1), width = end - start;
  const int64_t count = static_cast<const int64_t*>(counts.const_data_ptr())[index];
  STD_TORCH_CHECK(0 <= count && count <= rows * width, "counts: expected up to ", rows * width, ", got ", count);
  auto* bound_out = static_cast<int32_t*>(state.mutable_data_ptr());

  std::vector<float> diagonal(width);
  const auto* upper = static_cast<const float*>(factor.const_data_ptr());
  for (int64_t j = 0; j < width; ++j) diagonal[j] = upper[(start + j) * (factor.stride(0) + factor.stride(1))];
  const Kernels& run = kernels();
  const BlockRows block{.run = run,
                        .packed_rows = bitmask::kernels(),
                        .weight = static_cast<const float*>(weight.const_data_ptr()) + start,
                        .stride = columns,
                        .diagonal = diagonal.data(),
                        .mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                        .mask_stride = packed_width(columns),
                        .first_column = start,
                        .width = width};

  auto* keys = static_cast<int32_t*>(scratch.mutable_data_ptr());
  const int64_t chunk_rows = std::max<int64_t>(1, kKeysPerChunk / width);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  std::vector<int64_t> active(chunks), below(chunks);
  std::vector<KeyRange> ranges(chunks);
  int64_t left = rows * width;  // keys still looked at
  const auto in_parallel = [&](const auto& body) {
    const int64_t grain = std::max<int64_t>(1, kKeysPerTask * chunks / std::max<int64_t>(1, left));
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) body(chunk, keys + chunk * chunk_rows * width);
    });
  };
  in_parallel([&](int64_t chunk, int32_t* own) {
    const int64_t begin = chunk * chunk_rows, stop = std::min(begin + chunk_rows, rows);
    const Scratch<uint8_t> kept(width + 8);
    for (int64_t row = begin; row < stop; ++row) block.keys(row, own + (row - begin) * width, kept.get());
    active[chunk] = (stop - begin) * width;
    ranges[chunk] = run.range(own, active[chunk]);
  });
  KeyRange range{0x7fffffff, 0, 0};
  for (const KeyRange& part : ranges) range = merged(range, part);

  int64_t dropped = 0;  // keys below all that are still looked at
  const auto count_all = [&](int32_t bound) {
    in_parallel([&](int64_t chunk, int32_t* own) { below[chunk] = run.count_up_to(own, active[chunk], bound); });
    int64_t found = dropped;
    for (int64_t part : below) found += part;
    return found;
  };
  const auto gather_some = [&](int32_t least, int32_t most, int64_t below, int64_t inside) {
    if (inside * kGatherShare > left) return;
    in_parallel([&](int64_t chunk, int32_t* own) { active[chunk] = run.gather(own, active[chunk], least, most); });
    dropped = below;
    left = inside;
  };
  const Bound bound = smallest(range, rows * width, count, count_all, gather_some);
  bound_out[0] = bound.key;
  bound_out[1] = static_cast<int32_t>(width);
  bound_out[2] = 0;
  if (bound.room < bound.ties) place_ties(block, rows, bound, bound_out + 1, bound_out + 2);
}

}  // namespace
}  // namespace losa::selection

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("wanda_select", TORCH_BOX(&losa::selection::wanda_select));
  library.impl("pruned_per_block", TORCH_BOX(&losa::selection::pruned_per_block));
  library.impl("select_block", TORCH_BOX(&losa::selection::select_block));
}
