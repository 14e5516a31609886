// The kernels of panels.cpp: panels in one pass over memory, with the rank's products in registers.
#pragma once

#include <algorithm>

#include "cpu/masked_lora/kernels.h"
#include "cpu/simd/float_lanes.h"

namespace losa::masked_lora {
namespace {

constexpr int kVectors = 2;  // registers of columns side by side
constexpr int64_t kStep = kVectors * kLanes;
// Rows side by side in compose, and rows by ranks in project's dB: with kVectors, accumulators for half the registers.
constexpr int kRows = 4;
constexpr int kRanks = kLanes == 16 ? 4 : 2;

// The slice of lora_A for columns [first, first + count), dense, with zeros up to a whole number of steps.
inline void copy_lora_A(const float* lora_A, int64_t stride, int64_t rank, int64_t first, int64_t count, float* to,
                        int64_t to_stride) {
  for (int64_t k = 0; k < rank; ++k, to += to_stride) {
    std::memcpy(to, lora_A + k * stride + first, static_cast<size_t>(count) * sizeof(float));
    for (int64_t j = count; j < padded(count); ++j) to[j] = 0;
  }
}

// kCount rows by kStep columns of out, of which `count` exist; kWhole: all of them.
template <int kCount, bool kWhole, class Weight, class Out>
inline void compose_tile(const Compose& panel, const float* lora_A, int64_t row, int64_t column, int64_t count) {
  const auto* weight = static_cast<const typename Weight::Stored*>(panel.kept.weight);
  auto* out = static_cast<typename Out::Stored*>(panel.out);
  Floats sum[kCount][kVectors];
  uint32_t kept[kCount][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const auto* from = weight + (row + i) * panel.kept.weight_stride + column;
    const uint8_t* bits = panel.kept.bits + (row + i) * panel.kept.bits_stride;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = kWhole ? kLanes : std::clamp<int64_t>(count - v * kLanes, 0, kLanes);
      const Floats w = kWhole ? load<Weight>(from + v * kLanes) : load_part<Weight>(from + v * kLanes, left);
      kept[i][v] = panel.kept.bits == nullptr ? nonzero_bits(w) : mask_bits(bits, column + v * kLanes, left);
      sum[i][v] = panel.base ? w : Floats{};
    }
    // The next rows; memory is slow to start a row of its own accord.
    if constexpr (kWhole) __builtin_prefetch(from + kCount * panel.kept.weight_stride);
    if constexpr (kWhole && kStep * sizeof *from > 64) {
      __builtin_prefetch(from + kCount * panel.kept.weight_stride + kLanes);
    }
  }
  const int64_t chunk = chunk_columns(panel.rank);
  const float* scale = panel.lora_B + row * panel.rank;
  for (int64_t k = 0; k < panel.rank; ++k, lora_A += chunk) {
    Floats a[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) a[v] = load<FloatLanes>(lora_A + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const float b = scale[i * panel.rank + k];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += a[v] * b;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    auto* to = out + (row + i) * panel.out_stride + column;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = keep(sum[i][v], kept[i][v]);
      if constexpr (kWhole) {
        store<Out>(to + v * kLanes, value);
      } else {
        store_part<Out>(to + v * kLanes, value, std::clamp<int64_t>(count - v * kLanes, 0, kLanes));
      }
    }
  }
}

template <int kCount, class Weight, class Out>
void compose_row_block(const Compose& panel, int64_t row, int64_t first, int64_t count) {
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    compose_tile<kCount, true, Weight, Out>(panel, panel.scratch + j, row, first + j, kStep);
  }
  if (j < count) compose_tile<kCount, false, Weight, Out>(panel, panel.scratch + j, row, first + j, count - j);
}

void compose(const Compose& panel) {
  with_type(panel.kept.weight_type, [&](auto weight) {
    with_type(panel.out_type, [&](auto out) {
      using Weight = decltype(weight);
      using Out = decltype(out);
      const int64_t chunk = chunk_columns(panel.rank);
      for (int64_t first = 0; first < panel.columns; first += chunk) {
        const int64_t count = std::min(panel.columns - first, chunk);
        copy_lora_A(panel.lora_A, panel.lora_A_stride, panel.rank, first, count, panel.scratch, chunk);
        int64_t row = 0;
        for (; row + kRows <= panel.rows; row += kRows) compose_row_block<kRows, Weight, Out>(panel, row, first, count);
        for (; row < panel.rows; ++row) compose_row_block<1, Weight, Out>(panel, row, first, count);
      }
    });
  });
}

