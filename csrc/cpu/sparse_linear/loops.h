// The two loops of the vector kernels. All of this file has internal linkage: what is compiled here for one instruction
// set must not be linked into code for another.
//
// A decoder D supplies, for one value type on one instruction set:
//   Vector, Weights       a register of sums, and one of the weights that expand() gives
//   Element, kLanes       how x is stored, and how many columns of it a register holds
//   kBytes                size of a value
//   kStep, kVectors       columns that one expand() takes, and registers that it gives
//   expand(word, step, from, w)   the weights of columns step * kStep.. of a mask word, zeros where pruned, from values
//                         of which it may read kStep
//   kept(word, step)      how many values the columns of that step keep
//   columns(mask, words, at)      byte offsets in x (64 bytes a column) of the set bits of so many words; how many
//   widen(from, count, w)         values as floats, in w or where they are
//   load, store, splat, multiply_add, add, total
// Weights and x meet in multiply_add only: what expand() and load() give need not be vectors of floats.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "cpu/simd/float_lanes.h"
#include "cpu/sparse_linear/kernels.h"

#define LOSA_INLINE inline __attribute__((always_inline))

namespace losa::sparse_linear {
namespace {

// trim_words and copy_rest are not inlined: a loop that calls neither keeps its sums in registers.

// A copy of the mask words of `columns`, in which bits of columns that do not exist are 0.
__attribute__((noinline)) const uint8_t* trim_words(const uint8_t* mask, int64_t columns, uint8_t* copy) {
  const int64_t last = columns / kBlock * (kBlock / 8), left = columns % kBlock;
  std::memcpy(copy, mask, static_cast<size_t>(last + (left + 7) / 8));
  uint64_t word = 0;
  std::memcpy(&word, copy + last, static_cast<size_t>((left + 7) / 8));
  word &= ~(~uint64_t{0} << left);
  std::memcpy(copy + last, &word, sizeof word);
  return copy;
}

// The mask words of `columns`: themselves, or a copy where the last word has bits of columns that do not exist.
LOSA_INLINE const uint8_t* whole_words(const uint8_t* mask, int64_t columns, uint8_t* copy) {
  return columns % kBlock == 0 ? mask : trim_words(mask, columns, copy);
}

LOSA_INLINE uint64_t load_word(const uint8_t* mask) {
  uint64_t word;
  std::memcpy(&word, mask, sizeof word);
  return word;
}

// `count` values of 16 bits as floats, by whole registers: both buffers reach to the end of the last one.
template <class Type>
LOSA_INLINE const float* widen_values(const uint8_t* from, int64_t count, float* to) {
  const auto* values = reinterpret_cast<const typename Type::Stored*>(from);
  for (int64_t i = 0; i < count; i += losa::kLanes) store<FloatLanes>(to + i, load<Type>(values + i));
  return to;
}

template <class D>
LOSA_INLINE const uint8_t* first_value(const Weight& weight, int64_t row) {
  // Offsets from a damaged file must not lead out of the buffer.
  const int64_t total = (weight.end - weight.values) / D::kBytes;
  const int64_t first = weight.offsets != nullptr ? weight.offsets[row] : row * weight.row_length;
  return weight.values + (first < 0 ? 0 : first > total ? total : first) * D::kBytes;
}

// A copy of the last `left` bytes of the buffer, with zeros up to `size`.
__attribute__((noinline)) const uint8_t* copy_rest(const uint8_t* from, int64_t left, uint8_t* copy, int64_t size) {
  std::memset(copy, 0, static_cast<size_t>(size));
  if (left > 0) std::memcpy(copy, from, static_cast<size_t>(left));
  return copy;
}

// `size` readable bytes that begin like the bytes at `from`: these themselves, or a copy near the end of the buffer.
LOSA_INLINE const uint8_t* readable(const uint8_t* from, const uint8_t* end, uint8_t* copy, int64_t size) {
  return end - from >= size ? from : copy_rest(from, end - from, copy, size);
}

// y = x W^T by expanding 8 to 32 columns of kRows rows of W at a time against kBatch contiguous rows of x: a decoded
// weight is used for kBatch products, a loaded x for kRows. kChains independent sums hide the latency of an addition.
// kFixed: every 8 columns keep weight.per_byte values, so that none are counted.
template <class D, bool kFixed, int kRows, int kBatch, int kChains>
struct Dot {
  using Vector = typename D::Vector;
  using Element = typename D::Element;
  using Sums = Vector[kRows][kBatch][kChains];

