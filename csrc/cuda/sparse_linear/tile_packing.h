// Kernels from packed rows to tiles, and from tiles to the dense weight; the layout is in tiles.h. They run once a
// weight, when it is loaded: a warp takes the 16 rows of a group from left to right.
#pragma once

#include "cuda/sparse_linear/tiles.h"

namespace losa::sparse_linear {

constexpr int kTilePackWarps = 4;

// A packed weight (rows, columns) of 16-bit values, as its file has it.
struct PackedRows {
  const uint16_t* values;
  int64_t total;
  const int64_t* offsets;  // (rows,): each row's first value; null if all rows have `length` values
  int64_t length;
  const uint8_t* mask;  // (rows, packed_width(columns))
  int64_t rows;
  int columns;
};

// The 64 columns of a tile of a row's mask; zeros beyond its end.
__device__ __forceinline__ unsigned long long tile_mask(const PackedRows& weight, int64_t row, int tile) {
  unsigned long long bits = 0;
  if (row >= weight.rows) return bits;
  const uint8_t* const from = weight.mask + row * packed_width(weight.columns) + tile * (kTileColumns / 8);
  const int left = weight.columns - tile * kTileColumns;
#pragma unroll 1
  for (int byte = 0; byte < kTileColumns / 8 && 8 * byte < left; ++byte) {
    bits |= static_cast<unsigned long long>(from[byte] & column_bits(left - 8 * byte)) << 8 * byte;  // [8 columns]
  }
  return bits;
}

// A lane's word of a tile from the masks of its two rows.
__device__ __forceinline__ unsigned tile_word(const unsigned long long (&rows)[2], int t) {
  unsigned word = 0;
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    word |= static_cast<unsigned>(rows[byte % 2] >> (32 * (byte / 2) + 8 * t) & 0xff) << 8 * byte;
  }
  return word;
}

// sizes: of each chunk, in units of kCopyUnit bytes, (groups, chunks). A warp for each chunk, two lanes for each row.
__global__ void __launch_bounds__(32 * kTilePackWarps)
    count_tiles_kernel(PackedRows weight, Tiles tiles, int64_t* sizes) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kTilePackWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (at >= tiles.groups() * tiles.chunks()) return;
  const int64_t row = at / tiles.chunks() * kTileRows + lane / 2;
  const int chunk = static_cast<int>(at % tiles.chunks()), count = tiles.tiles_of(chunk);
  int kept = 0;
#pragma unroll 1
  for (int tile = lane % 2; tile < count; tile += 2) {
    kept += __popcll(tile_mask(weight, row, chunk * kChunkTiles + tile));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) kept += __shfl_xor_sync(kAllLanes, kept, distance);
  if (lane == 0) sizes[at] = (count * kTileMaskBytes + 2 * kept + kCopyUnit - 1) / kCopyUnit;
}

// Fills tiles.data; tiles.offsets are the sums of the sizes. A warp for each group of rows.
__global__ void __launch_bounds__(32 * kTilePackWarps)
    write_tiles_kernel(PackedRows weight, Tiles tiles, uint8_t* data) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kTilePackWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (group >= tiles.groups()) return;
  int64_t next[2];  // of each row's values
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = group * kTileRows + g + 8 * half;
    next[half] = row < weight.rows ? first_value(weight.offsets, row, weight.length, weight.total) : 0;
  }
  int64_t to = 0, end = 0;  // the places in data of the chunk's next value and behind its last
#pragma unroll 1
  for (int tile = 0; tile < tiles.tiles(); ++tile) {
    const int chunk = tile / kChunkTiles, inside = tile % kChunkTiles;
    const int64_t begin = tiles.offsets[group * tiles.chunks() + chunk] * kCopyUnit;
    if (inside == 0) {
      to = begin + tiles.tiles_of(chunk) * kTileMaskBytes;
      end = tiles.offsets[group * tiles.chunks() + chunk + 1] * kCopyUnit;
    }
    // The tile's mask.
    unsigned long long rows[2];  // [2 rows, 64 columns]
#pragma unroll
    for (int half = 0; half < 2; ++half) rows[half] = tile_mask(weight, group * kTileRows + g + 8 * half, tile);
    const unsigned word = tile_word(rows, t);
    const TilePlaces places(word);
    reinterpret_cast<unsigned*>(data + begin + inside * kTileMaskBytes)[lane] = word;
    // Its values, nibble by nibble.
#pragma unroll
    for (int i = 0; i < kTileNibbles; ++i) {
      const int half = i / 2 % 2, column = 32 * (i / 4) + 8 * t + 4 * (i % 2), kept = __popc(word >> 4 * i & 15u);
      int64_t from = next[half] + __popcll(rows[half] & ((1ull << column) - 1));
      const int64_t at = to + 2 * (static_cast<int>(places.end_of(i)) - kept);
      for (int n = 0; n < kept; ++n, ++from) {
        // A damaged file may lack values; they count as zero.
        const bool stored = at + 2 * n < end && from < weight.total;
        if (at + 2 * n < end) *reinterpret_cast<uint16_t*>(data + at + 2 * n) = stored ? weight.values[from] : 0;
      }
      to += 2 * places.total_of(i);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) next[half] += __popcll(rows[half]);
    if (inside == tiles.tiles_of(chunk) - 1) {
      // Zeros up to the end of the chunk.
      for (int64_t at = to + 2 * lane; at < end; at += 64) *reinterpret_cast<uint16_t*>(data + at) = 0;
    }
  }
}

// dense: (rows, columns). A warp for each chunk.
__global__ void __launch_bounds__(32 * kTilePackWarps) unpack_tiles_kernel(Tiles tiles, uint16_t* dense) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kTilePackWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (at >= tiles.groups() * tiles.chunks()) return;
  const int64_t group = at / tiles.chunks();
  const int chunk = static_cast<int>(at % tiles.chunks()), count = tiles.tiles_of(chunk);
  const uint8_t* const data = tiles.data + tiles.offsets[at] * kCopyUnit;
  const auto* values = reinterpret_cast<const uint16_t*>(data + count * kTileMaskBytes);
#pragma unroll 1
  for (int tile = 0; tile < count; ++tile) {
    const unsigned word = reinterpret_cast<const unsigned*>(data + tile * kTileMaskBytes)[lane];  // [32 lanes, 32 bits]
    const TilePlaces places(word);
#pragma unroll
    for (int i = 0; i < kTileNibbles; ++i) {
      const int64_t row = group * kTileRows + g + i / 2 % 2 * 8;
      const int column = (chunk * kChunkTiles + tile) * kTileColumns + 32 * (i / 4) + 8 * t + 4 * (i % 2);
      const uint16_t* from = values + places.end_of(i) - __popc(word >> 4 * i & 15u);
      values += places.total_of(i);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool kept = (word >> (4 * i + k) & 1u) != 0;
        if (row < tiles.rows && column + k < tiles.columns) dense[row * tiles.columns + column + k] = kept ? *from : 0;
        from += kept;
      }
    }
  }
}

}  // namespace losa::sparse_linear