// One row of M * G as fp32, with zeros up to a whole number of steps.
template <class Gradient, class Weight>
inline void masked_row(const Project& panel, int64_t row, int64_t first, int64_t count, float* to) {
  const auto* from =
      static_cast<const typename Gradient::Stored*>(panel.gradient) + row * panel.gradient_stride + first;
  const auto* weight =
      static_cast<const typename Weight::Stored*>(panel.kept.weight) + row * panel.kept.weight_stride + first;
  const uint8_t* bits = panel.kept.bits == nullptr ? nullptr : panel.kept.bits + row * panel.kept.bits_stride;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const uint32_t kept = bits == nullptr ? nonzero_bits(load<Weight>(weight + j)) : mask_bits(bits, first + j);
    store<FloatLanes>(to + j, keep(load<Gradient>(from + j), kept));
  }
  if (j < count) {
    const int64_t left = count - j;
    const uint32_t kept =
        bits == nullptr ? nonzero_bits(load_part<Weight>(weight + j, left)) : mask_bits(bits, first + j, left);
    store<FloatLanes>(to + j, keep(load_part<Gradient>(from + j, left), kept));
    j += kLanes;
  }
  for (; j < padded(count); j += kLanes) store<FloatLanes>(to + j, Floats{});
}

// A tile of M * G and the factors it is projected on, all with padded rows.
struct Tile {
  const float* gradient;  // (rows, count)
  const float* lora_A;    // (rank, count)
  const float* lora_B;    // (rows, rank), dense
  int64_t gradient_stride, lora_A_stride, rank, rows, count;
};

// dA[k.. k + kCount, j.. j + kStep] += B^T tile
template <int kCount>
inline void add_to_dA(const Tile& tile, int64_t k, int64_t j, float* dA, int64_t stride) {
  Floats sum[kCount][kVectors];
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[c][v] = load<FloatLanes>(dA + (k + c) * stride + j + v * kLanes);
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    Floats g[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      g[v] = load<FloatLanes>(tile.gradient + i * tile.gradient_stride + j + v * kLanes);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      const float b = tile.lora_B[i * tile.rank + k + c];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[c][v] += g[v] * b;
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store<FloatLanes>(dA + (k + c) * stride + j + v * kLanes, sum[c][v]);
  }
}

// dB[i.. i + kHeight, k.. k + kCount] += tile A^T
template <int kHeight, int kCount>
inline void add_to_dB(const Tile& tile, int64_t i, int64_t k, float* dB) {
  Floats total[kHeight][kCount] = {};
  for (int64_t j = 0; j < padded(tile.count); j += kLanes) {
    Floats g[kHeight];
#pragma GCC unroll 4
    for (int r = 0; r < kHeight; ++r) g[r] = load<FloatLanes>(tile.gradient + (i + r) * tile.gradient_stride + j);
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      const Floats a = load<FloatLanes>(tile.lora_A + (k + c) * tile.lora_A_stride + j);
#pragma GCC unroll 4
      for (int r = 0; r < kHeight; ++r) total[r][c] += g[r] * a;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) dB[(i + r) * tile.rank + k + c] += sum(total[r][c]);
  }
}

template <int kHeight>
inline void add_rows_to_dB(const Tile& tile, int64_t i, float* dB) {
  int64_t k = 0;
  for (; k + kRanks <= tile.rank; k += kRanks) add_to_dB<kHeight, kRanks>(tile, i, k, dB);
  for (; k < tile.rank; ++k) add_to_dB<kHeight, 1>(tile, i, k, dB);
}

// dA (rank, .. of `stride`) and dB (rows, rank), where they are not null.
void project_tile(const Tile& tile, float* dA, int64_t stride, float* dB) {
  if (dA != nullptr) {
    for (int64_t j = 0; j < tile.count; j += kStep) {
      int64_t k = 0;
      for (; k + kRows <= tile.rank; k += kRows) add_to_dA<kRows>(tile, k, j, dA, stride);
      for (; k < tile.rank; ++k) add_to_dA<1>(tile, k, j, dA, stride);
    }
  }
  if (dB != nullptr) {
    int64_t i = 0;
    for (; i + kRows <= tile.rows; i += kRows) add_rows_to_dB<kRows>(tile, i, dB);
    for (; i < tile.rows; ++i) add_rows_to_dB<1>(tile, i, dB);
  }
}

void project(const Project& panel) {
  const int64_t rank = panel.rank, chunk = chunk_columns(rank), stride = padded(panel.columns);
  float* lora_A = panel.scratch;
  float* gradient = lora_A + rank * chunk;
  for (int64_t first = 0; first < panel.columns; first += chunk) {
    const int64_t count = std::min(panel.columns - first, chunk);
    copy_lora_A(panel.lora_A, panel.lora_A_stride, rank, first, count, lora_A, chunk);
    for (int64_t row = 0; row < panel.rows; row += kProjectRows) {
      const int64_t rows = std::min(panel.rows - row, kProjectRows);
      with_type(panel.gradient_type, [&](auto type) {
        with_type(panel.kept.weight_type, [&](auto weight) {
          for (int64_t i = 0; i < rows; ++i) {
            masked_row<decltype(type), decltype(weight)>(panel, row + i, first, count, gradient + i * chunk);
          }
        });
      });
      const Tile tile{gradient, lora_A, panel.lora_B + row * rank, chunk, chunk, rank, rows, count};
      project_tile(tile, panel.dA == nullptr ? nullptr : panel.dA + first, stride,
                   panel.dB == nullptr ? nullptr : panel.dB + row * rank);
    }
  }
}

}  // namespace
}  // namespace losa::masked_lora
