// The centred Gram of a slice of columns. Columns lie side by side in a register, samples in groups of kTile; for each
// group and register of columns, a panel holds the group's samples one after another. A tile of the Gram, one group by
// another, is then two streams from cache, two loads for kTile multiply-adds.
#include "cpu/cka/kernels.h"

#include <cstring>

#include "cpu/simd/float_lanes.h"

namespace losa::cka {
namespace {

// Samples of a group. kTile * kTile sums and the kTile factors of one group fill the registers.
#if defined(__AVX512F__)
constexpr int kTile = 5;
#else
constexpr int kTile = 3;
#endif

// A panel's view of its slice, from column `first` on.
struct Place {
  const Slice& slice;
  int64_t first, columns;  // of the panel

  int64_t registers() const { return (columns + kLanes - 1) / kLanes; }
};

// A register of columns, of which the first `columns` exist.
template <class Type>
inline Floats load_columns(const typename Type::Stored* from, int64_t columns) {
  return columns >= kLanes ? load<Type>(from) : load_part<Type>(from, columns);
}

// The panel's samples less their mean. Differences to the first sample are exact where a common component dominates,
// and exactly 0 where all samples agree; their mean rounds little.
template <class Type>
void centre(const Place& place, Floats* panel, Floats* common, Floats* mean) {
  const Slice& slice = place.slice;
  const auto* from = static_cast<const typename Type::Stored*>(slice.features) + place.first;
  const int64_t registers = place.registers();
  for (int64_t c = 0; c < registers; ++c) {
    common[c] = load_columns<Type>(from + c * kLanes, place.columns - c * kLanes);
    mean[c] = Floats{};
  }
  for (int64_t sample = 0; sample < slice.samples; sample += kTile) {
    const int64_t count = slice.samples - sample < kTile ? slice.samples - sample : kTile;
    const auto* rows = from + sample * slice.stride;
    Floats* group = panel + sample * registers;
    for (int64_t c = 0; c < registers; ++c, group += kTile) {
      const Floats first = common[c];
      Floats sum = mean[c];
      for (int64_t s = 0; s < count; ++s) {
        group[s] = load_columns<Type>(rows + s * slice.stride + c * kLanes, place.columns - c * kLanes) - first;
        sum += group[s];
      }
      for (int64_t s = count; s < kTile; ++s) group[s] = Floats{};
      mean[c] = sum;
    }
  }
  for (int64_t c = 0; c < registers; ++c) mean[c] /= static_cast<float>(slice.samples);
  for (int64_t sample = 0; sample < slice.samples; sample += kTile) {
    const int64_t count = slice.samples - sample < kTile ? slice.samples - sample : kTile;
    Floats* group = panel + sample * registers;
    for (int64_t c = 0; c < registers; ++c, group += kTile) {
      for (int64_t s = 0; s < count; ++s) group[s] -= mean[c];
    }
  }
}

// Products of two groups' samples, summed over the panel. Meanwhile a row of the next panel comes in from memory.
template <class Stored>
inline void multiply(const Floats* left, const Floats* right, int64_t registers, const Stored* ahead, float* out) {
  Floats sums[kTile][kTile] = {};
  for (int64_t c = 0; c < registers; ++c, left += kTile, right += kTile, ahead += kLanes) {
    __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kTile; ++j) sums[i][j] += left[i] * right[j];
    }
  }
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; ++j) out[i * kTile + j] = sum(sums[i][j]);
  }
}

template <class Type>
void add_slice_of(const Slice& slice) {
  using Stored = typename Type::Stored;
  const int64_t width = panel_columns(slice.samples);
  auto* common = reinterpret_cast<Floats*>(slice.scratch);
  Floats* mean = common + width / kLanes;
  Floats* panel = mean + width / kLanes;
  for (int64_t first = 0; first < slice.columns; first += width) {
    const int64_t left = slice.columns - first;
    const Place place{slice, first, left < width ? left : width};
    const int64_t registers = place.registers();
    centre<Type>(place, panel, common, mean);
    // Each tile prefetches a row of the next panel; there are at least about as many tiles as rows.
    const Stored* ahead = static_cast<const Stored*>(slice.features) + first + (left > width ? width : 0);
    const Stored* last = ahead + (slice.samples - 1) * slice.stride;
    for (int64_t column = 0; column < slice.samples; column += kTile) {
      for (int64_t row = 0; row <= column; row += kTile) {
        float sums[kTile * kTile];
        multiply(panel + row * registers, panel + column * registers, registers, ahead, sums);
        if (ahead != last) ahead += slice.stride;
        for (int64_t i = row; i < row + kTile && i < slice.samples; ++i) {
          for (int64_t j = column; j < column + kTile && j < slice.samples; ++j) {
            slice.gram[i * slice.samples + j] += static_cast<double>(sums[(i - row) * kTile + j - column]);
          }
        }
      }
    }
  }
}

void add_slice(const Slice& slice) {
  with_type(slice.type, [&](auto type) { add_slice_of<decltype(type)>(slice); });
}

}  // namespace

const Kernels LOSA_ISA::kKernels = {.add_slice = add_slice};

}  // namespace losa::cka
