// The window kernel: y = x W^T for up to 4 rows of x, where x and the packed values have one 16-bit type.
//
// A block has a warp for each window of 1024 columns and takes one contiguous range of the weight's rows. A warp's
// columns of x stay in registers. A lane expands 4 columns at a time: it reads the next 3 values, wherever they begin,
// and the fourth value only if all 4 columns are kept. One of 16 permutations, from shared memory, puts the values into
// their columns with zeros between; where fewer columns are kept the fourth value is zero. Products are the diagonal of
// a tensor core tile: of lane (g, t), A holds its columns of the weight as row g, B its columns of x as column g, and
// only D[g][g] is used. A step of 32 x 4 columns keeps what 32 lanes read within about the 128 bytes that the banks
// hold.
//
// All memory of the weight is requested early. Rows are taken in lots, and there is a barrier between two lots. While a
// lot is multiplied, the masks of the next lot are counted and the masks of the lot after that are on their way. A warp
// counts the masks of its own window. Where the window's values begin follows from the counts of the windows before it,
// which the warp finds in shared memory behind the barrier. The values of the next row wait in registers.
#pragma once

#include "cuda/sparse_linear/task.h"

namespace losa::sparse_linear {

constexpr int kNibbleColumns = 128;  // 4 for each lane
constexpr int kNibbles = kWindowColumns / kNibbleColumns;
constexpr int kPiece = 8;  // values in 16 bytes, which a lane loads at a time
constexpr int kHeld = 3;   // pieces of a lane that are on their way while the row before is multiplied
// Values of a window's buffer. The window's first value may be anywhere in the first piece, and a lane reads beyond the
// last value.
constexpr int kBufferValues = kWindowColumns + 2 * kPiece;
constexpr int kPartialSums = 8;  // of a row and window, each in one lane
constexpr int kWindowWords = kWindowColumns / 32;
constexpr int kMostLot = 4;  // rows of a lot

// The most windows of a block. A multiprocessor's registers allow as many warps, of blocks of any size: 72, 96 or 168
// registers of a thread. So two blocks for 14336 columns and one row of x, one block for 11008 columns and two rows.
LOSA_HOST_DEVICE constexpr int most_windows(int batch) {
  return batch == 1 ? 28 : batch == 2 ? 20 : 12;
}

// 32 columns of a row: a bit for each pruned column, and how many bytes of the window's values come before the word's.
struct alignas(8) Word {
  unsigned pruned, before;
};

// Where a row's values are: the multiple of 16 bytes at or before them, and how many values there are from it to the
// end of the buffer (at most 2^30). In shared memory 1 + windows ints follow: how many values lie between `origin` and
// the row, then how many values each window has.
struct alignas(16) RowStart {
  const uint16_t* origin;
  int left;
};

// Blocks of `windows` warps, `lot` rows between two barriers. Each block has `rows` rows of the weight, and the first
// `longer` blocks have one more.
struct WindowShape {
  int windows, lot, rows = 0, longer = 0;

