// The row kernel: y = x W^T for up to 16 rows of x and every mask, width and type that the window kernel does not take.
// A warp has kRows rows of the packed weight and goes along them 256 columns at a time.
//
// Bytes: a row's values are one contiguous stream. It is copied asynchronously, 16 bytes a lane and some 2 KB ahead,
// into a ring in shared memory, without waiting for the mask. Every byte of the weight comes once from global memory.
//
// Instructions, of which an H100 has 10 for each column in the time that its bytes take at 50 %: a lane expands 8
// columns of each row from the ring with a predicated load for each column. The loads' addresses are sums of the mask's
// bits, which one multiply and one dot product of bytes make. Neighbouring lanes read neighbouring values, so that
// loads meet few bank conflicts (fewer and wider loads would be unaligned). Products of 16-bit values are the diagonal
// of a tensor core tile: of lane (g, t), A holds its columns of two rows as rows g and g + 8, B its columns of x as
// column g, and only D[g][g] and D[g + 8][g] are used. One instruction does 8 products of a lane, x needs no
// conversion, and sums are fp32.
#pragma once

#include <type_traits>

#include "cuda/sparse_linear/task.h"

namespace losa::sparse_linear {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// A row's values on their way through shared memory. Places count from the multiple of 16 bytes in global memory at or
// before the row's first value. Place p lies p % kRing into the ring, and the ring's first 8 elements stand again
// behind its end, so that 8 elements from any place on are neighbours.
template <class Element, int kChunks>
struct ValueStream {
  static constexpr int kSize = sizeof(Element), kPiece = 16 / kSize, kRing = kChunks * kStepColumns, kMirror = 8;

  Shared ring;
  const Element* from;  // this lane's first piece of the next chunk
  int left;             // elements from there to the end of the buffer
  int next, chunks;     // the next chunk to be copied; their number
  unsigned slot;        // of the next chunk in the ring, in bytes

  // Values first to end of `weight`. Returns the place of value `first`.
  __device__ int start(Shared ring_in, const Weight& weight, int64_t first, int64_t end) {
    ring = ring_in;
    const int64_t origin = first / kPiece * kPiece, piece = threadIdx.x % 32 * kPiece;
    from = static_cast<const Element*>(weight.values) + origin + piece;
    constexpr int64_t kMost = int64_t{1} << 30;
    const int64_t all = weight.total - origin - piece;
    left = static_cast<int>(all < kMost ? all : kMost);
    next = 0;
    chunks = end <= first ? 0 : static_cast<int>((end - origin + kStepColumns - 1) / kStepColumns);
    slot = 0;
    return static_cast<int>(first - origin);
  }

  // Requests the next 256 values, unless they would overwrite the chunk of `place`. By all lanes.
  __device__ __forceinline__ void copy(int place) {
    if (next >= min(chunks, static_cast<int>(static_cast<unsigned>(place) / kStepColumns) + kChunks)) return;
    const Shared to = ring + slot + threadIdx.x % 32 * 16;
    copy_chunk(to);
    if (slot == 0 && threadIdx.x % 32 < kMirror / kPiece) copy_piece(to + kRing * kSize, from, left);
    from += kStepColumns;
    left -= kStepColumns;
    ++next;
    slot = slot + kStepColumns * kSize == kRing * kSize ? 0 : slot + kStepColumns * kSize;
  }

 private:
  __device__ __forceinline__ void copy_chunk(Shared to) {
#pragma unroll
    for (int i = 0; i < kStepColumns; i += 32 * kPiece) {
      copy_piece(to + i * kSize, from + i, left - i);  // [32 lanes, kPiece]
    }
  }

  __device__ __forceinline__ static void copy_piece(Shared to, const Element* from, int left) {
    if (left >= kPiece) {
      copy_async(to, from);
    } else {
#pragma unroll 1
      for (int j = 0; j < left; ++j) store_shared<kSize>(to + j * kSize, from[j]);
    }
  }
};

// The mask of a lane's 8 columns of one row and step, and the place of their first value.
struct MaskByte {
  unsigned bits;
  int place;
};

// The mask of 1024 columns of a row, a word for each lane.
struct MaskWindow {
  unsigned word;
  int place;  // of the lane's first value

