// Keys of scores, and which entries are kept by their keys: plain loops, which the compiler turns into vector code.
#include "cpu/selection/kernels.h"

#include <cstring>

#include "cpu/simd/float_lanes.h"

namespace losa::selection {
namespace {

template <class Type>
void wanda_keys_of(const void* weight, const float* norms, int64_t n, int32_t* keys) {
  const auto* w = static_cast<const typename Type::Stored*>(weight);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Ints key;
    score_keys(load<Type>(w + j) * load<FloatLanes>(norms + j), key);
    std::memcpy(keys + j, &key, sizeof key);
  }
  for (; j < n; ++j) keys[j] = score_key(Type::widen(w[j]) * norms[j]);
}

// A score has the weight's sign, which score_key leaves out.
void wanda_keys(const void* weight, FloatType type, const float* norms, int64_t n, int32_t* keys) {
  with_type(type, [&](auto stored) { wanda_keys_of<decltype(stored)>(weight, norms, n, keys); });
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

}  // namespace

const Kernels LOSA_ISA::kKernels = {
    .wanda_keys = wanda_keys,
    .sweep_keys = sweep_keys,
    .drop_pruned = drop_pruned,
    .range = range,
    .count_up_to = count_up_to,
    .gather = gather,
    .keep_above = keep_above,
    .keep_of_groups = keep_of_groups,
};

}  // namespace losa::selection