  static constexpr int64_t kPrefetch = 2048;  // bytes of values: some 100 ns of work; a later prefetch is too late
  // Columns that are read for all rows of a tile before the next ones; sums wait in memory. With up to 4 rows of x
  // memory is the limit, and whole rows of W, read in its order, are best; with more, x must come from the first cache.
  static constexpr int64_t kChunkBytes = kBatch <= 4 ? 64 << 10 : 16 << 10;
  static constexpr int64_t kChunk = kChunkBytes / (kBatch * int64_t{sizeof(Element)}), kTile = 16;
  static_assert(kChunk % kBlock == 0 && kTile % kRows == 0);

  // Adds the products of `blocks` words of the mask of kRows rows; `ahead` is what will be read next, and fetched.
  static LOSA_INLINE void add(const Element* x, const uint8_t* (&mask)[kRows], const uint8_t* (&from)[kRows],
                              const uint8_t* (&ahead)[kRows], int64_t blocks, int64_t per_step, Sums& sums) {
    for (int64_t block = 0; block < blocks; ++block, x += kBlock * kBatch) {
      uint64_t word[kRows];
      const uint8_t* place[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        word[r] = load_word(mask[r] + block * (kBlock / 8));
        place[r] = from[r];
        for (int line = 0; line < D::kBytes / 2; ++line) _mm_prefetch(ahead[r] + 64 * line, _MM_HINT_T0);
        const int64_t taken = kFixed ? per_step * (kBlock / D::kStep) : D::kBytes * _mm_popcnt_u64(word[r]);
        from[r] += taken;
        ahead[r] += taken;
      }
#pragma GCC unroll 8
      for (int step = 0; step < kBlock / D::kStep; ++step) {
        typename D::Weights w[kRows][D::kVectors];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          D::expand(word[r], step, place[r], w[r]);  // [kStep] of a row of W
          place[r] += kFixed ? per_step : D::kBytes * D::kept(word[r], step);
        }
#pragma GCC unroll 2
        for (int v = 0; v < D::kVectors; ++v) {
          const int group = step * D::kVectors + v;
#pragma GCC unroll 16
          for (int b = 0; b < kBatch; ++b) {
            const auto part = D::load(x + (group * kBatch + b) * D::kLanes);  // [kLanes] of a row of x
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              sums[r][b][group % kChains] = D::multiply_add(w[r][v], part, sums[r][b][group % kChains]);
            }
          }
        }
      }
    }
  }

