// What packing reads from a mask before it moves a value: where each row's values begin, and how full its groups are.
#pragma once

#include "cuda/packing/units.h"

namespace losa::packing {

constexpr int kScanWarps = 32, kScanThreads = 32 * kScanWarps;
constexpr int kScanned = 4;  // rows of a thread at a time

// counts[row]: how many columns the row keeps. A warp for each row. pieces: every row of the mask is whole pieces of 16
// bytes, at a multiple of 16, and every bit is a column.
__global__ void __launch_bounds__(kThreads) count_kernel(Mask mask, bool pieces, int64_t* counts) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= mask.rows) return;
  const uint8_t* const bits = mask.row(row);
  const int width = static_cast<int>(packed_width(mask.columns));
  int count = 0;
  if (pieces) {
#pragma unroll 4
    for (int piece = lane; piece < width / 16; piece += 32) {
      const uint4 four = reinterpret_cast<const uint4*>(bits)[piece];  // [128 columns]
      count += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
    }
  } else {
    for (int byte = lane; byte < width; byte += 32) count += __popc(bits[byte] & column_bits(mask.columns - 8 * byte));
  }
  count = inclusive_sum(count);
  if (lane == 31) counts[row] = count;
}

// counts become their exclusive prefix sums, by one block. *total is the sum of all counts and may be memory of the
// host.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t* counts, int64_t rows, int64_t* total) {
  __shared__ int64_t sums[kScanWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;
  for (int64_t begin = 0; begin < rows; begin += kScanThreads * kScanned) {
    const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kScanned;
    int64_t own[kScanned], sum = 0;
#pragma unroll
    for (int i = 0; i < kScanned; ++i) {
      own[i] = first + i < rows ? counts[first + i] : 0;  // [4 rows]
      sum += own[i];
    }
    const int64_t here = inclusive_sum(sum);
    if (lane == 31) sums[warp] = here;
    __syncthreads();
    const int64_t warps = inclusive_sum(sums[lane]);
    int64_t place = before + __shfl_sync(kAllLanes, warps - sums[lane], warp) + here - sum;
#pragma unroll
    for (int i = 0; i < kScanned; ++i) {
      if (first + i < rows) counts[first + i] = place;
      place += own[i];
    }
    before += __shfl_sync(kAllLanes, warps, 31);
    __syncthreads();
  }
  if (threadIdx.x == 0) *total = before;
}

// *largest, which is 0 before: the most columns that a group of kM keeps. A maximum is the same in any order.
template <int kM>
__global__ void __launch_bounds__(kThreads) largest_kernel(Mask mask, unsigned long long* largest) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= mask.rows) return;
  const uint8_t* const bits = mask.row(row);
  const int width = static_cast<int>(packed_width(mask.columns));
  const auto load = [&](int at) { return at < width ? bits[at] & column_bits(mask.columns - 8 * at) : 0; };
  int most = 0;
  for (int at = lane; at < width; at += 32) {
    const unsigned byte = load(at);
    if (kM == 4) {
      most = max(most, max(__popc(byte & 0xfu), __popc(byte >> 4)));
    } else if (kM == 8) {
      most = max(most, __popc(byte));
    } else {
      most = max(most, __popc(byte) + __popc(load(at ^ 1)));
    }
  }
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, delta));
  if (lane == 0) atomicMax(largest, static_cast<unsigned long long>(most));
}

}  // namespace losa::packing
