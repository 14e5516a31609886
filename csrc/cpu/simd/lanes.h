// Rows (or groups) side by side in one register, for the files that are compiled once per instruction set. Everything
// here has internal linkage: code built with one file's flags must never serve another.
#pragma once

#include <cstdint>

namespace losa {
namespace {

// One register exactly: the compiler keeps wider vectors in memory.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

// A score's order as an integer: the bits of a float >= 0; -0.0 counts as 0, NaN above everything.
inline int32_t score_key(float score) {
  return __builtin_bit_cast(int32_t, score) & 0x7fffffff;
}

inline void score_keys(const Floats& score, Ints& keys) {
  keys = __builtin_bit_cast(Ints, score) & 0x7fffffff;
}

// chosen[j] = all bits in each lane where keys[j] is among the `count` smallest of m, ties lowest index first.
template <int kM>
inline void choose(const Ints* keys, int64_t any_m, int32_t count, Ints* chosen) {
  const int64_t m = kM > 0 ? kM : any_m;
  for (int64_t j = 0; j < m; ++j) {
    const Ints own = keys[j];
    Ints rank = {};  // how many go before it, negated: a true comparison is -1
#pragma GCC unroll 16
    for (int64_t i = 0; i < j; ++i) rank += keys[i] <= own;
#pragma GCC unroll 16
    for (int64_t i = j + 1; i < m; ++i) rank += keys[i] < own;
    chosen[j] = rank > -count;
  }
}

inline void choose_of_group(const Ints* keys, int64_t m, int32_t count, Ints* chosen) {
  switch (m) {
    case 4: return choose<4>(keys, m, count, chosen);
    case 8: return choose<8>(keys, m, count, chosen);
    case 16: return choose<16>(keys, m, count, chosen);
    default: return choose<0>(keys, m, count, chosen);
  }
}

}  // namespace
}  // namespace losa