  static void run(const Task& task, int64_t begin, int64_t end) {
    const Weight& weight = task.weight;
    const int64_t padded = (weight.columns + kBlock - 1) / kBlock * kBlock;
    const int64_t per_step = weight.per_byte * (D::kStep / 8) * D::kBytes;
    alignas(64) uint8_t values[kRows][kChunk * D::kBytes];
    uint8_t words[kRows][kChunk / 8];
    Vector waiting[kTile][kMostBatch / kBatch][kBatch * kChains];
    const uint8_t* next[kTile + kRows];

    for (int64_t tile = begin; tile < end; tile += kTile) {
      const int64_t rows = end - tile < kTile ? end - tile : kTile;
      for (int64_t i = 0; i < kTile + kRows; ++i) {
        next[i] = first_value<D>(weight, tile + i < end ? tile + i : end - 1);
      }
      for (int64_t column = 0; column < weight.columns; column += kChunk) {
        const bool last = weight.columns - column <= kChunk;
        const int64_t columns = last ? weight.columns - column : kChunk, blocks = (columns + kBlock - 1) / kBlock;
        for (int64_t pass = 0; pass * kBatch < task.batch; ++pass) {
          const auto* const x = static_cast<const Element*>(task.x) + (pass * padded + column) * kBatch;
          for (int64_t first = 0; first < rows; first += kRows) {
            const uint8_t *from[kRows], *begins[kRows], *mask[kRows];
            Sums sums;
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              // Past the last row, the last one again.
              const int64_t i = first + r < rows ? first + r : rows - 1;
              begins[r] = from[r] = readable(next[i], weight.end, values[r], blocks * kBlock * D::kBytes);
              mask[r] = whole_words(weight.mask + (tile + i) * weight.mask_stride + column / 8, columns, words[r]);
#pragma GCC unroll 16
              for (int s = 0; s < kBatch * kChains; ++s) sums[r][s / kChains][s % kChains] = D::splat(0.0f);
            }
            const uint8_t* ahead[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              // Single rows follow each other in memory; else the next rows of the tile, or of the next one.
              const int64_t i = last ? first + kRows + r : (first + kRows + r) % kTile;
              ahead[r] = kRows == 1 && weight.columns <= kChunk ? from[r] + kPrefetch : next[i];
            }
            add(x, mask, from, ahead, blocks, per_step, sums);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const int64_t i = first + r;
              if (i >= rows) break;
#pragma GCC unroll 16
              for (int s = 0; s < kBatch * kChains; ++s) {
                // Chunk by chunk: one long chain of additions would round off more than a dense product does.
                const Vector sum = sums[r][s / kChains][s % kChains];
                waiting[i][pass][s] = column == 0 ? sum : D::add(waiting[i][pass][s], sum);
              }
              if ((pass + 1) * kBatch >= task.batch) next[i] += from[r] - begins[r];
            }
          }
        }
      }
      for (int64_t b = 0; b < task.batch; ++b) {
        for (int64_t i = 0; i < rows; ++i) {
          const Vector* const sums = waiting[i][b / kBatch] + b % kBatch * kChains;
          Vector sum = sums[0];
          for (int c = 1; c < kChains; ++c) sum = D::add(sum, sums[c]);
          task.y[b * task.y_stride + tile + i] = D::total(sum);
        }
      }
    }
  }
};

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
  uint8_t words[kChunk / 8];
  const uint8_t* from[kTile];

  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t rows = end - tile < kTile ? end - tile : kTile;
    std::memset(sums, 0, sizeof(sums));
    for (int64_t r = 0; r < rows; ++r) from[r] = first_value<D>(weight, tile + r);

    for (int64_t column = 0; column < weight.columns; column += kChunk) {
      const auto* x = reinterpret_cast<const uint8_t*>(static_cast<const float*>(task.x) + column * kWide);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t columns = weight.columns - column < kChunk ? weight.columns - column : kChunk;
        const uint8_t* mask = weight.mask + (tile + r) * weight.mask_stride + column / 8;
        mask = whole_words(mask, columns, words);
        const int64_t count = D::columns(mask, (columns + kBlock - 1) / kBlock, at);
        const float* w = D::widen(readable(from[r], weight.end, copy, kChunk * D::kBytes), count, widened);
        from[r] += count * D::kBytes;

        Vector sum[kChains][kVectors];
        for (int c = 0; c < kChains; ++c) {
          for (int v = 0; v < kVectors; ++v) sum[c][v] = D::splat(0.0f);
        }
        const auto use = [&](float weight_here, uint64_t offset, int chain) __attribute__((always_inline)) {
          const auto* column_of_x = reinterpret_cast<const float*>(x + offset);
          const Vector value = D::splat(weight_here);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            sum[chain][v] = D::multiply_add(value, D::load(column_of_x + v * D::kLanes), sum[chain][v]);
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