  // Places in shared memory, in bytes. First come the permutations and each warp's values, then each warp's words of
  // two lots: one that is multiplied and one that is counted. Row starts are of three lots: while a slow warp still
  // multiplies one lot, a fast warp may request values of the second and count the third. Sums are of two lots, since
  // the sums of a lot are added up while the next lot is multiplied.
  LOSA_HOST_DEVICE constexpr int words_at() const { return 64 + windows * kBufferValues * 2; }
  LOSA_HOST_DEVICE constexpr int starts_at() const {
    return words_at() + windows * 2 * lot * kWindowWords * static_cast<int>(sizeof(Word));
  }
  LOSA_HOST_DEVICE constexpr int start_bytes() const {
    return static_cast<int>(sizeof(RowStart)) + (windows + 1 + 3) / 4 * 16;
  }
  LOSA_HOST_DEVICE constexpr int sums_at() const { return starts_at() + 3 * lot * start_bytes(); }
  LOSA_HOST_DEVICE constexpr int bytes(int batch) const {
    return sums_at() + 2 * lot * windows * batch * kPartialSums * static_cast<int>(sizeof(float));
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

// A window's masks of one lot on their way: a word of each row for each lane.
struct MasksAhead {
  unsigned words[kMostLot];
  int64_t first;  // in warp 0: the index of the first value of the row that this lane describes

  // Of `count` rows from `row` on. `count` may be 0 or less.
  __device__ __forceinline__ void load(const Weight& weight, int window, int row, int count) {
    const int lane = threadIdx.x % 32, column = window * kWindowColumns + 32 * lane;
    const uint8_t* mask = weight.mask + row * weight.mask_stride + column / 8;
    const int wanted = column < weight.columns ? count : 0;
#pragma unroll
    for (int i = 0; i < kMostLot; ++i, mask += weight.mask_stride) {
      words[i] = 0;
      if (i < wanted) words[i] = load_once_word(mask);  // [1 row, 32 columns] of [lot, 1024]
    }
    first = 0;
    if (window == 0 && lane < count) first = first_value(weight, row + lane);
  }

  // To shared memory, for the first `count` rows: this lane's words, and in the rows' starts, `stride` bytes apart, the
  // window's number of values. By all lanes of all warps; other warps may read after a barrier of the block.
  __device__ __forceinline__ void count(const Weight& weight, int window, int count, Word* words_to,
                                        unsigned char* starts, int stride) const {
    const int lane = threadIdx.x % 32;
    const int counts = static_cast<int>(sizeof(RowStart)) + 4 * (window + 1);
#pragma unroll
    for (int i = 0; i < kMostLot; i += 2) {
      if (i >= count) break;
      // One scan for two rows: no sum has more than 11 bits.
      const unsigned own = __popc(words[i]) | __popc(words[i + 1]) << 16;
      unsigned sum = own;
      add_from_below<1>(sum);
      add_from_below<2>(sum);
      add_from_below<4>(sum);
      add_from_below<8>(sum);
      add_from_below<16>(sum);
      const unsigned before = 2 * (sum - own);
      words_to[i * kWindowWords] = {~words[i], before & 0xffffu};
      if (lane == 31) *reinterpret_cast<int*>(starts + counts + i * stride) = static_cast<int>(sum & 0xffffu);
      if (i + 1 >= count) break;
      words_to[(i + 1) * kWindowWords] = {~words[i + 1], before >> 16};
      if (lane == 31) *reinterpret_cast<int*>(starts + counts + (i + 1) * stride) = static_cast<int>(sum >> 16);
    }
    if (window > 0 || lane >= count) return;
    const int64_t margin = first % kPiece, origin = first - margin, left = weight.total - origin;
    constexpr int64_t kMost = int64_t{1} << 30;
    *reinterpret_cast<RowStart*>(starts + lane * stride) = {static_cast<const uint16_t*>(weight.values) + origin,
                                                            static_cast<int>(left < kMost ? left : kMost)};
    *reinterpret_cast<int*>(starts + lane * stride + sizeof(RowStart)) = static_cast<int>(margin);
  }
};

// A row's values of one window. The first kHeld pieces of each lane are requested before they are needed.
struct ValuesAhead {
  const uint16_t* from;  // this lane's first piece
  int pieces, whole;     // of the row and window; of these, how many lie inside the buffer: all but at the buffer's end
  Shared values;         // the address of the first value, once it is stored
  uint4 held[kHeld];

  // Of the row whose start is `at`, for a buffer of this warp. By all lanes.
  __device__ __forceinline__ void load(int window, const unsigned char* at, Shared buffer) {
    const int lane = threadIdx.x % 32;
    const RowStart start = *reinterpret_cast<const RowStart*>(at);
    const int* const counts = reinterpret_cast<const int*>(at + sizeof(RowStart));
    const int own = counts[window + 1], place = __reduce_add_sync(kAllLanes, lane <= window ? counts[lane] : 0);
    const int margin = place & (kPiece - 1);  // values of the first piece that belong to the window before
    values = buffer + 2 * margin;
    pieces = (margin + own + kPiece - 1) >> 3;
    whole = min(pieces, max(start.left - place + margin, 0) >> 3);
    from = start.origin + (place - margin + kPiece * lane);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (is_whole(i)) held[i] = piece(i);  // [32 lanes, 8 values]
    }
  }

  // To the buffer, in which this lane's first piece goes to `to`. By all lanes; other lanes may read after a barrier of
  // the warp.
  __device__ __forceinline__ void store(const Weight& weight, Shared to) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (is_whole(i)) store_shared_piece(to + 512 * i, held[i]);
    }
    if (whole == pieces && pieces <= 32 * kHeld) return;
#pragma unroll 1
    for (int i = kHeld; is_whole(i); ++i) store_shared_piece(to + 512 * i, piece(i));  // [32 lanes, 8 values]
    // Values at the end of the buffer one by one, and zeros where a damaged file points beyond it.
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 8 * whole + lane; i < 8 * pieces; i += 32) {
      const uint16_t* const at = from - 8 * lane + i;
      const bool inside = at >= weight.values && at < static_cast<const uint16_t*>(weight.values) + weight.total;
      store_shared<2>(to - 16 * lane + 2 * i, inside ? *at : 0);
    }
  }

 private:
  __device__ __forceinline__ bool is_whole(int round) const {
    return static_cast<int>(threadIdx.x % 32) < whole - 32 * round;
  }
  __device__ __forceinline__ uint4 piece(int round) const { return load_once_piece(from + 32 * kPiece * round); }
};

