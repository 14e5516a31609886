// Exact selection for one column block of a sweep on CUDA, and how many entries a mask has pruned already. The k-th
// smallest score comes from a radix select over all blocks of threads; no sort, no index tensors.
#include "common/bits.h"
#include "common/launch.h"
#include "cuda/radix_select.h"
#include "cuda/scores.h"

namespace losa::selection {

// select_block's int32 state; all but the bound is zero between calls, the block counters between kernels.
constexpr int kKey = 0, kColumn = 1, kRow = 2, kPrefix = 3, kRoom = 4, kLost = 5, kFinished = 6, kTied = 7;
constexpr int kHistogram = 8, kTies = kHistogram + kBins, kStateInts = 4096;
constexpr int kMaxWidth = kStateInts - kTies;

struct ColumnBlock {
  const float* weight;  // at the block's first column
  int64_t stride;
  const float* diagonal;
  int64_t diagonal_stride;
  const uint8_t* mask;
  int64_t mask_stride, first_column;
  unsigned rows, width;
  int count;
};

// True in the last block to come here, which sees what all others wrote.
__device__ __forceinline__ bool last_block(int* state, bool* last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = atomicAdd(state + kFinished, 1) == static_cast<int>(gridDim.x) - 1;
    if (*last) state[kFinished] = 0;
  }
  __syncthreads();
  __threadfence();
  return *last;
}

template <int kPass>
__global__ void __launch_bounds__(kThreads) digit_kernel(ColumnBlock block, int* keys, int* state) {
  __shared__ int histogram[kBins];
  __shared__ int warp_sums[kWarps];
  __shared__ int lost;
  __shared__ bool last;
  __shared__ Bin found;
  const int bins = digit_bins(kPass);
  const int prefix = kPass == 0 ? 0 : state[kPrefix];
  for (int i = threadIdx.x; i < bins; i += kThreads) histogram[i] = 0;
  if (threadIdx.x == 0) lost = 0;
  __syncthreads();
  const unsigned total = block.rows * block.width, step = gridDim.x * kThreads;
  int own_lost = 0;
  for (unsigned index = blockIdx.x * kThreads + threadIdx.x; index < total; index += step) {
    int key;
    if (kPass == 0) {
      const unsigned row = index / block.width, column = index - row * block.width;
      key = sweep_key(block.weight[row * block.stride + column], block.diagonal[column * block.diagonal_stride]);
      if (block.mask != nullptr && !is_kept(block.mask + row * block.mask_stride, block.first_column + column)) {
        key = -1;
        ++own_lost;
      }
      keys[index] = key;
    } else {
      key = keys[index];
    }
    if (takes_part(key, kPass, prefix)) atomicAdd(&histogram[digit_of(key, kPass)], 1);
  }
  if (own_lost != 0) atomicAdd(&lost, own_lost);
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += kThreads) {
    if (histogram[i] != 0) atomicAdd(state + kHistogram + i, histogram[i]);
  }
  if (threadIdx.x == 0 && lost != 0) atomicAdd(state + kLost, lost);
  if (!last_block(state, &last)) return;

  volatile int* shared_state = state;  // written by other blocks: not from this one's first-level cache
  for (int i = threadIdx.x; i < bins; i += kThreads) {
    histogram[i] = shared_state[kHistogram + i];
    shared_state[kHistogram + i] = 0;
  }
  const int k = kPass == 0 ? block.count - shared_state[kLost] : shared_state[kRoom];
  __syncthreads();
  if (k <= 0) {  // nothing goes but what is pruned already
    if (threadIdx.x == 0) {
      shared_state[kKey] = -1;
      shared_state[kColumn] = static_cast<int>(block.width);
      shared_state[kPrefix] = -1;
      shared_state[kRow] = 0;
      shared_state[kRoom] = 0;
      shared_state[kLost] = 0;
      shared_state[kTied] = 0;
    }
    return;
  }
  const Bin bin = find_bin(histogram, bins, k, warp_sums, &found);
  if (threadIdx.x == 0) {
    const int key = kPass == 0 ? bin.index : prefix << 10 | bin.index, room = k - bin.before;
    shared_state[kPrefix] = key;
    shared_state[kRoom] = room;
    shared_state[kLost] = 0;
    if (kPass == 2) {
      shared_state[kKey] = key;
      shared_state[kColumn] = static_cast<int>(block.width);
      shared_state[kRow] = 0;
      shared_state[kTied] = room < bin.inside;
    }
  }
}