  // Finds the places of the window's values, of which the first is at `first`. Returns their number. By all lanes.
  __device__ int count(unsigned word_in, int first) {
    word = word_in;
    const int count = __popc(word), sum = inclusive_sum(count);
    place = first + sum - count;
    return __shfl_sync(kAllLanes, sum, 31);
  }

  __device__ MaskByte byte_of(int step) const {
    const int lane = threadIdx.x % 32, from = 8 * step + lane / 4, shift = lane % 4 * 8;
    const unsigned bits = __shfl_sync(kAllLanes, word, from);
    const int before = __shfl_sync(kAllLanes, place, from);
    return {bits >> shift & 0xffu, before + __popc(bits & ((1u << shift) - 1))};
  }

  // The same where all bytes have `per_byte` values; the step's first value is at `first`.
  __device__ MaskByte byte_of(int step, int first, int per_byte) const {
    const int lane = threadIdx.x % 32;
    const unsigned bits = __shfl_sync(kAllLanes, word, 8 * step + lane / 4);
    return {bits >> lane % 4 * 8 & 0xffu, first + lane * per_byte};
  }
};

// The bits of eight columns of a row, zero where the mask is zero; the row's values begin at `from`.
template <int kSize>
__device__ __forceinline__ void expand(Shared from, unsigned byte, unsigned (&w)[8]) {
  // Bits 0..3 to bytes, then byte i = their sum up to bit i; the same for bits 4..7.
  const unsigned low = ((byte & 15u) * 0x00204081u & 0x01010101u) * 0x01010101u;
  const unsigned high = ((byte >> 4) * 0x00204081u & 0x01010101u) * 0x01010101u;
  const Shared half = add_bytes(from, low, static_cast<unsigned>(kSize) << 24);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Shared begin = j < 4 ? from : half;
    const unsigned sums = j < 4 ? low : high;
    const Shared at = j % 4 == 0 ? begin : add_bytes(begin, sums, static_cast<unsigned>(kSize) << (8 * (j % 4 - 1)));
    w[j] = load_if<kSize>(byte & (1u << j), at);
  }
}

// Sums of products of values and x of the same 16-bit type, on tensor cores.
template <FloatType kValue, int kRowsOfWarp, int kBatch>
struct TensorCoreSums {
  static constexpr int kRows = kRowsOfWarp;
  static constexpr FloatType kX = kValue;
  float d[kRows / 2][kBatch][4] = {};

  // w: the lane's 8 columns of each row, from `column` on.
  __device__ void add(const Task& task, const unsigned (&w)[kRows][8], int column) {
    unsigned a[kRows / 2][2][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[r / 2][j / 2][j % 2 * 2 + r % 2] = pair_of(w[r][2 * j], w[r][2 * j + 1]);
    }
    const uint16_t* x = static_cast<const uint16_t*>(task.x) + column;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, x += task.x_stride) {
      uint4 eight = {0, 0, 0, 0};
      if (column < task.weight.columns && (kBatch == 1 || i < task.batch)) {
        eight = *reinterpret_cast<const uint4*>(x);  // [32 lanes, 8 columns] of [batch, 256]
      }
      const unsigned b[2][2] = {{eight.x, eight.y}, {eight.z, eight.w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < kRows / 2; ++r) multiply_tile<kValue == FloatType::kHalf>(d[r][i], a[r][half], b[half]);
      }
    }
  }

  // This lane's part of the sum for row r of the weight and row i of x.
  __device__ float of(int r, int i) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float even = d[r / 2][i][r % 2 * 2], odd = d[r / 2][i][r % 2 * 2 + 1];
    return t != g / 2 ? 0.0f : g % 2 == 0 ? even : odd;
  }
};

// The same with x in fp32, for values of every type.
template <FloatType kValue, int kRowsOfWarp, int kBatch>
struct FloatSums {
  static constexpr int kRows = kRowsOfWarp;
  static constexpr FloatType kX = FloatType::kFloat;
  float sums[kRows][kBatch] = {};

  __device__ void add(const Task& task, const unsigned (&w)[kRows][8], int column) {
    const float* x = static_cast<const float*>(task.x) + column;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, x += task.x_stride) {
      Eight<float> eight{};
      if (column < task.weight.columns && (kBatch == 1 || i < task.batch)) {
        eight = *reinterpret_cast<const Eight<float>*>(x);  // [32 lanes, 8 columns] of [batch, 256]
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[r][i] += widen<kValue>(w[r][j]) * eight.at[j];
      }
    }
  }

  __device__ float of(int r, int i) const { return sums[r][i]; }
};