// Where a lane's 4 columns are in a word: the bits below them, and the rotation that brings them to bit 2.
struct LaneBits {
  unsigned below;
  int turn;

  __device__ __forceinline__ LaneBits() {
    const int shift = threadIdx.x % 8 * 4;
    below = (1u << shift) - 1;
    turn = shift - 2;
    keep_in_register(below);
    keep_in_register(turn);
  }
};

// A warp's columns of x.
template <FloatType kValue, int kBatch>
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
        if (column < task.weight.columns && b < task.batch) {
          four = *reinterpret_cast<const uint2*>(from + column);  // [32 lanes, 4 columns] of [batch, 1024]
        }
        x[b][s][0] = four.x;
        x[b][s][1] = four.y;
      }
    }
  }

  // The lane's partial sums of a row whose values begin at `values`. words: from this lane's first word on.
  __device__ __forceinline__ void multiply(const Word* words, Shared values, Shared permutations, const LaneBits& own,
                                           float (&partial)[kBatch]) const {
    float d[kBatch][4] = {};
#pragma unroll
    for (int s = 0; s < kNibbles; ++s) {
      const Word word = words[4 * s];
      unsigned before = word.before + 2 * __popc(~word.pruned & own.below);
      keep_in_register(before);
      const Shared from = values + before;
      const unsigned pruned = rotate_right(word.pruned, own.turn) & 0x3cu;  // of the 4 columns, times 4
      const unsigned order = load_shared<4>(permutations + pruned);
      const unsigned low = pair_of(load_shared<2>(from), load_shared<2>(from + 2));
      const unsigned high = pair_of(load_shared<2>(from + 4), load_unless<2>(pruned, from + 6));
      // Rows g + 8 of A may be anything.
      const unsigned a[4] = {bytes_of(low, high, order), low, bytes_of(low, high, order >> 16), high};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) multiply_tile<kValue == FloatType::kHalf>(d[b], a, x[b][s]);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) partial[b] = threadIdx.x / 4 % 2 == 0 ? d[b][0] : d[b][1];
  }

  // Which partial sum this lane has, or -1.
  __device__ __forceinline__ static int partial_of_lane() {
    const int lane = threadIdx.x % 32, g = lane / 4;
    return lane % 4 == g / 2 ? g : -1;
  }
};

// y of `count` rows: 8 lanes add up the partial sums of each row and row of x, always in the same order.
template <FloatType kValue, int kBatch>
__device__ __forceinline__ void store_sums(const Task& task, int windows, const float* partial, int first_row,
                                           int count, int thread) {
#pragma unroll 1
  for (int at = thread; at / 32 * 32 < count * kBatch * kPartialSums; at += 32 * windows) {  // whole warps
    const int r = at / (kBatch * kPartialSums), b = at / kPartialSums % kBatch, row = first_row + r;
    const float* const own = partial + (r * windows * kBatch + b) * kPartialSums + at % kPartialSums;
    const bool wanted = r < count && b < task.batch;
    float sum = 0.0f;
    if (wanted) {
#pragma unroll 1
      for (int w = 0; w < windows; ++w) sum += own[w * kBatch * kPartialSums];
    }
#pragma unroll
    for (int delta = kPartialSums / 2; delta > 0; delta /= 2) sum += __shfl_xor_sync(kAllLanes, sum, delta);
    if (!wanted || at % kPartialSums != 0) continue;
    if (task.bias != nullptr) sum += load_bias(task.bias, task.bias_type, row);
    store_element<kValue>(task.y, b * task.weight.rows + row, sum);
  }
}