// Where the first kRoom ties end, in the order of columns, then rows.
__global__ void __launch_bounds__(kThreads) ties_kernel(ColumnBlock block, const int* keys, int* state) {
  __shared__ int warp_sums[kWarps];
  __shared__ bool last;
  __shared__ int column, left;
  if (state[kTied] == 0) return;
  const int bound = state[kKey];
  const unsigned total = block.rows * block.width, step = gridDim.x * kThreads;
  for (unsigned index = blockIdx.x * kThreads + threadIdx.x; index < total; index += step) {
    if (keys[index] == bound) atomicAdd(state + kTies + index % block.width, 1);
  }
  if (!last_block(state, &last)) return;

  volatile int* shared_state = state;
  if (threadIdx.x == 0) {
    left = shared_state[kRoom];
    column = 0;
    while (left >= shared_state[kTies + column]) left -= shared_state[kTies + column++];
  }
  __syncthreads();
  for (unsigned j = threadIdx.x; j < block.width; j += kThreads) shared_state[kTies + j] = 0;
  const int wanted = left;
  int passed = 0;
  for (unsigned first = 0; first < block.rows && passed < wanted; first += kThreads) {
    const unsigned row = first + threadIdx.x;
    const int tied = row < block.rows && keys[row * block.width + column] == bound ? 1 : 0;
    int here;
    const int before = passed + exclusive_sum(tied, warp_sums, &here);
    if (tied != 0 && before + 1 == wanted) shared_state[kRow] = static_cast<int>(row) + 1;
    passed += here;
  }
  if (threadIdx.x == 0) {
    shared_state[kColumn] = column;
    shared_state[kTied] = 0;
  }
}

// keys: rows x width scratch; state: kStateInts, zero before the first call.
void launch_select_block(const ColumnBlock& block, int* keys, int* state, cudaStream_t stream) {
  const int64_t blocks = (static_cast<int64_t>(block.rows) * block.width + 8 * kThreads - 1) / (8 * kThreads);
  const unsigned grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  LOSA_LAUNCH(digit_kernel<0>, grid, kThreads, 0, stream, block, keys, state);
  LOSA_LAUNCH(digit_kernel<1>, grid, kThreads, 0, stream, block, keys, state);
  LOSA_LAUNCH(digit_kernel<2>, grid, kThreads, 0, stream, block, keys, state);
  LOSA_LAUNCH(ties_kernel, grid, kThreads, 0, stream, block, keys, state);
}

__global__ void __launch_bounds__(kThreads)
    pruned_kernel(const uint8_t* mask, int64_t rows, int64_t columns, int64_t block_size, int64_t* pruned) {
  __shared__ unsigned long long kept_in_block;
  if (threadIdx.x == 0) kept_in_block = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * block_size, end = begin + block_size < columns ? begin + block_size : columns;
  const int64_t first = begin / 8, bytes = (end + 7) / 8 - first, stride = packed_width(columns);
  unsigned long long kept = 0;
  for (int64_t index = threadIdx.x; index < rows * bytes; index += kThreads) {
    const int64_t row = index / bytes, byte = first + index - row * bytes;
    unsigned value = mask[row * stride + byte];
    if (8 * byte < begin) value &= 0xffu << (begin - 8 * byte);
    if (8 * byte + 8 > end) value &= 0xffu >> (8 * byte + 8 - end);
    kept += static_cast<unsigned>(__popc(value));
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
  LOSA_LAUNCH(pruned_kernel, grid, kThreads, 0, stream, mask, rows, columns, block_size, pruned);
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

void select_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end, int64_t count,
                  const std::optional<Tensor>& mask, const Tensor& scratch, const Tensor& state) {
  pruning::check_select_block(weight, factor, start, end, count, mask, scratch, state, kStateInts);
  const int64_t rows = weight.size(0), columns = weight.size(1), width = end - start;
  STD_TORCH_CHECK(width <= kMaxWidth, "start, end: expected up to ", kMaxWidth, " columns, got ", start, ", ", end);
  STD_TORCH_CHECK(rows * width < (int64_t{1} << 31), "weight: expected less than 2^31 entries in a block");
  if (rows == 0) return;
  const DeviceGuard guard(weight.get_device_index());
  const int64_t diagonal_stride = factor.stride(0) + factor.stride(1);
  const ColumnBlock block{static_cast<const float*>(weight.const_data_ptr()) + start,
                          columns,
                          static_cast<const float*>(factor.const_data_ptr()) + start * diagonal_stride,
                          diagonal_stride,
                          mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                          packed_width(columns),
                          start,
                          static_cast<unsigned>(rows),
                          static_cast<unsigned>(width),
                          static_cast<int>(count)};
  launch_select_block(block, static_cast<int*>(scratch.mutable_data_ptr()),
                      static_cast<int*>(state.mutable_data_ptr()), current_stream(weight));
}

}  // namespace
}  // namespace losa::selection

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("pruned_per_block", TORCH_BOX(&losa::selection::pruned_per_block));
  library.impl("select_block", TORCH_BOX(&losa::selection::select_block));
}

#endif
