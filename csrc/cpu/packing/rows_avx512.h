// AVX-512: 32 columns of 16 bits or 16 of 32 bits at a time, with compress and expand, and with masked loads and stores
// where a row or buffer ends.
#pragma once

#include <cstring>

#include "cpu/simd/expand_avx512.h"

namespace losa::packing {
namespace {

// The mask bits of the next kColumns columns, of which only `left` exist.
template <int kColumns>
uint32_t next_bits(const uint8_t* mask, int64_t left) {
  uint32_t bits = 0;
  if (left >= kColumns) {
    std::memcpy(&bits, mask, kColumns / 8);
    return bits;
  }
  std::memcpy(&bits, mask, static_cast<size_t>((left + 7) / 8));
  return bits & ((1u << left) - 1);
}

uint32_t lowest(int64_t bits) {
  return bits >= 32 ? ~0u : (1u << bits) - 1;
}

struct Bits16 {
  using Element = uint16_t;
  static constexpr int kColumns = 32;
  static __m512i load(uint32_t which, const Element* from) { return _mm512_maskz_loadu_epi16(which, from); }
  static void store(uint32_t which, Element* to, __m512i values) { _mm512_mask_storeu_epi16(to, which, values); }
  static __m512i compress(uint32_t mask, __m512i values) { return compress16(mask, values); }
  static __m512i expand(uint32_t mask, __m512i values) { return expand16(mask, values); }
};

struct Bits32 {
  using Element = uint32_t;
  static constexpr int kColumns = 16;
  static __mmask16 narrow(uint32_t which) { return static_cast<__mmask16>(which); }
  static __m512i load(uint32_t which, const Element* from) { return _mm512_maskz_loadu_epi32(narrow(which), from); }
  static void store(uint32_t which, Element* to, __m512i values) {
    _mm512_mask_storeu_epi32(to, narrow(which), values);
  }
  static __m512i compress(uint32_t mask, __m512i values) { return compress32(narrow(mask), values); }
  static __m512i expand(uint32_t mask, __m512i values) { return expand32(narrow(mask), values); }
};

template <class Bits>
void pack_row(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t) {
  const auto* from = static_cast<const typename Bits::Element*>(row);
  auto* to = static_cast<typename Bits::Element*>(values);
  for (; columns > 0; columns -= Bits::kColumns, from += Bits::kColumns, mask += Bits::kColumns / 8) {
    const uint32_t bits = next_bits<Bits::kColumns>(mask, columns);
    const int count = _mm_popcnt_u32(bits);
    // Compressing to a register first: to memory it is microcode on some CPUs.
    Bits::store(lowest(count), to, Bits::compress(bits, Bits::load(lowest(columns), from)));
    to += count;
  }
}

template <class Bits>
void unpack_row(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row) {
  const auto* from = static_cast<const typename Bits::Element*>(values);
  auto* to = static_cast<typename Bits::Element*>(row);
  for (; columns > 0; columns -= Bits::kColumns, to += Bits::kColumns, mask += Bits::kColumns / 8) {
    const uint32_t bits = next_bits<Bits::kColumns>(mask, columns);
    const int count = _mm_popcnt_u32(bits);
    const int64_t found = count < readable ? count : readable;
    Bits::store(lowest(columns), to, Bits::expand(bits, Bits::load(lowest(found), from)));
    from += found;
    readable -= found;
  }
}

}  // namespace
}  // namespace losa::packing
