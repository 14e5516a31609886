// Kept columns of packed rows. For files that are compiled for any CPU.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace losa {

// Set bits of columns [begin, end) of a packed row.
inline int64_t count_bits(const uint8_t* row, int64_t begin, int64_t end) {
  int64_t kept = 0, byte = begin / 8;
  const auto count_byte = [&] {
    unsigned value = row[byte];
    if (8 * byte < begin) value &= 0xffu << (begin - 8 * byte);
    if (8 * byte + 8 > end) value &= 0xffu >> (8 * byte + 8 - end);
    kept += std::popcount(value);
    ++byte;
  };
  if (begin % 8 != 0) count_byte();
  for (; 8 * byte + 64 <= end; byte += 8) {
    uint64_t word;
    std::memcpy(&word, row + byte, sizeof word);
    kept += std::popcount(word);
  }
  while (8 * byte < end) count_byte();
  return kept;
}

}  // namespace losa
