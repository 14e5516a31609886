// Row kernels of selection.cpp. A key is a score's order as an int32: the bits of a float >= 0, and -1 for an entry
// that is pruned already.
#pragma once

#include <cstdint>

#include "common/float_type.h"
#include "cpu/isa.h"

namespace losa::selection {

struct KeyRange {
  int32_t least, most;  // of the keys >= 0
  int64_t lost;         // keys of -1
};

struct Kernels {
  // |w| * norm
  void (*wanda_keys)(const void* weight, FloatType type, const float* norms, int64_t n, int32_t* keys);
  // (w / u)^2
  void (*sweep_keys)(const float* weight, const float* diagonal, int64_t n, int32_t* keys);
  // keys[j] = -1 where kept[j] is 0
  void (*drop_pruned)(const uint8_t* kept, int64_t n, int32_t* keys);
  KeyRange (*range)(const int32_t* keys, int64_t n);
  int64_t (*count_up_to)(const int32_t* keys, int64_t n, int32_t bound);
  // Moves the keys of [least, most] to the front; how many.
  int64_t (*gather)(int32_t* keys, int64_t n, int32_t least, int32_t most);
  // kept[j] = 0 where keys[j] < bound, or == bound in the first `ties` columns, or -1; else 1
  void (*keep_above)(const int32_t* keys, int64_t n, int32_t bound, int64_t ties, uint8_t* kept);
  // kept[j] = 0 where keys[j] is among the `count` smallest of its group of m, or -1; else 1
  void (*keep_of_groups)(const int32_t* keys, int64_t n, int64_t m, int64_t count, uint8_t* kept, int32_t* scratch);
};

// int32s of 64-byte aligned scratch for keep_of_groups
constexpr int64_t group_scratch(int64_t m) {
  return 2 * 16 * m;
}

LOSA_KERNELS(Kernels)

}  // namespace losa::selection
