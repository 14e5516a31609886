// The kernel of column_sweep.cpp.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace losa::pruning {

// Up to 16 rows of one column block. Every pointer is at the panel's first row. Pointers to floats are at the block's
// first column; pointers to packed masks are at column 0.
struct Panel {
  float* weight;  // (rows, width)
  int64_t weight_stride;
  float* errors;  // (rows, width)
  int64_t errors_stride;
  uint8_t* kept;        // (rows, packed columns of the whole weight)
  const uint8_t* mask;  // already pruned entries; may be null
  int64_t kept_stride, mask_stride;
  float* loss;         // (rows,)
  const float* upper;  // width x width, dense
  int64_t first_column, width, rows;
  // m > 0: `prune` of each group of m columns go. m = 0: entries go whose score's key is below `key`, or equal to it in
  // the first tied_columns columns or in the first tied_rows rows of the panel in the column after them.
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