// Rows of the weight for each warp: x is loaded once for all of them. 16 rows of x leave registers for two.
LOSA_HOST_DEVICE constexpr int rows_of_warp(bool tensor_cores, int batch) {
  return tensor_cores && batch == 8 ? 4 : 2;
}

template <bool kTensorCores, FloatType kValue, int kBatch>
using RowSums = std::conditional_t<kTensorCores, TensorCoreSums<kValue, rows_of_warp(true, kBatch), kBatch>,
                                   FloatSums<kValue, rows_of_warp(false, kBatch), kBatch>>;

// Blocks that a multiprocessor's registers must allow; with fewer blocks each warp has more products on their way.
LOSA_HOST_DEVICE constexpr int blocks_of_multiprocessor(bool tensor_cores, int batch) {
  return batch <= 2 || (tensor_cores && batch == 4) ? 3 : batch == 4 ? 2 : 1;
}

// kCount sums of all lanes: lane i * 32 / kCount returns the i-th. Each exchange halves the sums that a lane still
// holds.
template <int kCount, int kBit = 16>
__device__ __forceinline__ float sum_of_lanes(const float (&sums)[kCount]) {
  if constexpr (kBit == 0) {
    return sums[0];
  } else {
    constexpr int kHalf = kCount > 1 ? kCount / 2 : 1;
    const bool upper = kCount > 1 && (threadIdx.x & kBit) != 0;
    float halves[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = sums[i], high = sums[kCount - kHalf + i];
      halves[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kBit);
    }
    return sum_of_lanes<kHalf, kBit / 2>(halves);
  }
}

// The shared memory of a block: a ring for each row of each warp.
template <class Element, int kRows>
struct RowBuffers {
  // Two 16-bit rows have 8 chunks each; more or wider rows fewer, in the same memory.
  static constexpr int kChunks = 32 / (kRows * static_cast<int>(sizeof(Element)));
  using Stream = ValueStream<Element, kChunks>;
  static constexpr int kStride = Stream::kRing + Stream::kMirror;
  static constexpr int kBytes = kWarps * kRows * kStride * static_cast<int>(sizeof(Element));
};

// Moves `first`, the index of a row's first value, to the first value of columns `begin` on. By all lanes.
template <bool kEqualBytes>
__device__ __forceinline__ void move_to_column(const Weight& weight, const uint8_t* mask, int begin, int lane,
                                               int64_t& first) {
  if (kEqualBytes) {
    first += begin / 8 * weight.per_byte;
  } else if (begin > 0) {
    int before = 0;
#pragma unroll 1
    for (int column = 32 * lane; column < begin; column += kWindowColumns) {
      before += __popc(mask_word(weight, mask, column));  // [32 lanes, 32 columns]
    }
    first += __shfl_sync(kAllLanes, inclusive_sum(before), 31);
  }
}

// y of a block's rows from the partial sums of its warps: partial[group * split + s] are those of slice s.
template <FloatType kX, int kRows, int kBatch>
__device__ __forceinline__ void store_sums(const Task& task, int groups,
                                           const float (&partial)[kWarps][kRows * kBatch]) {
  constexpr int kSums = kRows * kBatch;
  for (int i = threadIdx.x; i < groups * kSums; i += kThreads) {
    const int group = i / kSums, r = i % kSums / kBatch, b = i % kBatch;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * groups + group) * kRows + r;
    if (row >= task.weight.rows || b >= task.batch) continue;
    float sum = 0.0f;
    for (int s = 0; s < task.split; ++s) sum += partial[group * task.split + s][i % kSums];
    if (task.bias != nullptr) sum += load_bias(task.bias, task.bias_type, row);
    store_element<kX>(task.y, b * task.weight.rows + row, sum);
  }
}

