// What every decode kernel is given, and how it reads a row of the mask and a bias.
#pragma once

#include "common/bits.h"
#include "common/launch.h"
#include "cuda/elements.h"
#include "cuda/machine.h"
#include "cuda/packed_rows.h"

namespace losa::sparse_linear {

constexpr int kWindowColumns = 1024;  // a 32-bit word of the mask for each lane

struct Weight {
  const void* values;      // at a 16-byte boundary
  int64_t lead, total;     // the first value's index from there; the end's
  const int64_t* offsets;  // or null: rows of `length` values
  int64_t length;
  int per_byte;  // values of every 8 columns where that is one number, else 0
  const uint8_t* mask;
  int64_t mask_stride, rows;
  int columns;
  bool words;  // rows of the mask are whole aligned 32-bit words
};

struct Task {
  Weight weight;
  const void* x;     // rows at 16-byte boundaries, of columns rounded up to 8, zeros there
  int64_t x_stride;  // in elements
  int batch;
  const void* bias;  // may be null
  FloatType bias_value;
  void* y;    // batch x rows, dense, of the dtype of x
  int split;  // warps that share a group of rows: 1, 2, 4 or 8
  int slice;  // columns of each of them, a multiple of kStepColumns
};

__device__ __forceinline__ float load_any(const void* data, FloatType value, int64_t index) {
  if (value == FloatType::kFloat) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return value == FloatType::kHalf ? widen_half(bits) : widen<FloatType::kBFloat16>(bits);
}

// Where a row's values begin, from the 16-byte boundary.
__device__ __forceinline__ int64_t first_value(const Weight& weight, int64_t row) {
  return weight.lead + losa::first_value(weight.offsets, row, weight.length, weight.total - weight.lead);
}

// 32 columns of a row of the mask; zeros beyond its end.
__device__ __forceinline__ unsigned mask_word(const Weight& weight, const uint8_t* row, int column) {
  const int left = weight.columns - column;
  if (left <= 0) return 0;
  unsigned word = 0;
  if (weight.words) {
    word = *reinterpret_cast<const unsigned*>(row + column / 8);
  } else {
#pragma unroll 1
    for (int byte = 0; byte < 4; ++byte) {
      if (left > 8 * byte) word |= static_cast<unsigned>(row[column / 8 + byte]) << (8 * byte);
    }
  }
  return left >= 32 ? word : word & ((1u << left) - 1);
}

}  // namespace losa::sparse_linear
