// Scores that selection, Wanda and the column sweep must compute alike.
#pragma once

#include "cuda/launch.h"

namespace losa {

constexpr int kInfinityKey = 0x7f800000;

// A score >= 0 as an integer of the same order: the float's bits. -0.0 counts as 0, and NaN is above every number.
__device__ __forceinline__ int score_key(float score) {
  return __float_as_int(score) & 0x7fffffff;
}

// w / u from u and 1 / u in three steps without a branch. In all but very rare cases this is the rounded quotient
// (Markstein). It is exact where the quotient is a float, and NaN where the quotient is infinite.
__device__ __forceinline__ float quotient(float weight, float diagonal, float inverse) {
  const float guess = __fmul_rn(weight, inverse);
  return __fmaf_rn(__fmaf_rn(-guess, diagonal, weight), inverse, guess);
}

// The key of (w / u)^2; the NaN of an infinite quotient counts as infinity.
__device__ __forceinline__ int sweep_key(float weight, float diagonal, float inverse) {
  const float scaled = quotient(weight, diagonal, inverse);
  return min(score_key(__fmul_rn(scaled, scaled)), kInfinityKey);
}

// Bit i: keys[i] is among the `count` smallest of the kM keys. Of equal keys the lowest index comes first.
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
