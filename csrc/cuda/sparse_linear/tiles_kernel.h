// The decode kernel on tiles (tiles.h): y = x W^T for up to 16 rows of x of the values' 16-bit type.
//
// A block has 16 rows of the weight; its warps take the chunks of these rows in turn. A chunk's mask and values are one
// piece of memory, which one bulk copy brings to shared memory, several chunks ahead of the products; the first copies
// are asked for before the kernel waits for those before it, as weights are constant. A warp needs no other warp until
// the sums of all are added up, always in the same order.
//
// For every nibble of the mask a lane reads 3 values, the last that is its own and the two before it, wherever they
// are, and one more before them only if all 4 columns are kept. One of 16 permutations, from shared memory, puts them
// into their columns with zeros between; where fewer columns are kept the fourth value is zero. That is the lane's part
// of A; its part of B is 8 columns of row g of x for two k-steps, 16 bytes. Columns of D are rows of x: what B has
// beyond the batch reaches only columns that are not used.
//
// By arithmetic: in the time in which an H200 brings a tile of 70 % zeros from memory, a multiprocessor can do 45
// accesses of a warp to shared memory (shuffles among them), 90 integer instructions and 180 of all kinds. The kernel
// takes about 48, 50 and 177.
#pragma once

#include "cuda/sparse_linear/task.h"
#include "cuda/sparse_linear/tiles.h"

namespace losa::sparse_linear {

constexpr int kTileWarps = 8;      // of a block at most
constexpr int kTileBlocks = 3;     // that a multiprocessor's registers allow
constexpr int kTileStages = 4;     // of a warp at most
constexpr int kStageHead = 16;     // bytes of a stage before its chunk: the barrier that tells when the chunk is there
constexpr int kPermutations = 64;  // bytes

// What a block's shared memory holds, in bytes from its begin.
struct TileShape {
  int warps, stages;  // warps of a block; chunks of a warp that are there or on their way
  int stage_bytes;    // a head and the largest chunk

  LOSA_HOST_DEVICE constexpr int sums_at() const { return warps * kPermutations; }
  // columns: of the kernel.
  LOSA_HOST_DEVICE constexpr int stages_at(int columns) const {
    return sums_at() + warps * kTileRows * columns * static_cast<int>(sizeof(float));
  }
  LOSA_HOST_DEVICE constexpr int bytes(int columns) const {
    return stages_at(columns) + warps * stages * stage_bytes;
  }
};

struct TileTask {
  Tiles tiles;
  const void* x;     // rows at 16-byte boundaries, of columns rounded up to kTileColumns, zeros there
  int64_t x_stride;  // in elements
  int batch;
  const void* bias;  // may be null
  FloatType bias_value;
  void* y;  // batch x rows, dense, of the dtype of x
  TileShape shape;
  // 2 in each of the bytes: as constants they would be loaded anew for every tile.
  unsigned twice[4] = {2u, 2u << 8, 2u << 16, 2u << 24};
};

// For 4 columns of which `kept` has a bit for each: where their bytes are in their last 4 values, of which the last is
// number 0, and where fewer are kept number 3 is zero. Two times 4 hex digits.
__device__ __forceinline__ unsigned tile_permutation(unsigned kept) {
  unsigned digits = 0;
  for (int column = 3; column >= 0; --column) {
    const unsigned value = (kept >> column & 1u) != 0 ? __popc(kept >> column) - 1 : 3;
    digits = digits << 8 | (2 * value + 1) << 4 | 2 * value;
  }
  return digits;
}

// A warp's chunks on their way to its stages of shared memory: number `turn` of them is chunk warp + turn * warps of
// the group. All functions are called by all lanes.
struct ChunkStream {
  const uint8_t* from;  // of the turn that is this lane's of 32
  unsigned bytes;       // 0 where there is no such chunk
  Shared stage, end;    // the one that is read next; of all
  unsigned parity;      // of its barrier
  int asked;            // turns
  int lane;

