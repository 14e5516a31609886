// What selection.cu, wanda.cu and column_sweep.cu must compute alike.
#pragma once

#include "common/launch.h"

namespace losa {

// A score's order as an integer: the bits of a float >= 0; -0.0 counts as 0, NaN above everything.
__device__ __forceinline__ int score_key(float score) {
  return __float_as_int(score) & 0x7fffffff;
}

// (w / u)^2
__device__ __forceinline__ int sweep_key(float weight, float diagonal) {
  const float scaled = __fdiv_rn(weight, diagonal);
  return score_key(scaled * scaled);
}

// Bit i: keys[i] is among the `count` smallest of kM, ties lowest index first.
template <int kM>
__device__ __forceinline__ unsigned smallest_of(const int (&keys)[kM], int count) {
  unsigned chosen = 0;
#pragma unroll
  for (int j = 0; j < kM; ++j) {
    int before = 0;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      if (i < j) before += keys[i] <= keys[j];
      if (i > j) before += keys[i] < keys[j];
    }
    if (before < count) chosen |= 1u << j;
  }
  return chosen;
}

}  // namespace losa
