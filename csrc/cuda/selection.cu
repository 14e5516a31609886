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
constexpr int kMaxWidth = 128;

struct ColumnBlock {
  const float* weight;  // at the block's first column
  int64_t stride;
  const float* diagonal;
  int64_t diagonal_stride;
  const uint8_t* mask;
  int64_t mask_stride, first_column;
  unsigned rows, width;
  int count;
  bool aligned;  // units of weight and keys are whole and may be accessed 16 bytes at a time
};

__device__ __forceinline__ void store_unit(int* place, int left, bool aligned, const int (&values)[kUnit]) {
  if (aligned) {
#pragma unroll
    for (int q = 0; q < kUnit / 4; ++q) {
      reinterpret_cast<int4*>(place)[q] =
          make_int4(values[4 * q], values[4 * q + 1], values[4 * q + 2], values[4 * q + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (i < left) place[i] = values[i];
    }
  }
}

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
  constexpr int kCounts = digit_bins(kPass), kOwn = kCounts / kThreads;
  __shared__ __align__(16) int histogram[kCounts];
  __shared__ float diagonal[kPass == 0 ? kMaxWidth : 1];
  __shared__ float inverse[kPass == 0 ? kMaxWidth : 1];
  __shared__ int warp_sums[kWarps];
  __shared__ int lost;
  __shared__ bool last;
  __shared__ Bin found;
  const int prefix = kPass == 0 ? 0 : state[kPrefix];
  for (int i = threadIdx.x; i < kCounts; i += kThreads) histogram[i] = 0;
  if constexpr (kPass == 0) {
    if (threadIdx.x == 0) lost = 0;
    for (unsigned i = threadIdx.x; i < block.width; i += kThreads) {
      diagonal[i] = block.diagonal[i * block.diagonal_stride];
      inverse[i] = __frcp_rn(diagonal[i]);
    }
  }
  __syncthreads();
  const unsigned units = (block.width + kUnit - 1) / kUnit, total = block.rows * units, step = gridDim.x * kThreads;
  int own_lost = 0;
  for (unsigned index = blockIdx.x * kThreads + threadIdx.x; index < total; index += step) {
    const unsigned row = index / units, column = (index - row * units) * kUnit;
    const int left = static_cast<int>(block.width - column);
    int* place = keys + row * block.width + column;
    int own[kUnit];
    if constexpr (kPass == 0) {
      float w[kUnit];
      load_unit<float4>(block.weight + row * block.stride + column, left, block.aligned, 0.0f, w);
      const unsigned inside = left < kUnit ? (1u << left) - 1 : 0xffu;
      unsigned gone = 0;
      if (block.mask != nullptr) {
        const uint8_t* bits = block.mask + row * block.mask_stride;
        gone = ~mask_byte(bits, block.mask_stride, block.first_column + column) & inside;
      }
      own_lost += __popc(gone);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        const unsigned here = i < left ? column + i : column;
        own[i] = ((gone | ~inside) >> i & 1u) != 0 ? -1 : sweep_key(w[i], diagonal[here], inverse[here]);
      }
      store_unit(place, left, block.aligned, own);
    } else {
      load_unit<int4>(place, left, block.aligned, -1, own);
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (takes_part(own[i], kPass, prefix)) atomicAdd(&histogram[digit_of(own[i], kPass)], 1);
    }
  }
  if (kPass == 0 && own_lost != 0) atomicAdd(&lost, own_lost);
  __syncthreads();
  for (int i = threadIdx.x; i < kCounts; i += kThreads) {
    if (histogram[i] != 0) atomicAdd(state + kHistogram + i, histogram[i]);
  }
  if (kPass == 0 && threadIdx.x == 0 && lost != 0) atomicAdd(state + kLost, lost);
  if (!last_block(state, &last)) return;

  // What other blocks wrote: not from this one's first-level cache.
  int counts[kOwn];
  auto* fours = reinterpret_cast<int4*>(state + kHistogram + threadIdx.x * kOwn);
#pragma unroll
  for (int q = 0; q < kOwn / 4; ++q) {
    spread(__ldcg(fours + q), counts + 4 * q);
    fours[q] = make_int4(0, 0, 0, 0);
  }
  const int k = kPass == 0 ? block.count - __ldcg(state + kLost) : __ldcg(state + kRoom);
  __syncthreads();
  if (k <= 0) {  // nothing goes but what is pruned already
    if (threadIdx.x == 0) {
      state[kKey] = -1;
      state[kColumn] = static_cast<int>(block.width);
      state[kPrefix] = -1;
      state[kRow] = 0;
      state[kRoom] = 0;
      state[kLost] = 0;
      state[kTied] = 0;
    }
    return;
  }
  const Bin bin = find_bin(counts, k, warp_sums, &found);
  if (threadIdx.x == 0) {
    const int key = kPass == 0 ? bin.index : prefix << 10 | bin.index, room = k - bin.before;
    state[kPrefix] = key;
    state[kRoom] = room;
    state[kLost] = 0;
    if (kPass == 2) {
      state[kKey] = key;
      state[kColumn] = static_cast<int>(block.width);
      state[kRow] = 0;
      state[kTied] = room < bin.inside;
    }
  }
}

