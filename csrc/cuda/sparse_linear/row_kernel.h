// The decode kernel of sparse_linear.cu: kRows rows of the packed weight for each warp, 256 columns at a time.
//
// Bytes: a row's values are one contiguous stream. It is copied asynchronously, 16 bytes a lane and some 2 KB ahead,
// into a ring in shared memory, without waiting for the mask; every byte of the weight comes once from global memory.
//
// Instructions, of which an H100 has 10 for each column in the time that its bytes take at 50 %: a lane expands 8
// columns of each row from the ring with a predicated load each, whose addresses are sums of the mask's bits that one
// multiply and one dot product of bytes make. Neighbouring lanes read neighbouring values, so that loads meet few bank
// conflicts (fewer and wider loads would be unaligned). Products of 16-bit values are the diagonal of a tensor core
// tile: of lane (g, t), A holds its columns of two rows as rows g and g + 8, B its columns of x as column g, and only
// D[g][g] and D[g + 8][g] are used. One instruction does 8 products of a lane, x needs no conversion, and sums are
// fp32.
#pragma once

#include <type_traits>

#include "cuda/sparse_linear/task.h"

namespace losa::sparse_linear {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

template <FloatType kValue>
struct Stored {
  using Type = uint16_t;
};
template <>
struct Stored<FloatType::kFloat> {
  using Type = float;
};

// A row's values on their way through shared memory. Places count from a 16-byte boundary of global memory at or before
// the row's first value; place p lies p % kRing into the ring, and the ring's first 8 again behind its end, so that 8
// from anywhere are neighbours.
template <class Element, int kChunks>
struct Stream {
  static constexpr int kSize = sizeof(Element), kPiece = 16 / kSize, kRing = kChunks * kStepColumns, kMirror = 8;

  Shared ring;
  const Element* from;  // this lane's first piece of the next chunk
  int left;             // elements from there to the end of the buffer
  int next, chunks;     // to be copied, of all
  unsigned slot;        // of the next, in bytes

  // Returns the place of value `first`.
  __device__ int open(Shared ring_in, const Weight& weight, int64_t first, int64_t end) {
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

  // The next 256 values, unless they would overwrite the chunk of `place`. By all lanes.
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
    for (int i = 0; i < kStepColumns; i += 32 * kPiece) copy_piece(to + i * kSize, from + i, left - i);
  }

  __device__ __forceinline__ static void copy_piece(Shared to, const Element* from, int left) {
    if (left >= kPiece) {
      copy_async(to, from);
    } else {
      const auto* const bits = reinterpret_cast<const std::conditional_t<kSize == 2, uint16_t, unsigned>*>(from);
#pragma unroll 1
      for (int j = 0; j < left; ++j) store_shared<kSize>(to + j * kSize, bits[j]);
    }
  }
};

// What a lane sees of one row and step: the mask of its 8 columns, and the place of their first value.
struct Lane {
  unsigned byte;
  int place;
};

// A window of 1024 columns of a row, a word for each lane.
struct Window {
  unsigned word;
  int place;  // of the lane's first value

  // Returns the number of values in the window. By all lanes.
  __device__ int open(unsigned word_in, int first) {
    word = word_in;
    const int count = __popc(word), sum = inclusive_sum(count);
    place = first + sum - count;
    return __shfl_sync(kAllLanes, sum, 31);
  }

  __device__ Lane step(int step) const {
    const int lane = threadIdx.x % 32, from = 8 * step + lane / 4, shift = lane % 4 * 8;
    const unsigned bits = __shfl_sync(kAllLanes, word, from);
    const int before = __shfl_sync(kAllLanes, place, from);
    return {bits >> shift & 0xffu, before + __popc(bits & ((1u << shift) - 1))};
  }

