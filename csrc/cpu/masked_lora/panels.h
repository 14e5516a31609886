// The row kernels of csrc/cpu/masked_lora.cpp, one per instruction set. Strides are in elements; the last dimension of
// every matrix is dense.
#pragma once

#include <cstdint>

#include "common/float_type.h"

namespace losa::masked_lora {

// Columns (a multiple of 32) whose slice of lora_A, 64 KB, stays in the second-level cache while the rows pass by. Long
// pieces of a row, because those come from memory.
constexpr int64_t chunk_columns(int64_t rank) {
  return (1 << 14) / (rank > 4 ? rank : 4) / 32 * 32;
}

// Which entries of a panel are kept: by packed bits, or where they are null by weight != 0.
struct Kept {
  const uint8_t* bits;
  int64_t bits_stride;
  const void* weight;
  int64_t weight_stride;
  FloatType weight_type;
};

// out = M * (W + B A), rounded once to out's type. Without base: M * (B A); rank 0: M * W.
struct Compose {
  Kept kept;
  bool base;
  const float* lora_A;  // (rank, columns)
  const float* lora_B;  // (rows, rank), scaled, dense
  int64_t lora_A_stride, rank;
  void* out;
  int64_t out_stride;
  FloatType out_type;
  int64_t rows, columns;
  float* scratch;
};

// Of a gradient panel G:  dA += B^T (M * G),  dB += (M * G) A^T; either may be null.
struct Project {
  Kept kept;
  const void* gradient;
  int64_t gradient_stride;
  FloatType gradient_type;
  const float* lora_A;  // (rank, columns)
  const float* lora_B;  // (rows, rank), scaled, dense
  int64_t lora_A_stride, rank;
  float* dA;  // (rank, padded columns)
  float* dB;  // (rows, rank), dense
  int64_t rows, columns;
  float* scratch;
};

constexpr int64_t kProjectRows = 8;

// Whole registers of any instruction set.
constexpr int64_t padded(int64_t columns) {
  return (columns + 31) / 32 * 32;
}

// floats of scratch
constexpr int64_t compose_scratch(int64_t rank) {
  return rank * chunk_columns(rank);
}

constexpr int64_t project_scratch(int64_t rank) {
  return (rank + kProjectRows) * chunk_columns(rank);
}

void compose_scalar(const Compose& panel);
void compose_avx2(const Compose& panel);
void compose_avx512(const Compose& panel);

void project_scalar(const Project& panel);
void project_avx2(const Project& panel);
void project_avx512(const Project& panel);

}  // namespace losa::masked_lora
