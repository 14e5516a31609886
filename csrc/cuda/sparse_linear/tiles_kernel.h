// The tiles kernel: y = x W^T from a weight in tiles (tiles.h), for up to 16 rows of x of the values' 16-bit type.
//
// A block has 16 rows of the weight, and its warps take the chunks of these rows in turn. A chunk's mask and values are
// one piece of memory, which one bulk copy brings to shared memory several chunks ahead of the products. The first
// copies are requested before the kernel waits for the kernels before it, as weights are constant. A warp needs no
// other warp until the sums of all warps are added up, always in the same order.
//
// For every nibble of the mask a lane reads 3 values: the last value that is its own and the two values before it,
// wherever they are. It reads the value before these only if all 4 columns are kept. One of 16 permutations, from
// shared memory, puts the values into their columns with zeros between; where fewer columns are kept the fourth value
// is zero. The result is the lane's part of A. The lane's part of B is 8 columns of row g of x for two k-steps, 16
// bytes. Columns of D are rows of x: if the batch is smaller, the other columns of B may hold anything, as nothing
// reads their D.
//
// By arithmetic: in the time in which an H200 brings a tile of 70 % zeros from memory, a multiprocessor can do 45
// accesses of a warp to shared memory (shuffles among them), 90 integer instructions and 180 of all kinds. The kernel
// takes about 48, 50 and 177.
#pragma once

#include "cuda/sparse_linear/task.h"
#include "cuda/sparse_linear/tiles.h"

namespace losa::sparse_linear {

constexpr int kTileWarps = 8;      // the most warps of a block
constexpr int kTileBlocks = 3;     // blocks that a multiprocessor's registers allow
constexpr int kTileStages = 4;     // the most stages of a warp
constexpr int kStageHead = 16;     // bytes of a stage before its chunk: the barrier that tells when the chunk is there
constexpr int kPermutations = 64;  // bytes of a warp's permutations

// How a block is made up. Functions: places in its shared memory, in bytes, where the kernel takes `batch` rows of x.
struct TileShape {
  int warps, stages;  // warps of a block; chunks of a warp that are there or on their way
  int stage_bytes;    // of a head and the largest chunk

  LOSA_HOST_DEVICE constexpr int sums_at() const { return warps * kPermutations; }
  LOSA_HOST_DEVICE constexpr int stages_at(int batch) const {
    return sums_at() + warps * kTileRows * batch * static_cast<int>(sizeof(float));
  }
  LOSA_HOST_DEVICE constexpr int bytes(int batch) const { return stages_at(batch) + warps * stages * stage_bytes; }
};

struct TileTask {
  Tiles tiles;
  const void* x;     // (batch, x_stride): rows at multiples of 16 bytes, zeros up to a multiple of kTileColumns
  int64_t x_stride;  // in elements
  int batch;
  const void* bias;  // (rows,) or null
  FloatType bias_type;
  void* y;  // (batch, rows), dense, of the dtype of x
  TileShape shape;
  // 2 in each of the bytes: as constants they would be loaded anew for every tile.
  unsigned twice[4] = {2u, 2u << 8, 2u << 16, 2u << 24};
};

// For 4 columns of which `kept` has a bit for each: where their bytes are in the last 4 values. Number 0 is the last
// value; where fewer columns are kept, number 3 is zero. Two times 4 hex digits.
__device__ __forceinline__ unsigned permutation_from_behind(unsigned kept) {
  unsigned digits = 0;
  for (int column = 3; column >= 0; --column) {
    const unsigned value = (kept >> column & 1u) != 0 ? __popc(kept >> column) - 1 : 3;
    digits = digits << 8 | (2 * value + 1) << 4 | 2 * value;
  }
  return digits;
}

// A warp's chunks on their way to its stages of shared memory: in turn number i the warp has chunk warp + i * warps of
// the group. All functions are called by all lanes.
struct ChunkStream {
  const uint8_t* from;  // where the chunk of this lane's turn begins: 32 lanes look 32 turns ahead
  unsigned bytes;       // of this chunk, 0 where there is none
  Shared stage, end;    // the stage that is read next; the end of all stages
  unsigned parity;      // of the barrier of `stage`
  int requested;        // turns whose chunk was requested
  int lane;