  // The same where each byte has equally many values, of which the step's begin at `first`.
  __device__ Lane step(int step, int first, int per_byte) const {
    const int lane = threadIdx.x % 32;
    const unsigned bits = __shfl_sync(kAllLanes, word, 8 * step + lane / 4);
    return {bits >> lane % 4 * 8 & 0xffu, first + lane * per_byte};
  }
};

// The bits of eight columns of a row, zero where the mask is; its values begin at `from`.
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
template <FloatType kValue, int kRows, int kBatch>
struct TensorSums {
  using Element = uint16_t;
  static constexpr FloatType kX = kValue;
  float d[kRows / 2][kBatch][4] = {};

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
      if (column < task.weight.columns && (kBatch == 1 || i < task.batch)) eight = *reinterpret_cast<const uint4*>(x);
      const unsigned b[2][2] = {{eight.x, eight.y}, {eight.z, eight.w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int r = 0; r < kRows / 2; ++r) multiply_tile<kValue == FloatType::kHalf>(d[r][i], a[r][half], b[half]);
      }
    }
  }

  // This lane's part of the sum.
  __device__ float of(int r, int i) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float even = d[r / 2][i][r % 2 * 2], odd = d[r / 2][i][r % 2 * 2 + 1];
    return t != g / 2 ? 0.0f : g % 2 == 0 ? even : odd;
  }
};

// The same with x in fp32, and for values in fp32.
template <FloatType kValue, int kRows, int kBatch>
struct FloatSums {
  using Element = typename Stored<kValue>::Type;
  static constexpr FloatType kX = FloatType::kFloat;
  float sums[kRows][kBatch] = {};