// kTensorCores: x has the values' type, of 16 bits; else x is fp32. kEqualBytes: every 8 columns have per_byte values.
template <bool kTensorCores, FloatType kValue, int kBatch, bool kEqualBytes>
__global__ void __launch_bounds__(kThreads, blocks_of_multiprocessor(kTensorCores, kBatch)) row_kernel(Task task) {
  using Sums = RowSums<kTensorCores, kValue, kBatch>;
  constexpr int kRows = Sums::kRows, kSums = kRows * kBatch, kGroup = kSums < 32 ? kSums : 32;
  using Element = ElementBits<kValue>;
  using Buffers = RowBuffers<Element, kRows>;
  __shared__ float partial[kWarps][kSums];
  LOSA_DYNAMIC_SHARED(Element, rings);

  // This warp's rows and columns. A shuffle tells the compiler that the whole warp agrees.
  const Weight& weight = task.weight;
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0);
  const int groups = kWarps / task.split, slice = warp % task.split;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * groups + warp / task.split) * kRows;
  const int begin = slice * task.slice, end = min(begin + task.slice, weight.columns);

  // Find where the rows' values begin, and request the first chunks of them.
  typename Buffers::Stream streams[kRows];
  const uint8_t* masks[kRows];
  int places[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r < weight.rows ? first_row + r : weight.rows - 1;  // beyond: not stored
    masks[r] = weight.mask + row * weight.mask_stride;
    int64_t first = first_value(weight, row);
    const int64_t last = row + 1 < weight.rows ? first_value(weight, row + 1) : weight.total;
    move_to_column<kEqualBytes>(weight, masks[r], begin, lane, first);
    places[r] = streams[r].start(shared_address(rings + (warp * kRows + r) * Buffers::kStride), weight, first, last);
  }
#pragma unroll 1
  for (int chunk = 0; chunk + 1 < Buffers::kChunks; ++chunk) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) streams[r].copy(places[r]);
    commit_copies();
  }

  Sums sums;
  unsigned words[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) words[r] = mask_word(weight, masks[r], begin + 32 * lane);  // [32 lanes, 32 columns]
  // Only the weight is read before the wait: the kernels before may write x, and read what y's memory held.
  wait_for_kernels_before();
  let_next_kernel_start();
#pragma unroll 1
  for (int window = begin; window < end; window += kWindowColumns) {
    // Find the places of this window's values, and request the next window's mask.
    MaskWindow windows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (kEqualBytes) {
        windows[r].word = words[r];
      } else {
        places[r] += windows[r].count(words[r], places[r]);
      }
      words[r] = mask_word(weight, masks[r], window + kWindowColumns + 32 * lane);  // [32 lanes, 32 columns]
    }
    const int steps = min((end - window + kStepColumns - 1) / kStepColumns, kWindowColumns / kStepColumns);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int column = window + step * kStepColumns + 8 * lane;
      MaskByte bytes[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (kEqualBytes) {
          bytes[r] = windows[r].byte_of(step, places[r], weight.per_byte);
          streams[r].copy(places[r]);
          places[r] += 32 * weight.per_byte;
        } else {
          bytes[r] = windows[r].byte_of(step);
          streams[r].copy(__shfl_sync(kAllLanes, windows[r].place, 8 * step));
        }
      }
      commit_copies();
      // A step takes at most 256 values of a row, which end in the chunk after the one where they begin. As each step
      // may copy 256 new ones, that chunk is never in the last Buffers::kChunks - 2 groups.
      wait_copies<Buffers::kChunks - 2>();
      __syncwarp();
      unsigned w[kRows][8];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const unsigned place = bytes[r].place % static_cast<unsigned>(Buffers::Stream::kRing);
        expand<sizeof(Element)>(streams[r].ring + place * sizeof(Element), bytes[r].bits, w[r]);
      }
      sums.add(task, w, column);
      __syncwarp();
    }
  }
  wait_copies<0>();  // copies requested beyond the last step

  // Add up the sums of the lanes, then of the warps that share a group of rows.
#pragma unroll
  for (int at = 0; at < kSums; at += kGroup) {
    float own[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) own[i] = sums.of((at + i) / kBatch, (at + i) % kBatch);
    const float sum = sum_of_lanes(own);
    if (lane % (32 / kGroup) == 0) partial[warp][at + lane / (32 / kGroup)] = sum;
  }
  __syncthreads();
  store_sums<Sums::kX, kRows, kBatch>(task, groups, partial);
}

}  // namespace losa::sparse_linear
