// Elements of a tensor as fp32 numbers in registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/float_type.h"
#include "cuda/machine.h"

namespace losa {

template <FloatType kType>
using ElementBits = std::conditional_t<kType == FloatType::kFloat, uint32_t, uint16_t>;

template <FloatType kType>
__device__ __forceinline__ float widen(unsigned bits) {
  if constexpr (kType == FloatType::kFloat) return __uint_as_float(bits);
  if constexpr (kType == FloatType::kBFloat16) return __uint_as_float(bits << 16);
  return widen_half(static_cast<uint16_t>(bits));
}

template <FloatType kType>
__device__ __forceinline__ ElementBits<kType> narrow(float value) {
  if constexpr (kType == FloatType::kFloat) {
    return __float_as_uint(value);
  } else if constexpr (kType == FloatType::kBFloat16) {
    return narrow_bfloat16(value);
  } else {
    return narrow_half(value);
  }
}

// Rounded to the nearest number that an element can hold.
template <FloatType kType>
__device__ __forceinline__ float rounded(float value) {
  return widen<kType>(narrow<kType>(value));
}

// Elements in 16 bytes.
template <FloatType kType>
constexpr int kPerVector = 16 / float_type_size(kType);

// Element `place`. The load goes past the L1 cache, which the writes of other multiprocessors do not reach.
template <FloatType kType>
__device__ __forceinline__ float load_element(const void* from, int64_t place) {
  return widen<kType>(__ldcg(static_cast<const ElementBits<kType>*>(from) + place));
}

template <FloatType kType>
__device__ __forceinline__ void store_element(void* to, int64_t place, float value) {
  static_cast<ElementBits<kType>*>(to)[place] = narrow<kType>(value);
}

// kCount consecutive elements: one, or 16 bytes at a multiple of 16 bytes.
template <FloatType kType, int kCount>
struct Elements {
  static_assert(kCount == 1 || kCount == kPerVector<kType>);
  float values[kCount];

  __device__ __forceinline__ void load(const void* from, int64_t place) {
    if constexpr (kCount == 1) {
      values[0] = load_element<kType>(from, place);
    } else {
      set(__ldcg(reinterpret_cast<const uint4*>(static_cast<const ElementBits<kType>*>(from) + place)));
    }
  }

  __device__ __forceinline__ void set(uint4 vector) {
    const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
    constexpr int kPerWord = kCount / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const unsigned word = words[i / kPerWord];
      values[i] = widen<kType>(kPerWord == 1 ? word : i % 2 == 0 ? word & 0xffffu : word >> 16);
    }
  }

  __device__ __forceinline__ void store(void* to, int64_t place) const {
    auto* const first = static_cast<ElementBits<kType>*>(to) + place;
    if constexpr (kCount == 1) {
      *first = narrow<kType>(values[0]);
    } else {
      unsigned words[4];
      constexpr int kPerWord = kCount / 4;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kPerWord == 1) {
          words[w] = narrow<kType>(values[w]);
        } else {
          words[w] = pair_of(narrow<kType>(values[2 * w]), narrow<kType>(values[2 * w + 1]));
        }
      }
      *reinterpret_cast<uint4*>(first) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

// The sum over the lanes of a warp, in every lane.
__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

}  // namespace losa
