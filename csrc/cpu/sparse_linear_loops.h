// The two loops of the vector kernels. Included by one file per instruction set; all of it has internal linkage, since
// what is compiled here for one instruction set must not be linked into code for another.
//
// A decoder D supplies, for one value type on one instruction set:
//   Vector                a register of sums
//   Element, kLanes       how x is stored, and how many columns of it a register holds
//   kBytes                size of a value
//   kStep, kVectors       columns that one expand() takes, and registers that it gives
//   expand(word, step, from, w)   the weights of columns step * kStep.. of a mask word, zeros where pruned; `from`
//                         moves past the values taken, of which it may read as many as a block of kBlock has columns
//   columns(words, count, at)     byte offsets in x (64 bytes a column) of the words' set bits; how many
//   widen(from, count, w)         values as floats, in w or where they are
//   load, store, splat, multiply_add, add, total
// Weights and x meet in multiply_add only: what expand() and load() give need not be vectors of floats.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/sparse_linear.h"

#define LOSA_INLINE inline __attribute__((always_inline))

namespace losa::sparse_linear {
namespace {

// Apart, so that a full word never goes through memory.
__attribute__((noinline)) uint64_t load_last_word(const uint8_t* mask, int64_t left) {
  uint64_t word = 0;
  if (left <= 0) return word;
  std::memcpy(&word, mask, static_cast<size_t>((left + 7) / 8));
  return word & (~0ull >> (kBlock - left));
}

// Mask bits of the next kBlock columns, of which `left` exist.
LOSA_INLINE uint64_t load_word(const uint8_t* mask, int64_t left) {
  if (left < kBlock) return load_last_word(mask, left);
  uint64_t word;
  std::memcpy(&word, mask, 8);
  return word;
}

template <class D>
LOSA_INLINE const uint8_t* first_value(const Weight& weight, int64_t row) {
  // Offsets from a damaged file must not lead out of the buffer.
  const int64_t total = (weight.end - weight.values) / D::kBytes;
  const int64_t first = weight.offsets != nullptr ? weight.offsets[row] : row * weight.row_length;
  return weight.values + (first < 0 ? 0 : first > total ? total : first) * D::kBytes;
}

// `size` readable bytes that begin like those at `from`: near the end of the buffer, a copy.
__attribute__((noinline)) const uint8_t* copy_rest(const uint8_t* from, int64_t left, uint8_t* copy, int64_t size) {
  std::memset(copy, 0, static_cast<size_t>(size));
  if (left > 0) std::memcpy(copy, from, static_cast<size_t>(left));
  return copy;
}

LOSA_INLINE const uint8_t* readable(const uint8_t* from, const uint8_t* end, uint8_t* copy, int64_t size) {
  return end - from >= size ? from : copy_rest(from, end - from, copy, size);
}

// y = x W^T by expanding 8 to 32 columns of kRows rows of W at a time against kBatch contiguous rows of x: a decoded
// weight is used for kBatch products, a loaded x for kRows. kChains independent sums hide the latency of an addition.
template <class D, int kRows, int kBatch, int kChains>
void dot(const Task& task, int64_t begin, int64_t end) {
  using Vector = typename D::Vector;
  constexpr int64_t kPrefetch = 2048;  // bytes of values: about 200 ns of work, and less than that is too late
  const Weight& weight = task.weight;
  const int64_t padded = (weight.columns + kBlock - 1) / kBlock * kBlock;
  alignas(64) uint8_t copies[kRows][kBlock * D::kBytes];

  for (int64_t row = begin; row < end; row += kRows) {
    for (int64_t pass = 0; pass * kBatch < task.batch; ++pass) {
      const auto* x = static_cast<const typename D::Element*>(task.x) + pass * padded * kBatch;
      const uint8_t* from[kRows];
      const uint8_t* mask[kRows];
      for (int r = 0; r < kRows; ++r) {
        // Past the last row, the last one again.
        const int64_t which = row + r < end ? row + r : end - 1;
        from[r] = first_value<D>(weight, which);
        mask[r] = weight.mask + which * weight.mask_stride;
      }
      // With several rows at a time a row's values end where its neighbour's begin: what comes next is further away.
      const int64_t ahead = kRows == 1 ? kPrefetch : kRows * (from[kRows - 1] - from[0]) / (kRows > 1 ? kRows - 1 : 1);

      Vector sums[kRows][kBatch][kChains];
      for (int r = 0; r < kRows; ++r) {
        for (int b = 0; b < kBatch; ++b) {
          for (int c = 0; c < kChains; ++c) sums[r][b][c] = D::splat(0.0f);
        }
      }
      for (int64_t left = weight.columns; left > 0; left -= kBlock) {
        uint64_t word[kRows];
        const uint8_t* place[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          word[r] = load_word(mask[r], left);
          mask[r] += kBlock / 8;
          place[r] = readable(from[r], weight.end, copies[r], kBlock * D::kBytes);
          for (int line = 0; line < D::kBytes / 2; ++line) {
            _mm_prefetch(reinterpret_cast<const char*>(from[r]) + ahead + 64 * line, _MM_HINT_T0);
          }
          from[r] += D::kBytes * _mm_popcnt_u64(word[r]);
        }
#pragma GCC unroll 8
        for (int step = 0; step < kBlock / D::kStep; ++step) {
          typename D::Weights w[kRows][D::kVectors];
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) D::expand(word[r], step, place[r], w[r]);
#pragma GCC unroll 2
          for (int v = 0; v < D::kVectors; ++v) {
            const int group = step * D::kVectors + v;
#pragma GCC unroll 16
            for (int b = 0; b < kBatch; ++b) {
              const auto part = D::load(x + (group * kBatch + b) * D::kLanes);
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r) {
                sums[r][b][group % kChains] = D::multiply_add(w[r][v], part, sums[r][b][group % kChains]);
              }
            }
          }
        }
        x += kBlock * kBatch;
      }
      for (int b = 0; b < kBatch && pass * kBatch + b < task.batch; ++b) {
        for (int r = 0; r < kRows && row + r < end; ++r) {
          Vector sum = sums[r][b][0];
          for (int c = 1; c < kChains; ++c) sum = D::add(sum, sums[r][b][c]);
          task.y[(pass * kBatch + b) * task.y_stride + row + r] = D::total(sum);
        }
      }
    }
  }
}

