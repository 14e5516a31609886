// What the window kernel and the row kernel of sparse_linear are given, and how both read the mask and a bias.
//
// `rows` are always rows of the weight, that is columns of y; x and y have `batch` rows.
#pragma once

#include "common/bits.h"
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/machine.h"
#include "cuda/packed_rows.h"

namespace losa::sparse_linear {

constexpr int kWindowColumns = 1024;  // a 32-bit word of the mask for each lane

// A packed weight (rows, columns): a bit of the mask for every column, and the kept values row after row.
struct Weight {
  const void* values;      // a multiple of 16 bytes
  int64_t lead, total;     // indices from `values` on: of the weight's first value, and behind its last one
  const int64_t* offsets;  // (rows,): each row's first value, from `lead` on; null if all rows have `length` values
  int64_t length;
  int per_byte;         // values of every 8 columns where this is one number (N:M), else 0
  const uint8_t* mask;  // (rows, mask_stride)
  int64_t mask_stride, rows;
  int columns;
  bool word_aligned;  // every row of the mask is whole 32-bit words, at a multiple of 4 bytes
};

struct Task {
  Weight weight;
  const void* x;     // (batch, x_stride): rows at multiples of 16 bytes, zeros from `columns` up to a multiple of 8
  int64_t x_stride;  // in elements
  int batch;
  const void* bias;  // (rows,) or null
  FloatType bias_type;
  void* y;    // (batch, rows), dense, of the dtype of x
  int split;  // row kernel: warps that share a group of rows, 1, 2, 4 or 8
  int slice;  // row kernel: columns of each of these warps, a multiple of kStepColumns
};

__device__ __forceinline__ float load_bias(const void* bias, FloatType type, int64_t index) {
  if (type == FloatType::kFloat) return static_cast<const float*>(bias)[index];
  const uint16_t bits = static_cast<const uint16_t*>(bias)[index];
  return type == FloatType::kHalf ? widen_half(bits) : widen<FloatType::kBFloat16>(bits);
}

// The index of a row's first value, from `values` on.
__device__ __forceinline__ int64_t first_value(const Weight& weight, int64_t row) {
  return weight.lead + losa::first_value(weight.offsets, row, weight.length, weight.total - weight.lead);
}

// 32 columns of a row of the mask, from `column` on; bits beyond the last column are zero.
__device__ __forceinline__ unsigned mask_word(const Weight& weight, const uint8_t* row, int column) {
  const int left = weight.columns - column;
  if (left <= 0) return 0;
  unsigned word = 0;
  if (weight.word_aligned) {
    word = *reinterpret_cast<const unsigned*>(row + column / 8);  // [32 columns]
  } else {
#pragma unroll 1
    for (int byte = 0; byte < 4; ++byte) {
      if (left > 8 * byte) word |= static_cast<unsigned>(row[column / 8 + byte]) << (8 * byte);  // [8 columns]
    }
  }
  return left >= 32 ? word : word & ((1u << left) - 1);
}

}  // namespace losa::sparse_linear
