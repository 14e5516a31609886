// Exact selection on CUDA: the k-th smallest score by a radix select of 11, 10 and 10 bits on the float's bits. Counts
// are integers, so that atomics leave the result the same from run to run. No sort, no index tensors.
#include "common/bits.h"
#include "common/launch.h"
#include "cuda/scores.h"

namespace losa::selection {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;
// Beyond these a block takes several shares; tests set few, so that it does.
#if defined(LOSA_MAX_BLOCKS)
constexpr int64_t kMaxBlocks = LOSA_MAX_BLOCKS, kMaxRowBlocks = LOSA_MAX_BLOCKS;
#else
constexpr int64_t kMaxBlocks = 1024, kMaxRowBlocks = 1 << 20;
#endif
// Keys that fit into shared memory on every architecture; longer rows compute them anew in each pass.
constexpr int kMaxStoredKeys = 22 << 10;

// The three digits of a key, from the top. A key takes part if what is above the digit equals the prefix found so far.
__device__ __forceinline__ int digit_shift(int pass) {
  return pass == 0 ? 20 : pass == 1 ? 10 : 0;
}
__device__ __forceinline__ int digit_bins(int pass) {
  return pass == 0 ? 2048 : 1024;
}
__device__ __forceinline__ bool takes_part(int key, int pass, int prefix) {
  return key >= 0 && (pass == 0 || key >> (digit_shift(pass) + 10) == prefix);
}
__device__ __forceinline__ int digit_of(int key, int pass) {
  return (key >> digit_shift(pass)) & (digit_bins(pass) - 1);
}

struct Bin {
  int index, before, inside;
};

// Sum over the block of one value a thread, before this thread. Ends with a barrier.
__device__ __forceinline__ int exclusive_sum(int value, int* warp_sums, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const int from = __shfl_up_sync(0xffffffffu, sum, delta);
    if (lane >= delta) sum += from;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) before += warp_sums[i];
    all += warp_sums[i];
  }
  *total = all;
  __syncthreads();
  return before + sum - value;
}

// The bin of the k-th smallest (k from 1), by all threads of the block; the histogram is complete on entry and zero at
// the end.
__device__ __forceinline__ Bin find_bin(int* histogram, int bins, int k, int* warp_sums, Bin* found) {
  const int own = bins / kThreads;
  int* counts = histogram + threadIdx.x * own;
  int sum = 0, total;
  for (int i = 0; i < own; ++i) sum += counts[i];
  int before = exclusive_sum(sum, warp_sums, &total);
  if (before < k && k <= before + sum) {
    int i = 0;
    while (before + counts[i] < k) before += counts[i++];
    *found = {static_cast<int>(threadIdx.x) * own + i, before, counts[i]};
  }
  for (int i = 0; i < own; ++i) counts[i] = 0;
  __syncthreads();
  return *found;
}

__device__ __forceinline__ bool is_kept(const uint8_t* mask, int64_t column) {
  return mask == nullptr || (mask[column / 8] >> (column % 8) & 1) != 0;
}

// ---- one column block of a sweep -----------------------------------------------------------------------------------

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

// ---- Wanda ---------------------------------------------------------------------------------------------------------

enum class WeightType { kFloat, kHalf, kBFloat16 };

template <WeightType kType>
__device__ __forceinline__ float magnitude(const void* weight, int64_t index) {
  if (kType == WeightType::kFloat) {
    return __int_as_float(__float_as_int(static_cast<const float*>(weight)[index]) & 0x7fffffff);
  }
  const unsigned bits = static_cast<const uint16_t*>(weight)[index] & 0x7fffu;
  if (kType == WeightType::kBFloat16) return __uint_as_float(bits << 16);
  // A subnormal's bits on top of 2^-14, less 2^-14.
  if (bits < 0x400u) return __uint_as_float((bits << 13) + 0x38800000u) - 0x1p-14f;
  return __uint_as_float((bits << 13) + 0x38000000u);
}

struct Wanda {
  const void* weight;
  const float* norms;
  const uint8_t* mask;  // packed, dense rows; may be null
  int64_t rows, columns;
  int count;
  uint8_t* packed;
};

