// How packing goes along a row. A unit is neighbouring columns, which a lane moves in one access. In an iteration a
// warp takes four units of each lane, one in each step. One prefix sum says where the values of an iteration go.
// Elements are moved as bits, so that every bit pattern survives.
#pragma once

#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/machine.h"
#include "cuda/packed_rows.h"

namespace losa::packing {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kSteps = 4;  // units of a lane in an iteration

// Elements by their size in bytes, so that the kernels' names in a profile and in ptxas's table say the size.
template <int kSize>
struct OfSize;
template <>
struct OfSize<1> {
  using Element = uint8_t;
};
template <>
struct OfSize<2> {
  using Element = uint16_t;
};
template <>
struct OfSize<4> {
  using Element = uint32_t;
};
template <>
struct OfSize<8> {
  using Element = uint64_t;
};

// Elements of 16 bytes (a piece); columns of a unit (all in one byte of the mask), of a step, and of an iteration.
template <int kSize>
struct Columns {
  static constexpr int kPiece = 16 / kSize, kUnit = kSize == 1 ? 8 : kPiece;
  static constexpr int kStep = 32 * kUnit, kIteration = kSteps * kStep;
};

struct Mask {
  const uint8_t* bits;  // (rows, stride)
  int64_t stride;
  int64_t rows;
  int columns;

  __device__ const uint8_t* row(int64_t index) const { return bits + index * stride; }
};

// Which part of which row a warp takes: 2^shares warps, 8 at most, take `slice` columns of a row each.
struct Slices {
  int shares;
  int slice;  // a multiple of an iteration's columns

  __device__ int64_t row() const {
    return static_cast<int64_t>(blockIdx.x) * (kWarps >> shares) + static_cast<int>(threadIdx.x / 32 >> shares);
  }
  __device__ int begin() const { return static_cast<int>(threadIdx.x / 32 & ((1u << shares) - 1)) * slice; }
};

// The elements of a unit, as they are in memory.
template <int kSize>
struct Unit {
  using Element = typename OfSize<kSize>::Element;
  static constexpr int kColumns = Columns<kSize>::kUnit;
  unsigned words[kColumns * kSize / 4];

  __device__ __forceinline__ Element get(int j) const {
    if constexpr (kSize == 8) {
      return words[2 * j] | static_cast<uint64_t>(words[2 * j + 1]) << 32;
    } else {
      return static_cast<Element>(words[j * kSize / 4] >> (j * kSize % 4 * 8));
    }
  }

  // Sets element j, which was 0.
  __device__ __forceinline__ void put(int j, Element element) {
    if constexpr (kSize == 8) {
      words[2 * j] = static_cast<unsigned>(element);
      words[2 * j + 1] = static_cast<unsigned>(element >> 32);
    } else {
      words[j * kSize / 4] |= static_cast<unsigned>(element) << (j * kSize % 4 * 8);
    }
  }

  // Elements whose bit is set become 0.
  __device__ __forceinline__ void clear(unsigned bits) {
    const Unit before = *this;
#pragma unroll
    for (unsigned& word : words) word = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) put(j, (bits >> j & 1u) != 0 ? Element{0} : before.get(j));
  }

  __device__ __forceinline__ void load(const Element* from) {
    if constexpr (kSize == 1) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);  // [kUnit]
      words[0] = two.x, words[1] = two.y;
    } else {
      const uint4 four = *reinterpret_cast<const uint4*>(from);  // [kUnit]
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
  }

  // Only the first `left` columns, which may be none.
  __device__ __forceinline__ void load_part(const Element* from, int left, bool aligned) {
    if (aligned && left >= kColumns) return load(from);
#pragma unroll
    for (unsigned& word : words) word = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j < left) put(j, from[j]);
    }
  }

  __device__ __forceinline__ void store(Element* to) const {
    if constexpr (kSize == 1) {
      *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
    } else {
      *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
    }
  }

  __device__ __forceinline__ void store_part(Element* to, int left, bool aligned) const {
    if (aligned && left >= kColumns) return store(to);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (j < left) to[j] = get(j);
    }
  }
};