// Blocks of 32 * shape.windows threads; each block has a row at least. Before the wait for earlier kernels only the
// weight is read: this kernel starts early only behind kernels that permit it, and none of these writes a weight.
template <FloatType kValue, int kBatch>
__global__ void __launch_bounds__(32 * most_windows(kBatch)) window_kernel(Task task, WindowShape shape) {
  LOSA_DYNAMIC_SHARED(unsigned char, memory);
  const Weight& weight = task.weight;
  const int windows = shape.windows, lot = shape.lot, block = static_cast<int>(blockIdx.x);
  // A shuffle tells the compiler that the whole warp agrees.
  const int window = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
  int row = block * shape.rows + min(block, shape.longer);  // the lot's first row
  const int end = row + shape.rows + (block < shape.longer ? 1 : 0);

  // Request the masks of the first two lots.
  MasksAhead masks, second;
  masks.load(weight, window, row, min(lot, end - row));
  second.load(weight, window, row + lot, min(lot, end - row - lot));

  // Lay out the shared memory.
  if (threadIdx.x < 16) reinterpret_cast<unsigned*>(memory)[threadIdx.x] = permutation(~threadIdx.x & 15u);
  const Shared permutations = shared_address(memory), buffer = permutations + 64 + window * kBufferValues * 2;
  Shared store_to = buffer + 16 * lane;
  keep_in_register(store_to);
  const auto words = reinterpret_cast<Word*>(memory + shape.words_at()) + window * 2 * lot * kWindowWords;
  const auto sums = reinterpret_cast<float*>(memory + shape.sums_at());
  // A ring of row starts, as bytes in the shared memory.
  const int stride = shape.start_bytes();
  int ring = shape.starts_at(), ring_end = ring + 3 * lot * stride, start = ring;
  keep_in_register(ring);
  keep_in_register(ring_end);

  // Count the first lot's masks, request the first row's values, and read x.
  masks.count(weight, window, min(lot, end - row), words + lane, memory + start, stride);
  masks = second;
  __syncthreads();
  ValuesAhead ahead;
  ahead.load(window, memory + start, buffer);
  wait_for_kernels_before();
  let_next_kernel_start();
  WindowOfX<kValue, kBatch> columns;
  columns.load(task, window);

  constexpr int kSums = kBatch * kPartialSums;
  const LaneBits own;
  int part = WindowOfX<kValue, kBatch>::partial_of_lane();
  keep_in_register(part);
  const int store_thread = 32 * (windows - 1 - window) + lane;  // the last window may be the shortest
  int odd = 0, slot = 0;
#pragma unroll 1
  for (int before = 0; row < end; row += lot) {
    // Count the next lot's masks, request the masks of the lot after it, and store y of the lot before.
    const int count = min(lot, end - row);
    slot = slot == 2 ? 0 : slot + 1;
    const int next = ring + slot * lot * stride;
    masks.count(weight, window, min(lot, end - row - lot), words + (odd ^ 1) * lot * kWindowWords + lane, memory + next,
                stride);
    masks.load(weight, window, row + 2 * lot, min(lot, end - row - 2 * lot));
    __syncthreads();
    // The sums of the lot before are complete behind the barrier.
    const float* const done = sums + (odd ^ 1) * lot * windows * kSums;
    store_sums<kValue, kBatch>(task, windows, done, row - lot, before, store_thread);
    before = count;
    // Multiply this lot row by row; the next row's values are requested before a row is multiplied.
    const Word* row_words = words + odd * lot * kWindowWords + lane / 8;
    float* sum = sums + (odd * lot * windows + window) * kSums + part;
    int left = end - row, stop = left - count;
    keep_in_register(stop);
#pragma unroll 1
    do {
      ahead.store(weight, store_to);
      const Shared values = __reduce_max_sync(kAllLanes, ahead.values);  // to add it then takes no instruction
      __syncwarp();
      if (--left > 0) {
        start += stride;
        if (start == ring_end) start = ring;
        ahead.load(window, memory + start, buffer);
      }
      float partial[kBatch];
      columns.multiply(row_words, values, permutations, own, partial);
      row_words += kWindowWords;
      if (part >= 0) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b) sum[b * kPartialSums] = partial[b];
      }
      sum += windows * kSums;
      __syncwarp();
    } while (left > stop);
    odd ^= 1;
  }
  __syncthreads();
  store_sums<kValue, kBatch>(task, windows, sums + (odd ^ 1) * lot * windows * kSums, row - lot, end - (row - lot),
                             store_thread);
}

}  // namespace losa::sparse_linear
