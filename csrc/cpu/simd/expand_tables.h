// Tables indexed by 8 mask bits, for instruction sets without expand and compress. Data only: no inline code that
// translation units of different instruction sets could share.
#pragma once

#include <cstdint>

namespace losa::tables {
namespace {

constexpr uint8_t kZero = 0x80;  // pshufb writes 0

// of[m][j]: kScale times the column of the j-th set bit of m; 0 beyond the last.
template <class Integer, int kScale>
struct Columns {
  alignas(8 * sizeof(Integer)) Integer of[256][8];
};

template <class Integer, int kScale>
constexpr Columns<Integer, kScale> make_columns() {
  Columns<Integer, kScale> table{};
  for (int mask = 0; mask < 256; ++mask) {
    for (int column = 0, rank = 0; column < 8; ++column) {
      if (mask >> column & 1) table.of[mask][rank++] = static_cast<Integer>(kScale * column);
    }
  }
  return table;
}

// pshufb controls that move the 16-bit values of a group to their columns, zeros elsewhere. kBytes = 2: as they are;
// kBytes = 4: into the upper half of 32 bits, which makes a bfloat16 a float (both lanes of 16 bytes read the same).
template <int kBytes>
struct Expand16 {
  alignas(8 * kBytes) uint8_t of[256][8 * kBytes];
};

template <int kBytes>
constexpr Expand16<kBytes> make_expand16() {
  Expand16<kBytes> table{};
  for (int mask = 0; mask < 256; ++mask) {
    for (int column = 0, rank = 0; column < 8; ++column) {
      uint8_t* bytes = table.of[mask] + kBytes * column;
      const bool kept = mask >> column & 1;
      for (int i = 0; i < kBytes; ++i) bytes[i] = kZero;
      if (!kept) continue;
      bytes[kBytes - 2] = static_cast<uint8_t>(2 * rank);
      bytes[kBytes - 1] = static_cast<uint8_t>(2 * rank + 1);
      ++rank;
    }
  }
  return table;
}

// vpermps indices that move 32-bit values to their columns; the sign bit, which vpermps ignores, marks kept columns.
struct Expand32 {
  alignas(32) uint32_t of[256][8];
};

constexpr Expand32 make_expand32() {
  Expand32 table{};
  for (int mask = 0; mask < 256; ++mask) {
    for (uint32_t column = 0, rank = 0; column < 8; ++column) {
      if (mask >> column & 1) table.of[mask][column] = 0x80000000u | rank++;
    }
  }
  return table;
}

}  // namespace
}  // namespace losa::tables
