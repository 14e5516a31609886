// e^x by registers, for files that are compiled once per instruction set.
#pragma once

#include "cpu/simd/lanes.h"

namespace losa {
namespace {

// Within 2 last bits from -87 to 88; 0 below, infinity above, NaN of NaN.
inline Floats exponential(const Floats& x) {
  const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
  Floats bounded = x < low ? low : x;
  bounded = bounded > high ? high : bounded;
  // x = n ln 2 + r with |r| <= ln 2 / 2: adding 1.5 * 2^23 rounds to a whole number, which the lowest bits then hold.
  constexpr float kRound = 12582912.0f;
  const Floats shifted = bounded * 1.44269504f + kRound, n = shifted - kRound;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  // Taylor's polynomial of degree 7: what it leaves out is below 1e-8.
  Floats sum = r * (1.0f / 5040) + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  const Ints exponent = __builtin_bit_cast(Ints, shifted) - __builtin_bit_cast(int32_t, kRound) + 127;
  const Floats value = sum * __builtin_bit_cast(Floats, exponent << 23);
  const Floats positive = x < low ? Floats{} : value;
  return x > high ? Floats{} + __builtin_inff() : positive;
}

}  // namespace
}  // namespace losa
