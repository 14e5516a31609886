// The small kernels of a decoder's step: residual sum + RMS norm, rotary positions + cache write, SiLU(gate) * up.
// Each lets the next kernel of the stream start at once, so that the next kernel requests its weights while these run.
#pragma once

#include <cstdint>

#include "cuda/elements.h"
#include "cuda/launch.h"

namespace losa::decoder_step {

// x += update; out = x / sqrt(mean(x^2) + eps) * weight

struct AddRmsNorm {
  void* x;             // (rows, columns), written where there is an update
  const void* update;  // (rows, columns) or null
  const void* weight;  // (columns,)
  void* out;           // (rows, columns)
  int64_t rows;
  int columns;
  float eps;
};

constexpr int kNormThreads = 1024;
constexpr int kHeld = 2;  // vectors of a thread that stay in registers; the rest of wider rows is read again

// A block for each row. A vector has kCount columns, which divides `columns`. Roundings are the ones of transformers:
// of the sum, of the normalised row, and of its product with the weight.
template <FloatType kType, int kCount>
__global__ void __launch_bounds__(kNormThreads) add_rms_norm_kernel(AddRmsNorm task) {
  using Vector = Elements<kType, kCount>;
  __shared__ float sums[kNormThreads / 32];
  const int vectors = task.columns / kCount, threads = static_cast<int>(blockDim.x),
            own = static_cast<int>(threadIdx.x);
  const int64_t row = int64_t{blockIdx.x} * task.columns;
  let_next_kernel_start();
  Vector held[kHeld], scale[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = own + i * threads;
    if (v < vectors) scale[i].load(task.weight, int64_t{v} * kCount);  // [threads, kCount]
  }
  wait_for_kernels_before();

  float squares = 0.0f;
  // The row with its update, and the sum of its squares.
  const auto add_update = [&](int v) {
    Vector sum;
    const int64_t place = row + int64_t{v} * kCount;
    sum.load(task.x, place);  // [threads, kCount] of [columns]
    if (task.update != nullptr) {
      Vector update;
      update.load(task.update, place);  // [threads, kCount] of [columns]
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum.values[i] = rounded<kType>(sum.values[i] + update.values[i]);
      sum.store(task.x, place);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) squares += sum.values[i] * sum.values[i];
    return sum;
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = own + i * threads;
    if (v < vectors) held[i] = add_update(v);
  }
  for (int v = own + kHeld * threads; v < vectors; v += threads) add_update(v);

  squares = sum_over_warp(squares);
  const int lane = own % 32;
  if (lane == 0) sums[own / 32] = squares;
  __syncthreads();
  squares = sum_over_warp(lane < threads / 32 ? sums[lane] : 0.0f);
  const float factor = 1.0f / sqrtf(squares / static_cast<float>(task.columns) + task.eps);

  // The normalised row.
  const auto normalise = [&](int v, Vector values, const Vector& weight) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values.values[i] = rounded<kType>(values.values[i] * factor) * weight.values[i];
    values.store(task.out, row + int64_t{v} * kCount);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = own + i * threads;
    if (v < vectors) normalise(v, held[i], scale[i]);
  }
  for (int v = own + kHeld * threads; v < vectors; v += threads) {
    Vector sum, weight;
    sum.load(task.x, row + int64_t{v} * kCount);    // [threads, kCount] of [columns]
    weight.load(task.weight, int64_t{v} * kCount);  // [threads, kCount] of [columns]
    normalise(v, sum, weight);
  }
}

// out = silu(gate) * up

struct GatedSilu {
  const void* gate_up;  // (rows, 2 columns)
  void* out;            // (rows, columns)
  int64_t rows;
  int columns;
};

constexpr int kSiluThreads = 128, kMostRowBlocks = 65535;