template <WeightType kType>
__device__ __forceinline__ int wanda_key(const Wanda& job, int64_t row, int64_t column) {
  if (job.mask != nullptr && !is_kept(job.mask + row * packed_width(job.columns), column)) return -1;
  return score_key(__fmul_rn(magnitude<kType>(job.weight, row * job.columns + column), job.norms[column]));
}

// A block of threads per row.
template <WeightType kType, bool kStored>
__global__ void __launch_bounds__(kThreads, 4) wanda_rows_kernel(Wanda job) {
  __shared__ int histogram[kBins];
  __shared__ int warp_sums[kWarps];
  __shared__ int lost;
  __shared__ Bin found;
  LOSA_DYNAMIC_SHARED(int, keys);
  const int columns = static_cast<int>(job.columns), width = static_cast<int>(packed_width(columns));
  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
    const auto key_of = [&](int column) { return kStored ? keys[column] : wanda_key<kType>(job, row, column); };
    if (threadIdx.x == 0) lost = 0;
    __syncthreads();
    int own_lost = 0;
    for (int column = threadIdx.x; column < columns; column += kThreads) {
      const int key = wanda_key<kType>(job, row, column);
      if (kStored) keys[column] = key;
      if (key < 0) {
        ++own_lost;
      } else {
        atomicAdd(&histogram[digit_of(key, 0)], 1);
      }
    }
    if (own_lost != 0) atomicAdd(&lost, own_lost);
    __syncthreads();
    int room = job.count - lost, prefix = 0;
    Bin bin{0, 0, 0};
    if (room > 0) {
      for (int pass = 0; pass < 3; ++pass) {
        if (pass > 0) {
          for (int column = threadIdx.x; column < columns; column += kThreads) {
            const int key = key_of(column);
            if (takes_part(key, pass, prefix)) atomicAdd(&histogram[digit_of(key, pass)], 1);
          }
          __syncthreads();
        }
        bin = find_bin(histogram, digit_bins(pass), room, warp_sums, &found);
        prefix = pass == 0 ? bin.index : prefix << 10 | bin.index;
        room -= bin.before;
        __syncthreads();
      }
    } else {
      prefix = -1;
      room = 0;
      for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
    }
    uint8_t* packed = job.packed + row * width;
    if (room == bin.inside) {  // all ties go: a warp takes 32 columns at a time
      const int lane = threadIdx.x % 32;
      for (int first = threadIdx.x - lane; first < columns; first += kThreads) {
        const int column = first + lane;
        const unsigned kept = __ballot_sync(0xffffffffu, column < columns && key_of(column) > prefix);
        if (lane < 4 && first / 8 + lane < width) packed[first / 8 + lane] = static_cast<uint8_t>(kept >> (8 * lane));
      }
    } else {  // the first `room` ties go: a thread takes 8 columns, after those of the threads before it
      int passed = 0;
      for (int first = 0; first < width; first += kThreads) {
        const int byte = first + threadIdx.x;
        unsigned kept = 0, ties = 0;
        for (int bit = 0; bit < 8; ++bit) {
          const int column = 8 * byte + bit;
          if (column >= columns) break;
          const int key = key_of(column);
          if (key > prefix) kept |= 1u << bit;
          if (key == prefix) ties |= 1u << bit;
        }
        int here;
        int before = passed + exclusive_sum(__popc(ties), warp_sums, &here);
        passed += here;
        for (int bit = 0; bit < 8; ++bit) {
          if ((ties >> bit & 1u) != 0 && before++ >= room) kept |= 1u << bit;
        }
        if (byte < width) packed[byte] = static_cast<uint8_t>(kept);
      }
    }
    __syncthreads();
  }
}

