// SparseGPT's sweep of a panel of rows. Rows lie side by side in a register; a column is brought up to date when its
// turn comes, by all the errors before it, so that it is loaded and stored once. Tiles of columns give the
// multiply-adds enough independent chains.
#include "cpu/pruning/kernels.h"

#include "cpu/simd/lanes.h"
#include "cpu/simd/transpose.h"

namespace losa::pruning {
namespace {

constexpr int kTile = 8;  // columns; latency of a multiply-add times two units

// The block's columns, for as many rows as there are lanes.
struct Columns {
  Floats* weight;
  Floats* errors;
  Ints* chosen;
  const float* upper;
  int64_t width;

  // weight[column..] of kCount columns, less the errors of columns [from, to)
  template <int kCount>
  inline void updated(int64_t from, int64_t to, int64_t column, Floats* out) const {
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) out[c] = weight[column + c];
    const float* row = upper + from * width + column;
    for (int64_t i = from; i < to; ++i, row += width) {
      const Floats error = errors[i];
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c) out[c] -= error * row[c];
    }
  }

  template <int kCount>
  inline void update(int64_t from, int64_t to, int64_t column) const {
    Floats w[kCount];
    updated<kCount>(from, to, column, w);
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) weight[column + c] = w[c];
  }

  template <int kCount>
  inline void sweep(int64_t from, int64_t column) const {
    Floats w[kCount];
    updated<kCount>(from, column, column, w);
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) {
      const float* row = upper + (column + c) * width + column;
      const Ints gone = chosen[column + c];
      const Floats error = __builtin_bit_cast(Floats, __builtin_bit_cast(Ints, w[c] / row[c]) & gone);
      errors[column + c] = error;
      weight[column + c] = __builtin_bit_cast(Floats, __builtin_bit_cast(Ints, w[c]) & ~gone);
#pragma GCC unroll 8
      for (int next = c + 1; next < kCount; ++next) w[next] -= error * row[next];
    }
  }

  void update_range(int64_t from, int64_t to, int64_t begin, int64_t end) const {
    if (from == to) return;
    for (; begin + kTile <= end; begin += kTile) update<kTile>(from, to, begin);
    for (; begin + 4 <= end; begin += 4) update<4>(from, to, begin);
    for (; begin < end; ++begin) update<1>(from, to, begin);
  }

  // Columns [begin, end), to which the errors before `from` have been applied.
  void sweep_range(int64_t from, int64_t begin, int64_t end) const {
    for (; begin + kTile <= end; begin += kTile) sweep<kTile>(from, begin);
    for (; begin + 4 <= end; begin += 4) sweep<4>(from, begin);
    for (; begin < end; ++begin) sweep<1>(from, begin);
  }

  inline void keys(int64_t column, Ints& out) const {
    const Floats scaled = weight[column] / upper[column * (width + 1)];
    score_keys(scaled * scaled, out);
  }
};

inline void load_pruned(const Panel& panel, Ints* pruned) {
  for (int64_t j = 0; j < panel.width; ++j) pruned[j] = Ints{};
  if (panel.mask == nullptr) return;
  for (int64_t row = 0; row < panel.rows; ++row) {
    const uint8_t* bits = panel.mask + row * panel.mask_stride;
    for (int64_t j = 0; j < panel.width; ++j) {
      const int64_t column = panel.first_column + j;
      pruned[j][row] = ((bits[column >> 3] >> (column & 7)) & 1) - 1;
    }
  }
}

inline void store_kept(const Panel& panel, const Ints* chosen) {
  const int64_t begin = panel.first_column, end = begin + panel.width;
  for (int64_t byte = begin >> 3; byte <= (end - 1) >> 3; ++byte) {
    Ints bits = {};
    int ours = 0;
    for (int b = 0; b < 8; ++b) {
      const int64_t column = 8 * byte + b;
      if (column < begin || column >= end) continue;
      ours |= 1 << b;
      bits |= ~chosen[column - begin] & (1 << b);
    }
    for (int64_t row = 0; row < panel.rows; ++row) {
      uint8_t& kept = panel.kept[row * panel.kept_stride + byte];
      kept = static_cast<uint8_t>((kept & ~ours) | bits[row]);
    }
  }
}

void sweep_rows(const Panel& panel) {
  auto* weight = reinterpret_cast<Floats*>(panel.scratch);
  Floats* errors = weight + panel.width;
  auto* chosen = reinterpret_cast<Ints*>(errors + panel.width);
  Ints* group_keys = chosen + panel.width;
  const Columns columns{weight, errors, chosen, panel.upper, panel.width};
  const int64_t width = panel.width, m = panel.m;

  if (panel.rows < kLanes) {
    for (int64_t j = 0; j < width; ++j) weight[j] = Floats{};
  }
  transpose(panel.weight, panel.weight_stride, panel.rows, width, panel.scratch, kLanes);
  load_pruned(panel, chosen);

  if (m == 0) {
    Ints tied_rows;
    for (int lane = 0; lane < kLanes; ++lane) tied_rows[lane] = lane < panel.tied_rows ? -1 : 0;
    for (int64_t j = 0; j < width; ++j) {
      Ints keys, ties = {};
      columns.keys(j, keys);
      if (j < panel.tied_columns) ties = ~ties;
      if (j == panel.tied_columns) ties = tied_rows;
      chosen[j] |= (keys < panel.key) | ((keys == panel.key) & ties);
    }
    columns.sweep_range(0, 0, width);
  } else {
    // Several small groups together, so that most of an update runs at full width.
    const int64_t step = m * (m < kTile ? kTile / m : 1);
    for (int64_t first = 0; first < width; first += step) {
      const int64_t end = first + step < width ? first + step : width;
      columns.update_range(0, first, first, end);
      for (int64_t group = first; group < end; group += m) {
        columns.update_range(first, group, group, group + m);
        Ints* pruned = chosen + group;
        for (int64_t j = 0; j < m; ++j) {
          columns.keys(group + j, group_keys[j]);
          group_keys[j] |= pruned[j];  // -1 where pruned
        }
        // choose_of_group writes where the pruned entries were; their keys still tell them apart.
        choose_of_group(group_keys, m, static_cast<int32_t>(panel.prune), pruned);
        for (int64_t j = 0; j < m; ++j) pruned[j] |= group_keys[j] < 0;
        columns.sweep_range(group, group, group + m);
      }
    }
  }

  Floats loss = {};
  for (int64_t j = 0; j < width; ++j) loss += errors[j] * errors[j];
  for (int64_t row = 0; row < panel.rows; ++row) panel.loss[row] += loss[row] / 2;
  transpose(panel.scratch, kLanes, width, panel.rows, panel.weight, panel.weight_stride);
  transpose(reinterpret_cast<const float*>(errors), kLanes, width, panel.rows, panel.errors, panel.errors_stride);
  store_kept(panel, chosen);
}

void sweep_panel(const Panel& panel) {
  for (int64_t row = 0; row < panel.rows; row += kLanes) {
    Panel part = panel;
    part.weight += row * part.weight_stride;
    part.errors += row * part.errors_stride;
    part.kept += row * part.kept_stride;
    if (part.mask != nullptr) part.mask += row * part.mask_stride;
    part.loss += row;
    part.rows = panel.rows - row < kLanes ? panel.rows - row : kLanes;
    part.tied_rows -= row;
    sweep_rows(part);
  }
}

}  // namespace

const Kernels LOSA_ISA::kKernels = {.sweep_panel = sweep_panel};

}  // namespace losa::pruning