// y = x W^T for 16 rows of x, a product for each kept weight only: w times the 16 values of its column of x. Pays where
// there are so many rows of x that arithmetic, not memory, is the limit.
template <class D>
void axpy(const Task& task, int64_t begin, int64_t end) {
  using Vector = typename D::Vector;
  constexpr int kWide = 16, kVectors = kWide / D::kLanes, kChains = 4;
  // A chunk of x (16 KB) stays in the first cache for all rows of a tile.
  constexpr int64_t kChunk = 256, kTile = 16;
  const Weight& weight = task.weight;
  alignas(64) float sums[kTile][kWide];
  alignas(64) float widened[kChunk + kWide];
  alignas(64) uint16_t at[kChunk + 32];
  alignas(64) uint8_t copy[kChunk * D::kBytes];
  const uint8_t* from[kTile];

  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = end - tile < kTile ? end - tile : kTile;
    std::memset(sums, 0, sizeof(sums));
    for (int64_t r = 0; r < rows; ++r) from[r] = first_value<D>(weight, tile + r);

    for (int64_t column = 0; column < weight.columns; column += kChunk) {
      const auto* x = reinterpret_cast<const uint8_t*>(static_cast<const float*>(task.x) + column * kWide);
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* mask = weight.mask + (tile + r) * weight.mask_stride + column / 8;
        const int64_t left = weight.columns - column;
        uint64_t words[kChunk / kBlock];
        for (int i = 0; i < kChunk / kBlock; ++i) words[i] = load_word(mask + 8 * i, left - kBlock * i);
        const int64_t count = D::columns(words, left < kChunk ? (left + kBlock - 1) / kBlock : kChunk / kBlock, at);
        const float* w = D::widen(readable(from[r], weight.end, copy, kChunk * D::kBytes), count, widened);
        from[r] += count * D::kBytes;

        Vector sum[kChains][kVectors];
        for (int c = 0; c < kChains; ++c) {
          for (int v = 0; v < kVectors; ++v) sum[c][v] = D::splat(0.0f);
        }
        const auto use = [&](float weight_here, uint64_t offset, int chain) __attribute__((always_inline)) {
          const auto* rows_of_x = reinterpret_cast<const float*>(x + offset);
          const Vector value = D::splat(weight_here);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            sum[chain][v] = D::multiply_add(value, D::load(rows_of_x + v * D::kLanes), sum[chain][v]);
          }
        };
        int64_t i = 0;
        for (; i + kChains <= count; i += kChains) {
          uint64_t offsets;  // four in one load: loads are what this loop waits for
          std::memcpy(&offsets, at + i, sizeof(offsets));
#pragma GCC unroll 4
          for (int c = 0; c < kChains; ++c) use(w[i + c], offsets >> (16 * c) & 0xffff, c);
        }
        for (; i < count; ++i) use(w[i], at[i], 0);
        for (int v = 0; v < kVectors; ++v) {
          float* target = sums[r] + v * D::kLanes;
          const Vector all = D::add(D::add(sum[0][v], sum[1][v]), D::add(sum[2][v], sum[3][v]));
          D::store(target, D::add(D::load(target), all));
        }
      }
    }
    for (int64_t b = 0; b < task.batch; ++b) {
      for (int64_t r = 0; r < rows; ++r) task.y[b * task.y_stride + tile + r] = sums[r][b];
    }
  }
}

}  // namespace
}  // namespace losa::sparse_linear
