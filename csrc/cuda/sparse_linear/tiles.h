// The tile layout of a packed weight of 16-bit values, private to the GPU: losa_kernels/sparse_linear/TILES.md has it
// byte by byte. Here are its sizes, and what the kernels that write tiles and the kernels that read them share.
//
// A tile has 16 rows and 64 columns. It holds 8 nibbles of the mask for each lane (g, t) = (lane / 4, lane % 4): nibble
// i stands for row g + 8 * (i / 2 % 2) and for column 32 * (i / 4) + 8 * t + 4 * (i % 2) and the next three, so that a
// byte of the lane's word is a byte of the row's mask. For mma.m16n8k16 the tile's columns are taken in another order:
// in the k-step 2 * (i / 4) + i % 2, these four columns are k = 2t, 2t + 1, 2t + 8 and 2t + 9 of lane t.
#pragma once

#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/machine.h"
#include "cuda/packed_rows.h"

namespace losa::sparse_linear {

constexpr int kTileRows = 16;
constexpr int kTileColumns = 64;
constexpr int kChunkTiles = 4;  // tiles whose masks and values lie together, so that one copy brings them
constexpr int kChunkColumns = kChunkTiles * kTileColumns;
constexpr int kTileMaskBytes = 32 * 4;
constexpr int kTileNibbles = 8;
constexpr int kCopyUnit = 16;  // bytes: a copy's begin and length are multiples of this

// A weight (rows, columns) in tiles.
struct Tiles {
  const uint8_t* data;
  const int64_t* offsets;  // (groups * chunks + 1,): where each chunk begins, and the end, in units of kCopyUnit bytes
  int64_t rows;
  int columns;

  LOSA_HOST_DEVICE constexpr int64_t groups() const { return (rows + kTileRows - 1) / kTileRows; }
  LOSA_HOST_DEVICE constexpr int tiles() const { return (columns + kTileColumns - 1) / kTileColumns; }
  LOSA_HOST_DEVICE constexpr int chunks() const { return (tiles() + kChunkTiles - 1) / kChunkTiles; }
  LOSA_HOST_DEVICE constexpr int tiles_of(int chunk) const {
    const int left = tiles() - chunk * kChunkTiles;
    return left < kChunkTiles ? left : kChunkTiles;
  }
};

// How many bits each nibble has, in its place.
__device__ __forceinline__ unsigned count_nibbles(unsigned word) {
  word -= word >> 1 & 0x55555555u;
  return (word & 0x33333333u) + (word >> 2 & 0x33333333u);
}

// Where a tile's values lie: for each nibble how many values the lanes up to this one have, and how many all lanes
// have. Each number is a byte; even nibbles are in element 0, odd nibbles in element 1.
struct TilePlaces {
  unsigned through[2], total[2];

  // By all lanes.
  __device__ __forceinline__ explicit TilePlaces(unsigned word) {
    // Two lanes have at most 8 of a nibble, which 4 bits hold; 32 lanes have 128, which a byte holds.
    unsigned pair = count_nibbles(word);
    add_from_below<1>(pair);
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      unsigned sum = pair >> 4 * odd & 0x0f0f0f0fu;
      add_from_below<2>(sum);
      add_from_below<4>(sum);
      add_from_below<8>(sum);
      add_from_below<16>(sum);
      through[odd] = sum;
      total[odd] = __shfl_sync(kAllLanes, through[odd], 31);
    }
  }

  // Of nibble i: the index behind the lane's last value, and the number of values of all lanes.
  __device__ __forceinline__ unsigned end_of(int i) const { return through[i % 2] >> i / 2 * 8 & 0xff; }
  __device__ __forceinline__ unsigned total_of(int i) const { return total[i % 2] >> i / 2 * 8 & 0xff; }
};

}  // namespace losa::sparse_linear
