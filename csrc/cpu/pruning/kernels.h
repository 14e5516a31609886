// The kernel of column_sweep.cpp.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace losa::pruning {

// Up to 16 rows of one column block; pointers are at the panel's first row, and at the block's first column but for the
// packed masks, which are at column 0.
struct Panel {
  float* weight;
  int64_t weight_stride;
  float* errors;
  int64_t errors_stride;
  uint8_t* kept;
  const uint8_t* mask;  // already pruned entries; may be null
  int64_t kept_stride, mask_stride;
  float* loss;
  const float* upper;  // width x width, dense
  int64_t first_column, width, rows;
  // keep_n:m prunes `prune` of each group of m, m > 0; else entries before (key, column, row), relative to the panel.
  int64_t m, prune;
  int32_t key;
  int64_t tied_columns, tied_rows;
  float* scratch;  // 64-byte aligned
};

// floats of scratch
constexpr int64_t panel_scratch(int64_t width, int64_t m) {
  return 16 * (3 * width + m);
}

struct Kernels {
  void (*sweep_panel)(const Panel& panel);
};

LOSA_KERNELS(Kernels)

}  // namespace losa::pruning
