// Exact selection for one column block of a sweep: the k-th smallest score by radix select. One launch, whose blocks
// wait for each other between the digits; no sort, no index tensors.
#pragma once

#include "cuda/grid_barrier.h"
#include "cuda/launch.h"
#include "cuda/radix_select.h"
#include "cuda/scores.h"

namespace losa::selection {

using namespace radix_select;

// Where select_block's int32 state holds what. The bound is its first three numbers: the entries to be pruned are those
// before (key, column, row). All other numbers are zero between calls.
constexpr int kKey = 0, kColumn = 1, kRow = 2, kArrived = 3, kFinished = 4, kPruned = 5;
constexpr int kHistograms = 8, kTies = kHistograms + digit_start(3);
constexpr int kMaxWidth = 128, kStateInts = kTies + kMaxWidth;

struct ColumnBlock {
  const float* weight;  // (rows, stride), from the block's first column on
  int64_t stride;
  const float* diagonal;  // of U: `width` numbers, diagonal_stride apart
  int64_t diagonal_stride;
  const uint8_t* mask;  // (rows, mask_stride), from the weight's first column on; or null
  int64_t mask_stride, first_column;
  unsigned rows, width;
  const int64_t* count;  // entries to be pruned, with those that are pruned already; all, if it is more than there are
  bool aligned;          // units of weight and keys are whole and may be accessed 16 bytes at a time
};

struct BlockShared {
  __align__(16) int histogram[kBins];
  float diagonal[kMaxWidth], inverse[kMaxWidth];
  int warp_sums[kWarps];
  int pruned, column, wanted;
  bool last;
  Bin found;
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

// Keys of the unit at a row and column; -1 for entries that are pruned already or do not exist. Returns how many are
// pruned already.
__device__ __forceinline__ int find_keys(const ColumnBlock& block, const BlockShared& shared, unsigned row,
                                         unsigned column, int (&keys)[kUnit]) {
  const int left = static_cast<int>(block.width - column);
  float w[kUnit];
  load_unit<float4>(block.weight + row * block.stride + column, left, block.aligned, 0.0f, w);  // [8]
  const unsigned inside = left < kUnit ? (1u << left) - 1 : 0xffu;
  unsigned pruned = 0;
  if (block.mask != nullptr) {
    const uint8_t* bits = block.mask + row * block.mask_stride;
    pruned = ~mask_byte(bits, block.mask_stride, block.first_column + column) & inside;
  }
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const unsigned here = i < left ? column + i : column;
    keys[i] = ((pruned | ~inside) >> i & 1u) != 0 ? -1 : sweep_key(w[i], shared.diagonal[here], shared.inverse[here]);
  }
  return __popc(pruned);
}

// The bin of the k-th smallest key, from the counts of all blocks for a digit.
template <int kPass>
__device__ __forceinline__ Bin find_digit(BlockShared& shared, int* state, int k) {
  constexpr int kOwn = digit_bins(kPass) / kThreads;
  int counts[kOwn];
  // Other blocks wrote the counts, so that this multiprocessor's first-level cache may hold old ones.
  const auto* fours = reinterpret_cast<const int4*>(state + kHistograms + digit_start(kPass) + threadIdx.x * kOwn);
#pragma unroll
  for (int q = 0; q < kOwn / 4; ++q) spread(__ldcg(fours + q), counts + 4 * q);
  return find_bin(counts, k, shared.warp_sums, &shared.found);
}

// Adds the block's counts of a digit to the counts of all blocks, and waits until these are complete. The block's
// counts are zero afterwards.
template <int kPass>
__device__ __forceinline__ void add_histogram(BlockShared& shared, int* state) {
  __syncthreads();
  for (int i = threadIdx.x; i < digit_bins(kPass); i += kThreads) {
    if (shared.histogram[i] == 0) continue;
    atomicAdd(state + kHistograms + digit_start(kPass) + i, shared.histogram[i]);
    shared.histogram[i] = 0;
  }
  grid_barrier(state + kArrived);
}

// In the last block: finds where the first `room` keys equal to `bound` end, in the order of columns, then rows.
__device__ __forceinline__ void place_ties(const ColumnBlock& block, BlockShared& shared, const int* keys, int* state,
                                           int bound, int room) {
  static_assert(kMaxWidth <= kThreads);
  const int mine = threadIdx.x < block.width ? __ldcg(state + kTies + threadIdx.x) : 0;
  int here;
  const int before = exclusive_sum(mine, shared.warp_sums, &here);
  if (before <= room && room < before + mine) {
    shared.column = static_cast<int>(threadIdx.x);
    shared.wanted = room - before;
  }
  __syncthreads();
  const int wanted = shared.wanted;
  int passed = 0;
  for (unsigned first = 0; first < block.rows && passed < wanted; first += kThreads) {
    const unsigned row = first + threadIdx.x;
    const int tied = row < block.rows && __ldcg(keys + row * block.width + shared.column) == bound ? 1 : 0;
    const int rank = passed + exclusive_sum(tied, shared.warp_sums, &here);
    if (tied != 0 && rank + 1 == wanted) state[kRow] = static_cast<int>(row) + 1;
    passed += here;
  }
  if (threadIdx.x == 0) state[kColumn] = shared.column;
}

// Fills the shared memory. By all threads; ends with a barrier of the block.
__device__ __forceinline__ void prepare(const ColumnBlock& block, BlockShared& shared) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[i] = 0;
  if (threadIdx.x == 0) shared.pruned = 0;
  for (unsigned i = threadIdx.x; i < block.width; i += kThreads) {
    shared.diagonal[i] = block.diagonal[i * block.diagonal_stride];  // [width]
    shared.inverse[i] = __frcp_rn(shared.diagonal[i]);
  }
  __syncthreads();
}