// A thread for each kCount columns, which divides `columns`. Roundings are torch's: of SiLU, and of the product.
template <FloatType kType, int kCount>
__global__ void __launch_bounds__(kSiluThreads) gated_silu_kernel(GatedSilu task) {
  let_next_kernel_start();
  wait_for_kernels_before();
  const int64_t column = (int64_t{blockIdx.x} * kSiluThreads + threadIdx.x) * kCount, columns = task.columns;
  if (column >= columns) return;
  for (int64_t row = blockIdx.y; row < task.rows; row += gridDim.y) {
    Elements<kType, kCount> gate, up;
    gate.load(task.gate_up, row * 2 * columns + column);          // [128, kCount] of [columns]
    up.load(task.gate_up, row * 2 * columns + columns + column);  // [128, kCount] of [columns]
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = gate.values[i];
      up.values[i] *= rounded<kType>(value / (1.0f + expf(-value)));
    }
    up.store(task.out, row * columns + column);
  }
}

// rotary positions of queries and keys; keys and values into the cache

struct Rotation {
  const void* heads;            // (queries + 2 * keys, size): queries, keys, values
  const void* cos;              // (places, size)
  const void* sin;              // (places, size), its first half negated
  const int64_t* position;      // of the token, in cos, sin and cache
  const void *q_norm, *k_norm;  // (size,): weights of RMS norms before the rotation; or null
  float eps;                    // of these norms
  void* rotated;                // (queries, size)
  void* cache;                  // (2, keys, places, size)
  int queries, keys, size;
  int64_t places;
};

constexpr int kHeadsOfBlock = 4;
constexpr int kMostPairs = 4;  // of a lane: heads have up to 256 elements

// A warp for each head. A lane has the pairs (i, i + size / 2) for every 32nd i.
template <FloatType kType>
__global__ void __launch_bounds__(32 * kHeadsOfBlock) rotate_and_store_kernel(Rotation task) {
  let_next_kernel_start();
  wait_for_kernels_before();
  const int head = static_cast<int>(blockIdx.x) * kHeadsOfBlock + static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, half = task.size / 2;
  if (head >= task.queries + 2 * task.keys) return;
  const int64_t position = __ldcg(task.position);
  // Whatever the position is, nothing is written beyond the cache.
  if (position < 0 || position >= task.places) return;

  // The head's pairs, and the sum of their squares.
  float low[kMostPairs], high[kMostPairs];
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kMostPairs; ++p) {
    const int i = lane + 32 * p;
    low[p] = high[p] = 0.0f;
    if (i < half) {
      low[p] = load_element<kType>(task.heads, int64_t{head} * task.size + i);          // [32] of [half]
      high[p] = load_element<kType>(task.heads, int64_t{head} * task.size + half + i);  // [32] of [half]
    }
    squares += low[p] * low[p] + high[p] * high[p];
  }

  // The norm.
  const bool is_query = head < task.queries, is_value = head >= task.queries + task.keys;
  const void* const norm = is_value ? nullptr : is_query ? task.q_norm : task.k_norm;
  if (norm != nullptr) {
    const float factor = 1.0f / sqrtf(sum_over_warp(squares) / static_cast<float>(task.size) + task.eps);
#pragma unroll
    for (int p = 0; p < kMostPairs; ++p) {
      const int i = lane + 32 * p;
      if (i < half) {
        low[p] = rounded<kType>(rounded<kType>(low[p] * factor) * load_element<kType>(norm, i));
        high[p] = rounded<kType>(rounded<kType>(high[p] * factor) * load_element<kType>(norm, half + i));
      }
    }
  }

  // The rotation. The cache holds the keys of all heads, then the values of all heads.
  void* const to = is_query ? task.rotated : task.cache;
  const int64_t row = is_query ? head : (head - task.queries) * task.places + position;
#pragma unroll
  for (int p = 0; p < kMostPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= half) continue;
    float first = low[p], second = high[p];
    if (!is_value) {
      const int64_t angle = position * task.size + i;
      first = low[p] * load_element<kType>(task.cos, angle) + high[p] * load_element<kType>(task.sin, angle);
      second =
          high[p] * load_element<kType>(task.cos, angle + half) + low[p] * load_element<kType>(task.sin, angle + half);
    }
    store_element<kType>(to, row * task.size + i, first);
    store_element<kType>(to, row * task.size + half + i, second);
  }
}

}  // namespace losa::decoder_step
