// Bit arithmetic on packed masks that host, device and emulator share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LOSA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LOSA_HOST_DEVICE inline
#endif

namespace losa {

LOSA_HOST_DEVICE constexpr int64_t packed_width(int64_t columns) {
  return (columns + 7) / 8;
}

// The bits of a mask byte that stand for existing columns, when `left` columns are left at its first one.
LOSA_HOST_DEVICE constexpr uint8_t column_bits(int64_t left) {
  return static_cast<uint8_t>(left >= 8 ? 0xff : (1 << left) - 1);
}

// 8 bool bytes (any nonzero value is true; byte 0 = column 0) -> 8 bits.
LOSA_HOST_DEVICE constexpr uint8_t pack_byte(uint64_t bools) {
  // Fold every byte onto its lowest bit, then gather the 8 bits in the top byte.
  bools |= bools >> 4;
  bools |= bools >> 2;
  bools |= bools >> 1;
  bools &= 0x0101010101010101ull;
  return static_cast<uint8_t>((bools * 0x0102040810204080ull) >> 56);
}

// 8 bits -> 8 bool bytes of value 0 or 1.
LOSA_HOST_DEVICE constexpr uint64_t unpack_byte(uint8_t bits) {
  // Copy the byte to all 8 places, keep bit b in place b, turn nonzero into 1.
  const uint64_t spread = (bits * 0x0101010101010101ull) & 0x8040201008040201ull;
  return ((spread + 0x00406070787c7e7full) >> 7) & 0x0101010101010101ull;
}

}  // namespace losa
