// Body of selection_{scalar,avx2,avx512}.cpp: plain loops, which the compiler turns into each file's instructions.
#pragma once

#include "cpu/lanes.h"
#include "cpu/selection.h"

namespace losa::selection {
namespace {

struct Float {
  using Stored = float;
  static float magnitude(float w) { return __builtin_fabsf(w); }
};

struct BFloat16 {
  using Stored = uint16_t;
  static float magnitude(uint16_t w) { return __builtin_bit_cast(float, (w & 0x7fffu) << 16); }
};

struct Half {
  using Stored = uint16_t;
  static float magnitude(uint16_t w) {
    const uint32_t bits = (w & 0x7fffu) << 13;
    // A subnormal's bits on top of 2^-14, less 2^-14.
    const float subnormal = __builtin_bit_cast(float, bits + 0x38800000u) - 0x1p-14f;
    const float normal = __builtin_bit_cast(float, bits + 0x38000000u);
    return bits < 0x00800000u ? subnormal : normal;
  }
};

template <class Type>
void wanda_keys_of(const void* weight, const float* norms, int64_t n, int32_t* keys) {
  const auto* w = static_cast<const typename Type::Stored*>(weight);
  for (int64_t j = 0; j < n; ++j) keys[j] = score_key(Type::magnitude(w[j]) * norms[j]);
}

void wanda_keys(const void* weight, FloatType type, const float* norms, int64_t n, int32_t* keys) {
  switch (type) {
    case FloatType::kFloat: return wanda_keys_of<Float>(weight, norms, n, keys);
    case FloatType::kHalf: return wanda_keys_of<Half>(weight, norms, n, keys);
    case FloatType::kBFloat16: return wanda_keys_of<BFloat16>(weight, norms, n, keys);
  }
}

void sweep_keys(const float* weight, const float* diagonal, int64_t n, int32_t* keys) {
  for (int64_t j = 0; j < n; ++j) {
    const float scaled = weight[j] / diagonal[j];
    keys[j] = score_key(scaled * scaled);
  }
}

void drop_pruned(const uint8_t* kept, int64_t n, int32_t* keys) {
  for (int64_t j = 0; j < n; ++j) keys[j] = kept[j] ? keys[j] : -1;
}

KeyRange range(const int32_t* keys, int64_t n) {
  uint32_t least = 0x7fffffff;  // unsigned, so that -1 is no candidate
  int32_t most = 0, lost = 0;
  for (int64_t j = 0; j < n; ++j) {
    const auto key = static_cast<uint32_t>(keys[j]);
    least = key < least ? key : least;
    most = keys[j] > most ? keys[j] : most;
    lost += keys[j] < 0;
  }
  return {static_cast<int32_t>(least), most, lost};
}

int64_t count_up_to(const int32_t* keys, int64_t n, int32_t bound) {
  int32_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += keys[j] <= bound;
  return count;
}

int64_t gather(int32_t* keys, int64_t n, int32_t least, int32_t most) {
  int64_t found = 0;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t key = keys[j];
    keys[found] = key;
    found += (key >= least) & (key <= most);
  }
  return found;
}

void keep_above(const int32_t* keys, int64_t n, int32_t bound, int64_t ties, uint8_t* kept) {
  for (int64_t j = 0; j < ties; ++j) kept[j] = keys[j] > bound;
  const int32_t least = bound < 0 ? 0 : bound;
  for (int64_t j = ties; j < n; ++j) kept[j] = keys[j] >= least;
}

void keep_of_groups(const int32_t* keys, int64_t n, int64_t m, int64_t count, uint8_t* kept, int32_t* scratch) {
  auto* side_by_side = reinterpret_cast<Ints*>(scratch);
  Ints* chosen = side_by_side + m;
  for (int64_t groups = n / m; groups > 0; groups -= kLanes, keys += kLanes * m, kept += kLanes * m) {
    const int64_t lanes = groups < kLanes ? groups : kLanes;
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t lane = 0; lane < lanes; ++lane) scratch[j * kLanes + lane] = keys[lane * m + j];
      for (int64_t lane = lanes; lane < kLanes; ++lane) scratch[j * kLanes + lane] = 0;
    }
    choose_of_group(side_by_side, m, static_cast<int32_t>(count), chosen);
    for (int64_t j = 0; j < m; ++j) {
      const Ints keep = ~(chosen[j] | (side_by_side[j] < 0)) & 1;
      for (int64_t lane = 0; lane < lanes; ++lane) kept[lane * m + j] = static_cast<uint8_t>(keep[lane]);
    }
  }
}

constexpr Kernels kKernels = {wanda_keys,  sweep_keys, drop_pruned, range,
                              count_up_to, gather,     keep_above,  keep_of_groups};

}  // namespace
}  // namespace losa::selection