  __device__ void add(const Task& task, const unsigned (&w)[kRows][8], int column) {
    const float* x = static_cast<const float*>(task.x) + column;
#pragma unroll
    for (int i = 0; i < kBatch; ++i, x += task.x_stride) {
      Eight<float> eight{};
      if (column < task.weight.columns && (kBatch == 1 || i < task.batch)) {
        eight = *reinterpret_cast<const Eight<float>*>(x);
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
LOSA_HOST_DEVICE constexpr int rows_of(bool tensor, int batch) {
  return tensor && batch == 8 ? 4 : 2;
}

// Blocks that a multiprocessor's registers shall allow; with fewer blocks each warp has more products on their way.
LOSA_HOST_DEVICE constexpr int blocks_of(bool tensor, int batch) {
  return batch <= 2 || (tensor && batch == 4) ? 3 : batch == 4 ? 2 : 1;
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

template <class Element, int kRows>
struct Rings {
  // Two 16-bit rows have 8 chunks each; more or wider rows fewer, in the same memory.
  static constexpr int kChunks = 32 / (kRows * static_cast<int>(sizeof(Element)));
  using Row = Stream<Element, kChunks>;
  static constexpr int kStride = Row::kRing + Row::kMirror;
  static constexpr int kBytes = kWarps * kRows * kStride * static_cast<int>(sizeof(Element));
};

template <bool kTensor, FloatType kValue, int kBatch, bool kFixed>
__global__ void __launch_bounds__(kThreads, blocks_of(kTensor, kBatch)) decode_kernel(Task task) {
  constexpr int kRows = rows_of(kTensor, kBatch), kSums = kRows * kBatch, kGroup = kSums < 32 ? kSums : 32;
  using Sums = std::conditional_t<kTensor, TensorSums<kValue, kRows, kBatch>, FloatSums<kValue, kRows, kBatch>>;
  using Element = typename Sums::Element;
  using Ring = Rings<Element, kRows>;
  constexpr int kChunks = Ring::kChunks;
  __shared__ float partial[kWarps][kSums];
  LOSA_DYNAMIC_SHARED(Element, rings);

  const Weight& weight = task.weight;
  // A shuffle tells the compiler that the whole warp agrees.
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0);
  const int groups = kWarps / task.split, part = warp % task.split;
  const int64_t first_row = (static_cast<int64_t>(blockIdx.x) * groups + warp / task.split) * kRows;
  const int begin = part * task.slice, end = min(begin + task.slice, weight.columns);

  typename Ring::Row streams[kRows];
  const uint8_t* masks[kRows];
  int places[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // Rows beyond the last one are that one again; their sums are not stored.
    const int64_t row = first_row + r < weight.rows ? first_row + r : weight.rows - 1;
    masks[r] = weight.mask + row * weight.mask_stride;
    int64_t first = first_value(weight, row);
    const int64_t last = row + 1 < weight.rows ? first_value(weight, row + 1) : weight.total;
    if (kFixed) {
      first += begin / 8 * weight.per_byte;
    } else if (begin > 0) {
      int before = 0;
#pragma unroll 1
      for (int column = 32 * lane; column < begin; column += kWindowColumns) {
        before += __popc(mask_word(weight, masks[r], column));
      }
      first += __shfl_sync(kAllLanes, inclusive_sum(before), 31);
    }
    places[r] = streams[r].open(shared_address(rings + (warp * kRows + r) * Ring::kStride), weight, first, last);
  }
#pragma unroll 1
  for (int chunk = 0; chunk + 1 < kChunks; ++chunk) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) streams[r].copy(places[r]);
    commit_copies();
  }

  Sums sums;
  unsigned words[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) words[r] = mask_word(weight, masks[r], begin + 32 * lane);
  // Only the weight is read before the wait: the kernels before may write x, and read what y's memory held.
  wait_for_kernels_before();
  let_next_kernel_start();
#pragma unroll 1
  for (int window = begin; window < end; window += kWindowColumns) {
    Window windows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (kFixed) {
        windows[r].word = words[r];
      } else {
        places[r] += windows[r].open(words[r], places[r]);
      }
      words[r] = mask_word(weight, masks[r], window + kWindowColumns + 32 * lane);
    }
    const int steps = min((end - window + kStepColumns - 1) / kStepColumns, kWindowColumns / kStepColumns);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int column = window + step * kStepColumns + 8 * lane;
      Lane lanes[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (kFixed) {
          lanes[r] = windows[r].step(step, places[r], weight.per_byte);
          streams[r].copy(places[r]);
          places[r] += 32 * weight.per_byte;
        } else {
          lanes[r] = windows[r].step(step);
          streams[r].copy(__shfl_sync(kAllLanes, windows[r].place, 8 * step));
        }
      }
      commit_copies();
      // A step takes at most 256 values of a row, which end in the chunk after the one where they begin. As each step
      // may copy 256 new ones, that chunk is never in the last kChunks - 2 groups.
      wait_copies<kChunks - 2>();
      __syncwarp();
      unsigned w[kRows][8];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const unsigned place = lanes[r].place % static_cast<unsigned>(Ring::Row::kRing);
        expand<sizeof(Element)>(streams[r].ring + place * sizeof(Element), lanes[r].byte, w[r]);
      }
      sums.add(task, w, column);
      __syncwarp();
    }
  }
  wait_copies<0>();  // those beyond the last step

#pragma unroll
  for (int at = 0; at < kSums; at += kGroup) {
    float own[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) own[i] = sums.of((at + i) / kBatch, (at + i) % kBatch);
    const float sum = sum_of_lanes(own);
    constexpr int kLanes = 32 / kGroup;
    if (lane % kLanes == 0) partial[warp][at + lane / kLanes] = sum;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < groups * kSums; i += kThreads) {
    const int group = i / kSums, r = i % kSums / kBatch, b = i % kBatch;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * groups + group) * kRows + r;
    if (row >= weight.rows || b >= task.batch) continue;
    float sum = 0.0f;
    for (int s = 0; s < task.split; ++s) sum += partial[group * task.split + s][i % kSums];
    if (task.bias != nullptr) sum += load_any(task.bias, task.bias_value, row);
    store_element<Sums::kX>(task.y, b * weight.rows + row, sum);
  }
}

}  // namespace losa::sparse_linear