  __device__ __forceinline__ void start(const TileTask& task, Shared stages, int warp, int own_lane) {
    lane = own_lane;
    const TileShape& shape = task.shape;
    stage = stages + warp * shape.stages * shape.stage_bytes;
    end = stage + shape.stages * shape.stage_bytes;
    requested = 0;
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
    for (Shared at = stage; at != end; at += shape.stage_bytes) request(task, warp, at);
  }

  // Waits for the next chunk and returns where it is.
  __device__ __forceinline__ Shared wait(int stages) const {
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

  // After the last read of the chunk: requests another chunk into its stage.
  __device__ __forceinline__ void release(const TileTask& task, int warp) {
    __syncwarp();
    request(task, warp, stage);
    stage += task.shape.stage_bytes;
    if (stage == end) {
      stage -= task.shape.stages * task.shape.stage_bytes;
      parity ^= 1;
    }
  }

 private:
  __device__ __forceinline__ void request(const TileTask& task, int warp, Shared to) {
    const int owner = requested % 32;
    if (owner == 0) load_places(task, warp + (requested + lane) * task.shape.warps);
    ++requested;
    if (has_bulk_copies()) {
      if (lane == owner && bytes != 0) copy_bulk(to + kStageHead, from, bytes, to);
    } else {
      const auto begin =
          reinterpret_cast<const uint8_t*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(from), owner));
      const unsigned count = __shfl_sync(kAllLanes, bytes, owner);
#pragma unroll 1
      for (unsigned at = kCopyUnit * lane; at < count; at += kCopyUnit * 32)
        copy_async(to + kStageHead + at, begin + at);
      // A group of copies for every turn, so that the number of groups on their way tells which chunks have come.
      commit_copies();
    }
  }

  // The places of the next 32 turns' chunks, so that a request waits for no load.
  __device__ __forceinline__ void load_places(const TileTask& task, int chunk) {
    bytes = 0;
    const int chunks = task.tiles.chunks();
    if (chunk >= chunks) return;
    const int64_t* const offsets = task.tiles.offsets + (static_cast<int64_t>(blockIdx.x) * chunks + chunk);
    const int64_t begin = offsets[0];  // [32 lanes]
    from = task.tiles.data + begin * kCopyUnit;
    bytes = static_cast<unsigned>(offsets[1] - begin) * kCopyUnit;
  }
};

// A lane's 8 columns of x for two k-steps, twice, if `wanted`. If not, B keeps what it had, for columns of D that
// nothing reads.
__device__ __forceinline__ void load_x(unsigned (&x)[2][4], const uint16_t* from, bool wanted) {
  if (!wanted) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 eight = *reinterpret_cast<const uint4*>(from + 32 * half);  // [8 rows g, 4 lanes t, 8] of [8, 32]
    x[half][0] = eight.x;
    x[half][1] = eight.y;
    x[half][2] = eight.z;
    x[half][3] = eight.w;
  }
}

// d += the products of a tile. values: where the tile's values begin; afterwards, where the next tile's values begin.
template <FloatType kValue, int kColumnTiles>
__device__ __forceinline__ void multiply_one_tile(Shared mask, Shared& values, Shared permutations,
                                                  const unsigned (&twice)[4], const unsigned (&x)[kColumnTiles][2][4],
                                                  float (&d)[kColumnTiles][4]) {
  const unsigned word = load_shared<4>(mask);  // [32 lanes, 8 nibbles]
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
      for (int n = 0; n < kColumnTiles; ++n) {
        const unsigned b[2] = {x[n][half][2 * odd], x[n][half][2 * odd + 1]};
        multiply_tile<kValue == FloatType::kHalf>(d[n], a[odd], b);
      }
    }
  }
}

