// What selection.cu, wanda.cu and column_sweep.cu must compute alike.
#pragma once

#include "cuda/launch.h"

namespace losa {

constexpr int kInfinityKey = 0x7f800000;

// A score's order as an integer: the bits of a float >= 0; -0.0 counts as 0, NaN above everything.
__device__ __forceinline__ int score_key(float score) {
  return __float_as_int(score) & 0x7fffffff;
}

// w / u from u and 1 / u in three steps without a branch: the rounded quotient but for the rarest of cases (Markstein),
// exact where the quotient is a float, and NaN where it is infinite.
__device__ __forceinline__ float quotient(float weight, float diagonal, float inverse) {
  const float guess = __fmul_rn(weight, inverse);
  return __fmaf_rn(__fmaf_rn(-guess, diagonal, weight), inverse, guess);
}

// (w / u)^2; an infinite quotient's NaN counts as what it stands for.
__device__ __forceinline__ int sweep_key(float weight, float diagonal, float inverse) {
  const float scaled = quotient(weight, diagonal, inverse);
  return min(score_key(__fmul_rn(scaled, scaled)), kInfinityKey);
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
