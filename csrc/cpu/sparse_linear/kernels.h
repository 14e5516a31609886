// What sparse_linear.cpp and its kernels agree on.
#pragma once

#include <cstdint>

#include "common/float_type.h"
#include "cpu/isa.h"

namespace losa::sparse_linear {

// Columns that a kernel takes at a time: one 64-bit word of the mask.
constexpr int64_t kBlock = 64;
constexpr int64_t kMostBatch = 16;

struct Weight {
  const uint8_t* values;
  const uint8_t* end;  // of the buffer of values: nothing is read beyond
  const uint8_t* mask;
  int64_t mask_stride;
  const int64_t* offsets;  // null: row r begins at value r * row_length
  int64_t row_length;
  int64_t per_byte;  // values of every 8 columns; 0: to be counted
  int64_t columns;
};

struct Task {
  Weight weight;
  const void* x;  // as the plan lays it out
  int64_t batch;  // rows of x
  float* y;       // (batch, out), rows y_stride apart
  int64_t y_stride;
};

// Computes output features begin..end-1. An output depends on nothing but its own row, so that any split over threads
// gives the same bits.
using Kernel = void (*)(const Task& task, int64_t begin, int64_t end);

// A kernel and how it wants x: columns padded with zeros to a multiple of kBlock, rows of x in passes of `batch`
// (padded with zeros too), stored as [pass][column / lanes][row of x][column % lanes].
enum class Layout : int {
  kFloat,     // as floats
  kEvenOdd,   // floats; in every 32 columns the 16 even ones come first
  kBFloat16,  // as the bfloat16 values that x has
};

struct Plan {
  Kernel kernel;
  int64_t batch;
  int64_t lanes;
  Layout layout;
};

struct Kernels {
  // The kernel for weights of a type and so many rows of x. `fixed`: for weights whose per_byte is not 0.
  Plan (*plan)(FloatType weight, int64_t batch, bool fixed);
};

LOSA_KERNELS(Kernels)

// For bfloat16 weights and x, on CPUs that has_bfloat16_products() names: products of bfloat16 pairs, sums in fp32.
Plan plan_bfloat16_pairs(int64_t batch, bool fixed);

}  // namespace losa::sparse_linear
