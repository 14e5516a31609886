// What selection.cu and wanda.cu share: a radix select of 11, 10 and 10 bits on the float's bits. Counts are integers,
// so that atomics leave the result the same from run to run.
#pragma once

#include "common/launch.h"

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

}  // namespace losa::selection
