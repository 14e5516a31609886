// The decode kernel for up to 4 rows of x of the values' 16-bit type.
//
// A warp has a window of 1024 columns for good: its x stays in registers, and the block walks down the rows of the
// weight. A row's values of the window come from global to shared memory by way of registers, where those of the next
// row wait. A lane then expands 4 columns at a time: it reads the next 3 values, wherever they begin, and the fourth
// only if all 4 columns are kept. One of 16 permutations, from shared memory, puts them into their columns with zeros
// between; where fewer columns are kept the fourth value is zero. Products are the diagonal of a tensor core tile: of
// lane (g, t), A holds its columns of the weight as row g, B its columns of x as column g, and only D[g][g] is used.
//
// Of 32 columns that is about 5 instructions and 2 accesses to shared memory, as 4 columns a lane keep what 32 lanes
// read within about the 128 bytes that the banks hold. Where a word of the mask has its first value is counted for many
// rows at once, each by one warp, while the rows before them are multiplied.
#pragma once

#include "cuda/decode_task.h"

namespace losa::sparse_linear {

// Warps of a block at most: few, so that many blocks fill a multiprocessor's registers, or one for each window.
constexpr int kFewWarps = 4, kManyWarps = 14;
constexpr int kNibbleColumns = 128;  // 4 for each lane
constexpr int kNibbles = kWindowColumns / kNibbleColumns;
constexpr int kPiece = 8;  // values that a lane loads at a time
constexpr int kHeld = 3;   // loads of a lane that are on their way while the row before is multiplied
// For a window's values, which may begin anywhere in the first piece, and what is read beyond them.
constexpr int kRoom = kWindowColumns + 2 * kPiece;
constexpr int kParts = 8;  // of a window's sum, each in one lane
constexpr int kWindowWords = kWindowColumns / 32;

// Blocks of that many warps that a multiprocessor's registers shall allow.
LOSA_HOST_DEVICE constexpr int resident_blocks(int warps, int batch) {
  return warps != kFewWarps ? 1 : batch == 1 ? 7 : batch == 2 ? 5 : 3;
}

// A word of the mask, and where in shared memory its first value is.
struct alignas(8) Word {
  unsigned bits;
  Shared from;
};

// A row's values of one window.
struct alignas(16) Values {
  int64_t origin;  // of the first piece
  int pieces;
  int whole;  // pieces that are inside the buffer: all but at its end, or in a damaged file
};

// A block's `windows` warps for each of `lanes` rows, which take `rows` rows of the weight between two barriers.
struct Shape {
  int windows, lanes, rows;

  LOSA_HOST_DEVICE constexpr int warps() const { return windows * lanes; }
  LOSA_HOST_DEVICE constexpr int lot() const { return rows * windows; }
  // In bytes: permutations, values, sums, and where the values and words are. While one lot of rows is multiplied the
  // next is counted, and a slow warp may still be at the one before.
  LOSA_HOST_DEVICE constexpr int sums_at() const { return 64 + warps() * kRoom * 2; }
  LOSA_HOST_DEVICE constexpr int values_at(int batch) const {
    return sums_at() + 2 * lot() * batch * kParts * static_cast<int>(sizeof(float));
  }
  LOSA_HOST_DEVICE constexpr int words_at(int batch) const {
    return values_at(batch) + 3 * lot() * static_cast<int>(sizeof(Values));
  }
  LOSA_HOST_DEVICE constexpr int bytes(int batch) const {
    return words_at(batch) + 3 * lot() * kWindowWords * static_cast<int>(sizeof(Word));
  }
};

// For 4 columns of which `kept` has a bit for each: where their bytes are in the next 4 values. Two times 4 hex digits.
__device__ __forceinline__ unsigned permutation(unsigned kept) {
  unsigned digits = 0, value = 0;
  for (int column = 3; column >= 0; --column) {
    value = (kept >> column & 1u) != 0 ? __popc(kept & ((1u << column) - 1)) : 3;
    digits = digits << 8 | (2 * value + 1) << 4 | 2 * value;
  }
  return digits;
}

// A row of the mask on its way, a word of each window for each lane.
template <int kWindows>
struct RowAhead {
  static_assert(kWindows % 2 == 0);
  unsigned words[kWindows];
  int64_t first;  // the row's first value