// keys: scratch (rows, width).
__global__ void __launch_bounds__(kThreads) select_kernel(ColumnBlock block, int* keys, int* state) {
  LOSA_DYNAMIC_SHARED(BlockShared, memory);
  BlockShared& shared = *memory;
  prepare(block, shared);
  const unsigned units = (block.width + kUnit - 1) / kUnit, total = block.rows * units, step = gridDim.x * kThreads;
  const unsigned begin = blockIdx.x * kThreads + threadIdx.x;

  // The keys of a thread's first unit stay in registers. It reads the keys of later units where it wrote them.
  int first_keys[kUnit], pruned = 0;
  const auto place_of = [&](unsigned index, unsigned* column) {
    const unsigned row = index / units;
    *column = (index - row * units) * kUnit;
    return row;
  };
  const auto count_digits = [&](int pass, int prefix, const int (&own)[kUnit]) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (takes_part(own[i], pass, prefix)) atomicAdd(&shared.histogram[digit_of(own[i], pass)], 1);
    }
  };
  const auto each = [&](auto use) {
    if (begin < total) use(begin, first_keys);
    for (unsigned index = begin + step; index < total; index += step) {
      unsigned column, row = place_of(index, &column);
      int own[kUnit];
      load_unit<int4>(keys + row * block.width + column, static_cast<int>(block.width - column), block.aligned, -1,
                      own);
      use(index, own);
    }
  };
  // The keys, and their first digit.
  for (unsigned index = begin; index < total; index += step) {
    unsigned column, row = place_of(index, &column);
    int own[kUnit];
    pruned += find_keys(block, shared, row, column, own);
    store_unit(keys + row * block.width + column, static_cast<int>(block.width - column), block.aligned, own);
    count_digits(0, 0, own);
    if (index == begin) {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) first_keys[i] = own[i];
    }
  }
  if (pruned != 0) atomicAdd(&shared.pruned, pruned);
  __syncthreads();
  if (threadIdx.x == 0 && shared.pruned != 0) atomicAdd(state + kPruned, shared.pruned);
  add_histogram<0>(shared, state);

  // The bound, digit by digit. All blocks read the same counts and take the same branches. If no entry is to be pruned
  // beyond those that are pruned already, there are no digits.
  const int64_t entries = static_cast<int64_t>(block.rows) * block.width;
  const int count = static_cast<int>(*block.count < entries ? *block.count : entries);
  int room = count - __ldcg(state + kPruned), bound = -1;
  bool tied = false;
  if (room > 0) {
    Bin bin = find_digit<0>(shared, state, room);
    bound = bin.index;
    room -= bin.before;
    each([&](unsigned, const int (&own)[kUnit]) { count_digits(1, bound, own); });
    add_histogram<1>(shared, state);
    bin = find_digit<1>(shared, state, room);
    bound = bound << 10 | bin.index;
    room -= bin.before;
    each([&](unsigned, const int (&own)[kUnit]) { count_digits(2, bound, own); });
    add_histogram<2>(shared, state);
    bin = find_digit<2>(shared, state, room);
    bound = bound << 10 | bin.index;
    room -= bin.before;
    tied = room < bin.inside;
  }
  // Keys equal to the bound, of which only the first are pruned: how many there are in each column.
  if (tied) {
    each([&](unsigned index, const int (&own)[kUnit]) {
      unsigned column;
      place_of(index, &column);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (own[i] == bound) atomicAdd(&shared.histogram[column + i], 1);
      }
    });
    __syncthreads();
    if (threadIdx.x < block.width && shared.histogram[threadIdx.x] != 0) {
      atomicAdd(state + kTies + threadIdx.x, shared.histogram[threadIdx.x]);
    }
  }

  // The last block stores the bound and clears the state.
  if (!last_block(state + kFinished, &shared.last)) return;
  if (threadIdx.x == 0) {
    state[kKey] = bound;
    state[kColumn] = static_cast<int>(block.width);
    state[kRow] = 0;
    state[kArrived] = 0;
    state[kPruned] = 0;
  }
  __syncthreads();
  if (tied) place_ties(block, shared, keys, state, bound, room);
  __syncthreads();
  for (int i = kHistograms + threadIdx.x; i < kStateInts; i += kThreads) state[i] = 0;
}

}  // namespace losa::selection