// The first column of a lane's unit of a step, counted from the iteration's first column.
template <int kSize>
__device__ __forceinline__ int unit_column(int step) {
  return step * Columns<kSize>::kStep + static_cast<int>(threadIdx.x % 32) * Columns<kSize>::kUnit;
}

// The units of an iteration whose first column is at `from`, of a row with `left` columns from there on.
template <int kSize>
__device__ __forceinline__ void load_units(Unit<kSize> (&units)[kSteps], const typename OfSize<kSize>::Element* from,
                                           int left, bool aligned) {
  if (aligned && left >= Columns<kSize>::kIteration) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) units[s].load(from + unit_column<kSize>(s));  // [32 lanes, kUnit]
  } else {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      units[s].load_part(from + unit_column<kSize>(s), left - unit_column<kSize>(s), aligned);
    }
  }
}

// The mask's byte of a lane's unit in each step. It is not used before it is needed, so that its loads stay under way.
template <int kSize>
struct Bytes {
  unsigned at[kSteps];

  // row: the whole row's mask; first: the iteration's first column; columns: of the row.
  __device__ __forceinline__ void load(const uint8_t* row, int first, int columns) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int column = first + unit_column<kSize>(s);
      at[s] = column < columns ? row[static_cast<unsigned>(column) / 8] : 0u;  // [32 lanes, 8 columns]
    }
  }

  // Clears the bits of columns beyond the row, which has `left` columns from the iteration's first column on.
  __device__ __forceinline__ void cut(int left) {
    if (left >= Columns<kSize>::kIteration) return;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) at[s] &= existing(left - unit_column<kSize>(s) / 8 * 8);
  }

  __device__ __forceinline__ static unsigned existing(int left) { return left <= 0 ? 0u : column_bits(left); }
};

// The bits of the lane's unit, of a byte of the mask.
template <int kSize>
__device__ __forceinline__ unsigned unit_bits(unsigned byte) {
  constexpr int kUnit = Columns<kSize>::kUnit;
  return kUnit == 8 ? byte : byte >> (threadIdx.x * kUnit % 8) & ((1u << kUnit) - 1);
}

// The number of bits in each byte.
__device__ __forceinline__ unsigned bytes_counts(unsigned bits) {
  unsigned word = bits - (bits >> 1 & 0x55555555u);
  word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
  return (word + (word >> 4)) & 0x0f0f0f0fu;
}

// Where an iteration's values go, counted from its first value.
struct Places {
  unsigned before;       // byte s: values of step s in the lanes before this one, at most 31 * 8
  unsigned ends, tails;  // byte s of ends + byte s of tails: values of step s in all lanes

  // Byte s of bits: the mask of this lane's unit of step s. By all lanes.
  __device__ __forceinline__ explicit Places(unsigned bits) {
    const int lane = threadIdx.x % 32;
    const unsigned counts = bytes_counts(bits);
    const unsigned shifted = __shfl_up_sync(kAllLanes, counts, 1);
    before = inclusive_sum(lane == 0 ? 0u : shifted);
    ends = __shfl_sync(kAllLanes, before, 31);
    tails = __shfl_sync(kAllLanes, counts, 31);
  }

  // Values of the first `steps` steps.
  __device__ __forceinline__ int sum(int steps) const {
    const unsigned ones = steps == 0 ? 0u : 0x01010101u >> (8 * (4 - steps));
    return static_cast<int>(add_bytes(add_bytes(0, ends, ones), tails, ones));
  }

  // The place of the first value of this lane's unit of step s.
  __device__ __forceinline__ int of(int s) const { return sum(s) + static_cast<int>(before >> (8 * s) & 0xffu); }
};

}  // namespace losa::packing