// y of a block's 16 rows from the sums of its warps, (warps, kBatch, 16).
template <FloatType kValue, int kBatch>
__device__ __forceinline__ void store_tile_sums(const TileTask& task, const float* sums) {
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTileRows;
#pragma unroll 1
  for (int at = threadIdx.x; at < kTileRows * task.batch; at += blockDim.x) {
    const int b = at / kTileRows;
    const int64_t row = first_row + at % kTileRows;
    if (row >= task.tiles.rows) continue;
    float sum = 0.0f;
#pragma unroll 1
    for (int warp = 0; warp < task.shape.warps; ++warp) sum += sums[warp * kTileRows * kBatch + at];
    if (task.bias != nullptr) sum += load_bias(task.bias, task.bias_type, row);
    store_element<kValue>(task.y, b * task.tiles.rows + row, sum);
  }
}

// kBatch: rows of x that a block multiplies, 8 or 16. d, sums: D of each 8 rows of x.
template <FloatType kValue, int kBatch>
__global__ void __launch_bounds__(32 * kTileWarps, kTileBlocks) tiles_kernel(TileTask task) {
  LOSA_DYNAMIC_SHARED(unsigned char, memory);
  constexpr int kColumnTiles = kBatch / 8;
  const TileShape& shape = task.shape;
  // A shuffle tells the compiler that the whole warp agrees.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0);
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
  // (lane & 32) is 0. Without it the address is the same in the whole warp, and every use moves it to the lanes.
  const Shared begin = shared_address(memory), permutations = begin + warp * kPermutations + (lane & 32);
  if (lane < 16) store_shared<4>(permutations + 4 * lane, permutation_from_behind(lane));

  // Request the first chunks, before the kernels before this one are complete.
  ChunkStream stream;
  stream.start(task, begin + shape.stages_at(kBatch), warp, lane);
  let_next_kernel_start();
  wait_for_kernels_before();

  float d[kColumnTiles][4] = {};
  unsigned x[kColumnTiles][2][4] = {};
  const uint16_t* x_from[kColumnTiles];  // the lane's 8 of 64 columns of row g of x
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    x_from[n] = static_cast<const uint16_t*>(task.x) + (g + 8 * n) * task.x_stride + 8 * t;
    x_from[n] += warp * kChunkColumns;
  }
  const int tiles_ahead = kChunkTiles * shape.warps;
  __syncwarp();
#pragma unroll 1
  for (int left = task.tiles.tiles() - kChunkTiles * warp; left > 0; left -= tiles_ahead) {  // tiles from this chunk on
    const int tiles = min(left, kChunkTiles);
    const Shared chunk = stream.wait(shape.stages);
    Shared mask = chunk + 4 * lane, values = chunk + tiles * kTileMaskBytes;
#pragma unroll 1
    for (int tile = tiles; tile > 0; --tile, mask += kTileMaskBytes) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        load_x(x[n], x_from[n], g + 8 * n < task.batch);
        x_from[n] += kTileColumns;
      }
      multiply_one_tile<kValue>(mask, values, permutations, task.twice, x, d);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) x_from[n] += kTileColumns * (tiles_ahead - kChunkTiles);
    stream.release(task, warp);
  }

  // Add up the sums of the warps.
  float* const sums = reinterpret_cast<float*>(memory + shape.sums_at());
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // D[g + 8 * (i / 2)][2t + i % 2]
      const int column = 8 * n + 2 * t + i % 2, row = g + i / 2 * 8;
      sums[(warp * kBatch + column) * kTileRows + row] = d[n][i];
    }
  }
  __syncthreads();
  store_tile_sums<kValue, kBatch>(task, sums);
}

}  // namespace losa::sparse_linear
