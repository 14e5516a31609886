// Exact selection for one column block of a sweep on CUDA, and the number of entries that a mask has pruned already.
#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "cuda/radix_select.h"
#include "cuda/selection/block_kernel.h"

namespace losa::selection {

// keys: scratch (rows, width); state: kStateInts ints at a multiple of 16 bytes, zero before the first call.
void launch_select_block(const ColumnBlock& block, int* keys, int* state, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(block.rows) * ((block.width + kUnit - 1) / kUnit);
  const int64_t needed = (units + kThreads - 1) / kThreads, most = needed < kMaxBlocks ? needed : kMaxBlocks;
  static PerDevice<> residents;
  const int resident = residents.get(0, [] { return resident_blocks(select_kernel, kThreads, sizeof(BlockShared)); });
  const auto grid = static_cast<unsigned>(most < resident ? most : resident);
  LOSA_LAUNCH_COOPERATIVE(select_kernel, grid, kThreads, sizeof(BlockShared), stream, block, keys, state);
}

// pruned[block]: the block's entries whose bit of the mask is 0. A block of threads for each column block. aligned:
// every row of a column block is 16 bytes of the mask, at a multiple of 16.
__global__ void __launch_bounds__(kThreads) pruned_kernel(const uint8_t* mask, int64_t rows, int64_t columns,
                                                          int64_t block_size, bool aligned, int64_t* pruned) {
  __shared__ unsigned long long kept_in_block;
  if (threadIdx.x == 0) kept_in_block = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * block_size, end = begin + block_size < columns ? begin + block_size : columns;
  const int64_t first = begin / 8, bytes = (end + 7) / 8 - first, stride = packed_width(columns);
  unsigned long long kept = 0;
  if (aligned) {
#pragma unroll 8
    for (int64_t row = threadIdx.x; row < rows; row += kThreads) {
      const uint4 four = *reinterpret_cast<const uint4*>(mask + row * stride + first);  // [1, 128 columns]
      kept += static_cast<unsigned>(__popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w));
    }
  } else {
    for (int64_t index = threadIdx.x; index < rows * bytes; index += kThreads) {
      const int64_t row = index / bytes, byte = first + index - row * bytes;
      unsigned value = mask[row * stride + byte];  // [1, 8 columns]
      if (8 * byte < begin) value &= 0xffu << (begin - 8 * byte);
      if (8 * byte + 8 > end) value &= 0xffu >> (8 * byte + 8 - end);
      kept += static_cast<unsigned>(__popc(value));
    }
  }
  atomicAdd(&kept_in_block, kept);
  __syncthreads();
  if (threadIdx.x == 0) pruned[blockIdx.x] = rows * (end - begin) - static_cast<int64_t>(kept_in_block);
}

void launch_pruned_per_block(const uint8_t* mask, int64_t rows, int64_t columns, int64_t block_size, int64_t* pruned,
                             cudaStream_t stream) {
  const int64_t blocks = (columns + block_size - 1) / block_size;
  if (blocks == 0) return;
  const auto grid = static_cast<unsigned>(blocks);
  const bool aligned = block_size == 128 && columns % 128 == 0 && reinterpret_cast<uintptr_t>(mask) % 16 == 0;
  LOSA_LAUNCH(pruned_kernel, grid, kThreads, 0, stream, mask, rows, columns, block_size, aligned, pruned);
}

}  // namespace losa::selection

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/pruning_checks.h"

namespace losa::selection {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Tensor pruned_per_block(const Tensor& mask, int64_t in_features, int64_t block_size) {
  pruning::check_pruned_per_block(mask, in_features, block_size);
  const DeviceGuard guard(mask.get_device_index());
  const Tensor source = torch::stable::contiguous(mask);
  const int64_t blocks = (in_features + block_size - 1) / block_size;
  Tensor pruned = torch::stable::new_empty(source, {blocks}, ScalarType::Long);
  launch_pruned_per_block(static_cast<const uint8_t*>(source.const_data_ptr()), mask.size(0), in_features, block_size,
                          static_cast<int64_t*>(pruned.mutable_data_ptr()), current_stream(mask));
  return pruned;
}

void select_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end, const Tensor& counts,
                  int64_t index, const std::optional<Tensor>& mask, const Tensor& scratch, const Tensor& state) {
  pruning::check_select_block(weight, factor, start, end, counts, index, mask, scratch, state, kStateInts);
  const int64_t rows = weight.size(0), columns = weight.size(1), width = end - start;
  STD_TORCH_CHECK(width <= kMaxWidth, "start, end: expected up to ", kMaxWidth, " columns, got ", start, ", ", end);
  STD_TORCH_CHECK(rows * width < (int64_t{1} << 31), "weight: expected less than 2^31 entries in a block");
  if (rows == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const int64_t diagonal_stride = factor.stride(0) + factor.stride(1);
  const auto* weights = static_cast<const float*>(weight.const_data_ptr()) + start;
  auto* keys = static_cast<int*>(scratch.mutable_data_ptr());
  auto* states = static_cast<int*>(state.mutable_data_ptr());
  const uintptr_t places = reinterpret_cast<uintptr_t>(weights) | reinterpret_cast<uintptr_t>(keys);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(states) % 16 == 0, "state: expected at a multiple of 16 bytes");
  const ColumnBlock block{.weight = weights,
                          .stride = columns,
                          .diagonal = static_cast<const float*>(factor.const_data_ptr()) + start * diagonal_stride,
                          .diagonal_stride = diagonal_stride,
                          .mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                          .mask_stride = packed_width(columns),
                          .first_column = start,
                          .rows = static_cast<unsigned>(rows),
                          .width = static_cast<unsigned>(width),
                          .count = static_cast<const int64_t*>(counts.const_data_ptr()) + index,
                          .aligned = columns % 4 == 0 && width % kUnit == 0 && places % 16 == 0};
  launch_select_block(block, keys, states, current_stream(weight));
}

}  // namespace
}  // namespace losa::selection

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("pruned_per_block", TORCH_BOX(&losa::selection::pruned_per_block));
  library.impl("select_block", TORCH_BOX(&losa::selection::select_block));
}

#endif
