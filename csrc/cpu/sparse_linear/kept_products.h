// For CPUs without vector instructions that move kept values to their columns: a product for each kept weight and row
// of x.
#pragma once

#include "common/bits.h"
#include "cpu/simd/float_lanes.h"
#include "cpu/sparse_linear/kernels.h"

namespace losa::sparse_linear {
namespace {

// Eight sums for a chunk of a row of W, and eight for the whole row, are as precise as vector code.
template <class V, int kBatch>
void kept_products(const Task& task, int64_t begin, int64_t end) {
  const Weight& weight = task.weight;
  const auto* const values = reinterpret_cast<const typename V::Stored*>(weight.values);
  const auto* const values_end = reinterpret_cast<const typename V::Stored*>(weight.end);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = weight.offsets != nullptr ? weight.offsets[row] : row * weight.row_length;
    // Offsets from a damaged file must not lead out of the buffer.
    const auto* from = values + (first < 0 ? 0 : first > values_end - values ? values_end - values : first);
    const uint8_t* mask = weight.mask + row * weight.mask_stride;
    float totals[8][kBatch] = {}, sums[8][kBatch] = {};
    const auto add_chunk = [&] {
      for (int i = 0; i < 8; ++i) {
        for (int b = 0; b < kBatch; ++b) {
          totals[i][b] += sums[i][b];
          sums[i][b] = 0.0f;
        }
      }
    };
    for (int64_t column = 0; column < weight.columns; column += 8) {
      if (column % 4096 == 0) add_chunk();
      for (unsigned bits = *mask++ & column_bits(weight.columns - column); bits != 0 && from < values_end;
           bits &= bits - 1) {
        const int bit = __builtin_ctz(bits);
        const float w = V::widen(*from++);
        const float* x = static_cast<const float*>(task.x) + (column + bit) * kBatch;
        for (int b = 0; b < kBatch; ++b) sums[bit][b] += w * x[b];
      }
    }
    add_chunk();
    for (int64_t b = 0; b < task.batch; ++b) {
      const float low = (totals[0][b] + totals[1][b]) + (totals[2][b] + totals[3][b]);
      const float high = (totals[4][b] + totals[5][b]) + (totals[6][b] + totals[7][b]);
      task.y[b * task.y_stride + row] = low + high;
    }
  }
}

using Float = FloatLanes;
using BFloat16 = BFloat16Lanes;
using Half = HalfLanes;

// The kernel for V's weights and `batch` rows of x; it counts no values, so that kFixed changes nothing.
template <class V, bool kFixed>
Plan plan(int64_t batch) {
  if (batch <= 1) return {kept_products<V, 1>, 1, 1, Layout::kFloat};
  if (batch <= 4) return {kept_products<V, 4>, 4, 1, Layout::kFloat};
  return {kept_products<V, 16>, 16, 1, Layout::kFloat};
}

}  // namespace
}  // namespace losa::sparse_linear