// A thread per 8 columns, or per 16 for M = 16.
template <WeightType kType, int kM>
__global__ void __launch_bounds__(kThreads, 2) wanda_groups_kernel(Wanda job) {
  constexpr int kColumns = kM > 8 ? kM : 8;
  const int64_t width = packed_width(job.columns), units = (job.columns + kColumns - 1) / kColumns;
  const int64_t total = job.rows * units, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < total; index += step) {
    const int64_t row = index / units, first = (index - row * units) * kColumns;
    unsigned kept = 0;
#pragma unroll
    for (int group = 0; group < kColumns; group += kM) {
      if (first + group >= job.columns) break;
      int keys[kM];
      unsigned lost = 0;
#pragma unroll
      for (int j = 0; j < kM; ++j) {
        keys[j] = wanda_key<kType>(job, row, first + group + j);
        if (keys[j] < 0) lost |= 1u << j;
      }
      const unsigned pruned = smallest_of<kM>(keys, job.count) | lost;
      kept |= (~pruned & ((1u << kM) - 1)) << group;
    }
#pragma unroll
    for (int byte = 0; byte < kColumns / 8; ++byte) {
      job.packed[row * width + first / 8 + byte] = static_cast<uint8_t>(kept >> (8 * byte));
    }
  }
}

inline unsigned limited(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxRowBlocks ? blocks : kMaxRowBlocks);
}

// m = 0: `count` go of each row; m = 4, 8 or 16: of each group.
template <WeightType kType>
void launch_wanda(const Wanda& job, int64_t m, cudaStream_t stream) {
  if (job.rows * job.columns == 0) return;
  const int64_t per_thread = m > 8 ? m : 8;
  const int64_t units = job.rows * ((job.columns + per_thread - 1) / per_thread);
  const unsigned grid = limited(m == 0 ? job.rows : (units + kThreads - 1) / kThreads);
  if (m == 4) {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 4>), grid, kThreads, 0, stream, job);
  } else if (m == 8) {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 8>), grid, kThreads, 0, stream, job);
  } else if (m == 16) {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 16>), grid, kThreads, 0, stream, job);
  } else if (job.columns <= kMaxStoredKeys) {
    const int bytes = static_cast<int>(job.columns) * 4;
    allow_shared_memory(wanda_rows_kernel<kType, true>, bytes);
    LOSA_LAUNCH((wanda_rows_kernel<kType, true>), grid, kThreads, bytes, stream, job);
  } else {
    LOSA_LAUNCH((wanda_rows_kernel<kType, false>), grid, kThreads, 0, stream, job);
  }
}

template void launch_wanda<WeightType::kFloat>(const Wanda&, int64_t, cudaStream_t);
template void launch_wanda<WeightType::kHalf>(const Wanda&, int64_t, cudaStream_t);
template void launch_wanda<WeightType::kBFloat16>(const Wanda&, int64_t, cudaStream_t);

// ---- how many entries of each column block are pruned --------------------------------------------------------------

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

Tensor wanda_select(const Tensor& weight, const Tensor& input_norms, int64_t count, int64_t m,
                    const std::optional<Tensor>& mask) {
  pruning::check_wanda_select(weight, input_norms, count, m, mask);
  const ScalarType dtype = weight.scalar_type();
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK((m == 0 || m == 4 || m == 8 || m == 16) && columns < (1 << 30),
                  "m: expected 0, 4, 8 or 16, a divisor of ", columns, ", got ", m);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor source = torch::stable::contiguous(weight), norms = torch::stable::contiguous(input_norms);
  std::optional<Tensor> before;
  if (mask) before = torch::stable::contiguous(*mask);
  Tensor packed = torch::stable::new_empty(source, {rows, packed_width(columns)}, ScalarType::Byte);
  const Wanda job{source.const_data_ptr(),
                  static_cast<const float*>(norms.const_data_ptr()),
                  before ? static_cast<const uint8_t*>(before->const_data_ptr()) : nullptr,
                  rows,
                  columns,
                  static_cast<int>(count),
                  static_cast<uint8_t*>(packed.mutable_data_ptr())};
  const auto launch = dtype == ScalarType::Float  ? launch_wanda<WeightType::kFloat>
                      : dtype == ScalarType::Half ? launch_wanda<WeightType::kHalf>
                                                  : launch_wanda<WeightType::kBFloat16>;
  launch(job, m, current_stream(weight));
  return packed;
}

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
  library.impl("wanda_select", TORCH_BOX(&losa::selection::wanda_select));
  library.impl("pruned_per_block", TORCH_BOX(&losa::selection::pruned_per_block));
  library.impl("select_block", TORCH_BOX(&losa::selection::select_block));
}

#endif