  __device__ __forceinline__ void load(const Weight& weight, int row) {
    const int lane = threadIdx.x % 32;
    const unsigned* const mask = reinterpret_cast<const unsigned*>(weight.mask + row * weight.mask_stride) + lane;
#pragma unroll
    for (int w = 0; w < kWindows; ++w) {
      words[w] = 0;
      if (w * kWindowColumns + 32 * lane < weight.columns) words[w] = mask[w * kWindowWords];
    }
    first = first_value(weight, row);
  }

  // To shared memory: where each window's values are, and its words' in buffers that are `stride` apart. By all lanes.
  __device__ __forceinline__ void count(const Weight& weight, int windows, Shared buffer, Shared stride, Values* values,
                                        Word* table) const {
    const int lane = threadIdx.x % 32;
    int before = static_cast<int>(first) & (kPiece - 1), own_before = 0, own_total = 0;
    const int64_t origin = first - before;
#pragma unroll
    for (int pair = 0; pair < kWindows; pair += 2) {
      if (pair >= windows) break;
      // One scan for two windows: no sum has more than 11 bits.
      const int own = __popc(words[pair]) | __popc(words[pair + 1]) << 16, sum = inclusive_sum(own);
      const int totals = __shfl_sync(kAllLanes, sum, 31);
#pragma unroll
      for (int w = pair; w < pair + 2; ++w) {
        if (w >= windows) break;
        const int shift = 16 * (w - pair), place = (before & (kPiece - 1)) + ((sum - own) >> shift & 0xffff);
        table[w * kWindowWords + lane] = {words[w], buffer + w * stride + 2 * place};
        const int total = totals >> shift & 0xffff;
        if (lane == w) {
          own_before = before;
          own_total = total;
        }
        before += total;
      }
    }
    if (lane >= windows) return;
    const int margin = own_before & (kPiece - 1);
    const int64_t begin = origin + own_before - margin, inside = (weight.total - begin) / kPiece;
    const int pieces = own_total == 0 ? 0 : (margin + own_total + kPiece - 1) / kPiece;
    values[lane] = {begin, pieces, inside < 0 ? 0 : inside < pieces ? static_cast<int>(inside) : pieces};
  }
};

// A window's values, the first of them already asked for.
struct OpenWindow {
  const uint16_t* from;  // this lane's first piece
  int pieces, whole;
  uint4 held[kHeld];

  __device__ __forceinline__ void open(const Weight& weight, const Values* at) {
    const Values values = *at;
    pieces = values.pieces;
    whole = values.whole;
    from = static_cast<const uint16_t*>(weight.values) + (values.origin + kPiece * (threadIdx.x % 32));
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (is_whole(i)) held[i] = piece(i);
    }
  }

  // By all lanes; others may read after a barrier of the warp.
  __device__ __forceinline__ void store(const Weight& weight, Shared buffer) const {
    const Shared to = buffer + 16 * (threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (is_whole(i)) store_shared_piece(to + 512 * i, held[i]);
    }
    if (whole == pieces && pieces <= 32 * kHeld) return;
#pragma unroll 1
    for (int i = kHeld; is_whole(i); ++i) store_shared_piece(to + 512 * i, piece(i));
    // At the end of the buffer, or beyond it in a damaged file, whose values there are zero.
#pragma unroll 1
    for (int i = 8 * whole + threadIdx.x % 32; i < 8 * pieces; i += 32) {
      const uint16_t* const at = from - 8 * (threadIdx.x % 32) + i;
      const bool inside = at >= weight.values && at < static_cast<const uint16_t*>(weight.values) + weight.total;
      store_shared<2>(buffer + 2 * i, inside ? *at : 0);
    }
  }