  __device__ __forceinline__ void start(const TileTask& task, Shared stages, int warp, int own_lane) {
    lane = own_lane;
    const TileShape& shape = task.shape;
    stage = stages + warp * shape.stages * shape.stage_bytes;
    end = stage + shape.stages * shape.stage_bytes;
    asked = 0;
    parity = 0;
    if (has_bulk_copies()) {
      if (lane == 0) {
#pragma unroll 1
        for (Shared at = stage; at != end; at += shape.stage_bytes) init_barrier(at);
        publish_barriers();
      }
      __syncwarp();
    }
#pragma unroll 1
    for (Shared at = stage; at != end; at += shape.stage_bytes) ask(task, warp, at);
  }

  // Where the next chunk is; it is there.
  __device__ __forceinline__ Shared open(int stages) const {
    if (has_bulk_copies()) {
      wait_barrier(stage, parity);
    } else {
      if (stages == 1) wait_copies<0>();
      if (stages == 2) wait_copies<1>();
      if (stages == 3) wait_copies<2>();
      if (stages == 4) wait_copies<3>();
      __syncwarp();
    }
    return stage + kStageHead;
  }

  // The chunk is read: its stage is for the next one to be asked for.
  __device__ __forceinline__ void close(const TileTask& task, int warp) {
    __syncwarp();
    ask(task, warp, stage);
    stage += task.shape.stage_bytes;
    if (stage == end) {
      stage -= task.shape.stages * task.shape.stage_bytes;
      parity ^= 1;
    }
  }

 private:
  __device__ __forceinline__ void ask(const TileTask& task, int warp, Shared to) {
    const int owner = asked % 32;
    if (owner == 0) look(task, warp + (asked + lane) * task.shape.warps);
    ++asked;
    if (has_bulk_copies()) {
      if (lane == owner && bytes != 0) copy_bulk(to + kStageHead, from, bytes, to);
    } else {
      const auto begin = reinterpret_cast<const uint8_t*>(
          __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(from), owner));
      const unsigned count = __shfl_sync(kAllLanes, bytes, owner);
#pragma unroll 1
      for (unsigned at = kCopied * lane; at < count; at += kCopied * 32) copy_async(to + kStageHead + at, begin + at);
      // A group of copies for every turn, so that how many are still on their way tells which have come.
      commit_copies();
    }
  }

  // 32 turns' places, so that asking waits for no load.
  __device__ __forceinline__ void look(const TileTask& task, int chunk) {
    bytes = 0;
    const int chunks = task.tiles.chunks();
    if (chunk >= chunks) return;
    const int64_t* const offsets = task.tiles.offsets + (static_cast<int64_t>(blockIdx.x) * chunks + chunk);
    const int64_t begin = offsets[0];
    from = task.tiles.data + begin * kCopied;
    bytes = static_cast<unsigned>(offsets[1] - begin) * kCopied;
  }
};

// A lane's 8 columns of x for two k-steps, twice, if `wanted`. Without them B has what it had, for columns of D that
// are not used.
__device__ __forceinline__ void load_x(unsigned (&x)[2][4], const uint16_t* from, bool wanted) {
  if (!wanted) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 eight = *reinterpret_cast<const uint4*>(from + 32 * half);
    x[half][0] = eight.x;
    x[half][1] = eight.y;
    x[half][2] = eight.z;
    x[half][3] = eight.w;
  }
}

// d += the products of a tile, of which `values` are where this tile's begin and, then, where the next one's do.
template <FloatType kValue, int kParts>
__device__ __forceinline__ void multiply_one_tile(Shared mask, Shared& values, Shared permutations,
                                                  const unsigned (&twice)[4], const unsigned (&x)[kParts][2][4],
                                                  float (&d)[kParts][4]) {
  const unsigned word = load_shared<4>(mask);
  const TilePlaces places(word);
  const unsigned kept[2] = {word << 1 & 0x1e1e1e1eu, word >> 3 & 0x1e1e1e1eu};  // times 2
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned a[2][4];
#pragma unroll
    for (int i = 4 * half; i < 4 * half + 4; ++i) {
      const int odd = i % 2;
      const Shared behind = add_bytes(values, places.through[odd], twice[i / 2]);
      const Shared order_at = add_bytes(permutations, kept[odd], twice[i / 2]);
      values = add_bytes(values, places.total[odd], twice[i / 2]);
      const unsigned order = load_shared<4>(order_at);
      const unsigned low = load_shared<2>(behind - 4) * 0x10000u + load_shared<2>(behind - 2);
      unsigned high = load_shared<2>(behind - 6);
      if (order_at == permutations + 4 * 15) high += load_shared<2>(behind - 8) * 0x10000u;
      a[odd][i / 2 % 2] = bytes_of(low, high, order);
      a[odd][i / 2 % 2 + 2] = bytes_of(low, high, order >> 16);
    }
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const unsigned b[2] = {x[part][half][2 * odd], x[part][half][2 * odd + 1]};
        multiply_tile<kValue == FloatType::kHalf>(d[part], a[odd], b);
      }
    }
  }
}