// Where the first kRoom ties end, in the order of columns, then rows.
__global__ void __launch_bounds__(kThreads) ties_kernel(ColumnBlock block, const int* keys, int* state) {
  static_assert(kMaxWidth <= kThreads);
  __shared__ int ties[kMaxWidth];
  __shared__ int warp_sums[kWarps];
  __shared__ bool last;
  __shared__ int column, wanted;
  if (state[kTied] == 0) return;
  const int bound = state[kKey];
  if (threadIdx.x < block.width) ties[threadIdx.x] = 0;
  __syncthreads();
  const unsigned total = block.rows * block.width, step = gridDim.x * kThreads;
  for (unsigned index = blockIdx.x * kThreads + threadIdx.x; index < total; index += step) {
    if (keys[index] == bound) atomicAdd(&ties[index % block.width], 1);
  }
  __syncthreads();
  if (threadIdx.x < block.width && ties[threadIdx.x] != 0) atomicAdd(state + kTies + threadIdx.x, ties[threadIdx.x]);
  if (!last_block(state, &last)) return;

  int mine = 0, here;
  if (threadIdx.x < block.width) {
    mine = __ldcg(state + kTies + threadIdx.x);
    state[kTies + threadIdx.x] = 0;
  }
  const int room = __ldcg(state + kRoom), columns_before = exclusive_sum(mine, warp_sums, &here);
  if (columns_before <= room && room < columns_before + mine) {
    column = static_cast<int>(threadIdx.x);
    wanted = room - columns_before;
  }
  __syncthreads();
  int passed = 0;
  for (unsigned first = 0; first < block.rows && passed < wanted; first += kThreads) {
    const unsigned row = first + threadIdx.x;
    const int tied = row < block.rows && keys[row * block.width + column] == bound ? 1 : 0;
    const int before = passed + exclusive_sum(tied, warp_sums, &here);
    if (tied != 0 && before + 1 == wanted) state[kRow] = static_cast<int>(row) + 1;
    passed += here;
  }
  if (threadIdx.x == 0) {
    state[kColumn] = column;
    state[kTied] = 0;
  }
}

// keys: rows x width scratch; state: kStateInts at 16 bytes, zero before the first call.
void launch_select_block(const ColumnBlock& block, int* keys, int* state, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(block.rows) * ((block.width + kUnit - 1) / kUnit);
  const int64_t blocks = (units + kThreads - 1) / kThreads;
  const unsigned grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  LOSA_LAUNCH(digit_kernel<0>, grid, kThreads, 0, stream, block, keys, state);
  LOSA_LAUNCH(digit_kernel<1>, grid, kThreads, 0, stream, block, keys, state);
  LOSA_LAUNCH(digit_kernel<2>, grid, kThreads, 0, stream, block, keys, state);
  LOSA_LAUNCH(ties_kernel, grid, kThreads, 0, stream, block, keys, state);
}

// `aligned`: every row of every column block is 16 bytes at a multiple of 16.
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
      const uint4 four = *reinterpret_cast<const uint4*>(mask + row * stride + first);
      kept += static_cast<unsigned>(__popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w));
    }
  } else {
    for (int64_t index = threadIdx.x; index < rows * bytes; index += kThreads) {
      const int64_t row = index / bytes, byte = first + index - row * bytes;
      unsigned value = mask[row * stride + byte];
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

void select_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end, int64_t count,
                  const std::optional<Tensor>& mask, const Tensor& scratch, const Tensor& state) {
  pruning::check_select_block(weight, factor, start, end, count, mask, scratch, state, kStateInts);
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
  const ColumnBlock block{weights,
                          columns,
                          static_cast<const float*>(factor.const_data_ptr()) + start * diagonal_stride,
                          diagonal_stride,
                          mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                          packed_width(columns),
                          start,
                          static_cast<unsigned>(rows),
                          static_cast<unsigned>(width),
                          static_cast<int>(count),
                          columns % 4 == 0 && width % kUnit == 0 && places % 16 == 0};
  launch_select_block(block, keys, states, current_stream(weight));
}

}  // namespace
}  // namespace losa::selection

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("pruned_per_block", TORCH_BOX(&losa::selection::pruned_per_block));
  library.impl("select_block", TORCH_BOX(&losa::selection::select_block));
}

#endif