 private:
  __device__ __forceinline__ bool is_whole(int round) const {
    return 32 * round + static_cast<int>(threadIdx.x % 32) < whole;
  }
  __device__ __forceinline__ uint4 piece(int round) const {
    return *reinterpret_cast<const uint4*>(from + 32 * kPiece * round);
  }
};

// A warp's columns of x.
template <Value kValue, int kBatch>
struct WindowOfX {
  unsigned x[kBatch][kNibbles][2];

  __device__ __forceinline__ void load(const Task& task, int window) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const uint16_t* const from = static_cast<const uint16_t*>(task.x) + b * task.x_stride;
#pragma unroll
      for (int s = 0; s < kNibbles; ++s) {
        const int column = window * kWindowColumns + s * kNibbleColumns + 4 * (threadIdx.x % 32);
        uint2 four = make_uint2(0, 0);
        if (column < task.weight.columns && b < task.batch) four = *reinterpret_cast<const uint2*>(from + column);
        x[b][s][0] = four.x;
        x[b][s][1] = four.y;
      }
    }
  }

  // The lane's part of the window's sums; see part_of_lane.
  __device__ __forceinline__ void multiply(const Word* words, Shared permutations, float (&parts)[kBatch]) const {
    const int lane = threadIdx.x % 32, shift = lane % 8 * 4;
    const unsigned below = (1u << shift) - 1;
    words += lane / 8;
    float d[kBatch][4] = {};
#pragma unroll
    for (int s = 0; s < kNibbles; ++s) {
      const Word word = words[4 * s];
      const Shared from = word.from + 2 * __popc(word.bits & below);
      const unsigned kept = rotate_right(word.bits, shift - 2) & 0x3cu;  // times 4
      const unsigned order = load_shared<4>(permutations + kept);
      const unsigned low = pair_of(load_shared<2>(from), load_shared<2>(from + 2));
      const unsigned high = pair_of(load_shared<2>(from + 4), load_if<2>(kept == 0x3cu, from + 6));
      // Rows g + 8 of A may be anything.
      const unsigned a[4] = {bytes_of(low, high, order), low, bytes_of(low, high, order >> 16), high};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) multiply_tile<kValue == Value::kHalf>(d[b], a, x[b][s]);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) parts[b] = lane / 4 % 2 == 0 ? d[b][0] : d[b][1];
  }

  // Which part of a sum this lane has, or -1.
  __device__ __forceinline__ static int part_of_lane() {
    const int lane = threadIdx.x % 32, g = lane / 4;
    return lane % 4 == g / 2 ? g : -1;
  }
};

// The sums of a lot of rows: 8 lanes add up the parts of each, always in the same order.
template <Value kValue, int kBatch>
__device__ __forceinline__ void store_sums(const Task& task, const Shape& shape, const float* parts, int first_row,
                                           int thread) {
  const int count = shape.rows * kBatch * kParts;
#pragma unroll 1
  for (int at = thread; at / 32 * 32 < count; at += 32 * shape.warps()) {  // whole warps
    const int r = at / (kBatch * kParts), b = at / kParts % kBatch, row = first_row + r;
    const float* const own = parts + (r * shape.windows * kBatch + b) * kParts + at % kParts;
    const bool wanted = at < count && row < task.weight.rows && b < task.batch;
    float sum = 0.0f;
    if (wanted) {
#pragma unroll 1
      for (int w = 0; w < shape.windows; ++w) sum += own[w * kBatch * kParts];
    }
#pragma unroll
    for (int delta = kParts / 2; delta > 0; delta /= 2) sum += __shfl_xor_sync(kAllLanes, sum, delta);
    if (!wanted || at % kParts != 0) continue;
    if (task.bias != nullptr) sum += load_any(task.bias, task.bias_value, row);
    store<kValue>(task.y, b * task.weight.rows + row, sum);
  }
}

