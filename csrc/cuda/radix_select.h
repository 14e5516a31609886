// What selection and Wanda share: a radix select of 11, 10 and 10 bits on the bits of a score. Counts are integers, so
// that atomics leave the result the same from run to run.
#pragma once

#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/packed_rows.h"

namespace losa::radix_select {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;  // of the first digit
constexpr int kUnit = 8;     // neighbouring columns that a thread takes together: a byte of the mask
// The most blocks of a launch; with more work a block takes several turns. Tests set few blocks, so that it does.
#if defined(LOSA_MAX_BLOCKS)
constexpr int64_t kMaxBlocks = LOSA_MAX_BLOCKS, kMaxRowBlocks = LOSA_MAX_BLOCKS;
#else
constexpr int64_t kMaxBlocks = 1024, kMaxRowBlocks = 1 << 20;
#endif

// The three digits of a key, from the top.
LOSA_HOST_DEVICE constexpr int digit_shift(int pass) {
  return pass == 0 ? 20 : pass == 1 ? 10 : 0;
}
LOSA_HOST_DEVICE constexpr int digit_bins(int pass) {
  return pass == 0 ? kBins : 1024;
}

// The number of bins of the digits before.
LOSA_HOST_DEVICE constexpr int digit_start(int pass) {
  return pass == 0 ? 0 : digit_start(pass - 1) + digit_bins(pass - 1);
}

// A key takes part in a digit's pass if the digits before it equal the prefix found so far. Keys below 0 never do.
__device__ __forceinline__ bool takes_part(int key, int pass, int prefix) {
  return key >= 0 && (pass == 0 || key >> (digit_shift(pass) + 10) == prefix);
}

__device__ __forceinline__ int digit_of(int key, int pass) {
  return (key >> digit_shift(pass)) & (digit_bins(pass) - 1);
}

// A bin of a histogram, with the number of keys in the bins before it and in it.
struct Bin {
  int index, before, inside;
};

// The sum of the values of the threads before this one, of one value a thread; *total is the sum of all. Ends with a
// barrier of the block.
__device__ __forceinline__ int exclusive_sum(int value, int* warp_sums, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int sum = inclusive_sum(value);
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

// The bin of the k-th smallest key (k from 1). By all threads of the block, each with the counts of kOwn neighbouring
// bins.
template <int kOwn>
__device__ __forceinline__ Bin find_bin(const int (&counts)[kOwn], int k, int* warp_sums, Bin* found) {
  int sum = 0, total;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += counts[i];
  int before = exclusive_sum(sum, warp_sums, &total);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (before < k && k <= before + counts[i]) *found = {static_cast<int>(threadIdx.x) * kOwn + i, before, counts[i]};
    before += counts[i];
  }
  __syncthreads();
  return *found;
}

// Four neighbours that one access loaded, one by one.
template <class Four, class T>
__device__ __forceinline__ void spread(Four four, T* values) {
  values[0] = four.x;
  values[1] = four.y;
  values[2] = four.z;
  values[3] = four.w;
}

// Counts of this thread's bins of a complete histogram in shared memory. The bins are zero afterwards.
template <int kOwn>
__device__ __forceinline__ void take_bins(int* histogram, int (&counts)[kOwn]) {
  auto* fours = reinterpret_cast<int4*>(histogram + threadIdx.x * kOwn);
#pragma unroll
  for (int q = 0; q < kOwn / 4; ++q) {
    spread(fours[q], counts + 4 * q);
    fours[q] = make_int4(0, 0, 0, 0);
  }
}

// A unit of kUnit columns, of which `left` exist; the others become `rest`. aligned: all columns exist, and the unit
// may be read 16 bytes (a Four) at a time.
template <class Four, class T>
__device__ __forceinline__ void load_unit(const T* place, int left, bool aligned, T rest, T (&values)[kUnit]) {
  if (aligned) {
#pragma unroll
    for (int q = 0; q < kUnit / 4; ++q) spread(reinterpret_cast<const Four*>(place)[q], values + 4 * q);  // [4]
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) values[i] = i < left ? place[i] : rest;
  }
}

// Bits of eight columns of a packed row of `width` bytes, from any column on. Bits beyond the row are zero.
__device__ __forceinline__ unsigned mask_byte(const uint8_t* row, int64_t width, int64_t column) {
  const int64_t byte = column / 8;
  const int shift = static_cast<int>(column % 8);
  unsigned bits = row[byte];
  if (shift != 0 && byte + 1 < width) bits |= static_cast<unsigned>(row[byte + 1]) << 8;
  return bits >> shift & 0xffu;
}

}  // namespace losa::radix_select