// A block's 16 rows of y from the sums of its warps: 16 x kColumns floats each.
template <FloatType kValue, int kColumns>
__device__ __forceinline__ void store_tile_sums(const TileTask& task, const float* sums) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
#pragma unroll 1
  for (int at = threadIdx.x; at < kTileRows * task.batch; at += blockDim.x) {
    const int b = at / kTileRows;
    const int64_t row = first_row + at % kTileRows;
    if (row >= task.tiles.rows) continue;
    float sum = 0.0f;
#pragma unroll 1
    for (int warp = 0; warp < task.shape.warps; ++warp) sum += sums[warp * kTileRows * kColumns + at];
    if (task.bias != nullptr) sum += load_any(task.bias, task.bias_value, row);
    store_element<kValue>(task.y, b * task.tiles.rows + row, sum);
  }
}

// kColumns: rows of x that a block multiplies, 8 or 16.
template <FloatType kValue, int kColumns>
__global__ void __launch_bounds__(32 * kTileWarps, kTileBlocks) tiles_kernel(TileTask task) {
  LOSA_DYNAMIC_SHARED(unsigned char, memory);
  constexpr int kParts = kColumns / 8;
  const TileShape& shape = task.shape;
  // A shuffle tells the compiler that the whole warp agrees.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0);
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
  // The lane's part of the address is 0; without it the address is the warp's, which every use moves to the lanes.
  const Shared begin = shared_address(memory), permutations = begin + warp * kPermutations + (lane & 32);
  if (lane < 16) store_shared<4>(permutations + 4 * lane, tile_permutation(lane));

  ChunkStream stream;
  stream.start(task, begin + shape.stages_at(kColumns), warp, lane);
  let_next_kernel_start();
  wait_for_kernels_before();

  float d[kParts][4] = {};
  unsigned x[kParts][2][4] = {};
  const uint16_t* columns[kParts];  // [8 of 64] of row g of x
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    columns[part] = static_cast<const uint16_t*>(task.x) + (g + 8 * part) * task.x_stride + 8 * t;
    columns[part] += warp * kChunkColumns;
  }
  const int tiles_ahead = kChunkTiles * shape.warps;
  __syncwarp();
#pragma unroll 1
  for (int left = task.tiles.tiles() - kChunkTiles * warp; left > 0; left -= tiles_ahead) {  // tiles, with this chunk's
    const int tiles = min(left, kChunkTiles);
    const Shared chunk = stream.open(shape.stages);
    Shared mask = chunk + 4 * lane, values = chunk + tiles * kTileMaskBytes;
#pragma unroll 1
    for (int tile = tiles; tile > 0; --tile, mask += kTileMaskBytes) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        load_x(x[part], columns[part], g + 8 * part < task.batch);
        columns[part] += kTileColumns;
      }
      multiply_one_tile<kValue>(mask, values, permutations, task.twice, x, d);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) columns[part] += kTileColumns * (tiles_ahead - kChunkTiles);
    stream.close(task, warp);
  }

  float* const sums = reinterpret_cast<float*>(memory + shape.sums_at());
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // D[g + 8 * (i / 2)][2t + i % 2]
      const int column = 8 * part + 2 * t + i % 2, row = g + i / 2 * 8;
      sums[(warp * kColumns + column) * kTileRows + row] = d[part][i];
    }
  }
  __syncthreads();
  store_tile_sums<kValue, kColumns>(task, sums);
}

}  // namespace losa::sparse_linear