// Blocks of shape.warps() <= kWarps warps, windows as many as the columns take.
template <Value kValue, int kBatch, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, resident_blocks(kWarps, kBatch)) matvec_kernel(Task task, Shape shape) {
  LOSA_DYNAMIC_SHARED(unsigned char, memory);
  const auto all_sums = reinterpret_cast<float*>(memory + shape.sums_at());
  const auto all_values = reinterpret_cast<Values*>(memory + shape.values_at(kBatch));
  const auto all_words = reinterpret_cast<Word*>(memory + shape.words_at(kBatch));
  if (threadIdx.x < 16) reinterpret_cast<unsigned*>(memory)[threadIdx.x] = permutation(threadIdx.x);

  const Weight& weight = task.weight;
  const int rows = static_cast<int>(weight.rows), windows = shape.windows, lot_windows = shape.lot();
  // A shuffle tells the compiler that the whole warp agrees.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0);
  const int window = warp / shape.lanes, lane_of_rows = warp % shape.lanes;
  const int part = WindowOfX<kValue, kBatch>::part_of_lane();
  constexpr int kBufferBytes = kRoom * 2;
  const Shared permutations = shared_address(memory), buffers = permutations + 64;
  const Shared buffer = buffers + warp * kBufferBytes;
  const int stride = static_cast<int>(gridDim.x) * shape.rows;  // between a block's lots

  // This warp counts one row of each lot, one that its own lane of warps will multiply.
  RowAhead<kWarps> ahead;
  int counted_row = static_cast<int>(blockIdx.x) * shape.rows + warp;
  const auto ask = [&] {
    if (warp < shape.rows && counted_row < rows) ahead.load(weight, counted_row);
  };
  const auto count = [&](int slot) {
    if (warp < shape.rows && counted_row < rows) {
      const int at = slot * lot_windows + warp * windows;
      const Shared counted = buffers + lane_of_rows * kBufferBytes;
      ahead.count(weight, windows, counted, shape.lanes * kBufferBytes, all_values + at, all_words + at * kWindowWords);
    }
    counted_row += stride;
  };

  ask();
  WindowOfX<kValue, kBatch> columns;
  columns.load(task, window);
  count(0);
  ask();
  __syncthreads();
  const int first_at = lane_of_rows * windows + window, step = shape.lanes * windows;
  int lot_row = static_cast<int>(blockIdx.x) * shape.rows;
  OpenWindow open;
  if (lot_row + lane_of_rows < rows) open.open(weight, all_values + first_at);

  int slot = 0, lot = 0;
  // Those of the lot before, which is complete behind a barrier.
  const auto finish = [&](int thread) {
    if (lot == 0) return;
    const float* const sums = all_sums + (lot + 1) % 2 * lot_windows * kBatch * kParts;
    store_sums<kValue, kBatch>(task, shape, sums, lot_row - stride, thread);
  };
#pragma unroll 1
  for (; lot_row < rows; lot_row += stride, ++lot) {
    const int next_slot = slot == 2 ? 0 : slot + 1;
    count(next_slot);
    ask();
    __syncthreads();
    float* const sums = all_sums + lot % 2 * lot_windows * kBatch * kParts;
    finish((warp + lot) % shape.warps() * 32 + static_cast<int>(threadIdx.x % 32));  // the warps take turns
    const Word* words = all_words + (slot * lot_windows + first_at) * kWindowWords;
    const Values* values = all_values + slot * lot_windows + first_at;
    float* sum = sums + first_at * kBatch * kParts + part;
    const int end = min(shape.rows, rows - lot_row);
#pragma unroll 1
    for (int r = lane_of_rows; r < end; r += shape.lanes) {
      open.store(weight, buffer);
      __syncwarp();
      values += step;
      if (r + shape.lanes < end) {
        open.open(weight, values);
      } else if (lot_row + stride + lane_of_rows < rows) {
        open.open(weight, all_values + next_slot * lot_windows + first_at);
      }
      float parts[kBatch];
      columns.multiply(words, permutations, parts);
      words += step * kWindowWords;
      if (part >= 0) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) sum[b * kParts] = parts[b];
      }
      sum += step * kBatch * kParts;
      __syncwarp();
    }
    slot = next_slot;
  }
  __syncthreads();
  finish(static_cast<int>(threadIdx.x));
}

}  // namespace losa::sparse_linear
