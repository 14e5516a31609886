// How a warp goes along a row of a packed weight: 256 columns a step, a byte of the mask for each lane.
#pragma once

#include "common/bits.h"
#include "cuda/launch.h"

namespace losa {

constexpr int kStepColumns = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of the values of the lanes up to this one.
template <class Number>
__device__ __forceinline__ Number inclusive_sum(Number value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const Number from = __shfl_up_sync(kAllLanes, value, delta);
    if (lane >= delta) value += from;
  }
  return value;
}

// Eight elements of a row, which move in as few accesses as their alignment allows.
template <class Element>
struct alignas(sizeof(Element) == 1 ? 8 : 16) Eight {
  Element at[8];
};

// The index of a row's first value. Offsets from a damaged file must not lead out of the buffer.
__device__ __forceinline__ int64_t first_value(const int64_t* offsets, int64_t row, int64_t length, int64_t total) {
  const int64_t first = offsets != nullptr ? offsets[row] : row * length;
  return first < 0 ? 0 : first > total ? total : first;
}

}  // namespace losa
