// AVX2: 8 columns, one byte of the mask, at a time. The scalar code takes the last values of a row or buffer, where a
// whole register would reach too far.
#pragma once

#include <immintrin.h>

#include "cpu/packing/rows_scalar.h"
#include "cpu/simd/expand_tables.h"

namespace losa::packing {
namespace {

constexpr tables::Columns<uint8_t, 1> kColumns = tables::make_columns<uint8_t, 1>();
constexpr tables::Expand16<2> kExpand16 = tables::make_expand16<2>();
constexpr tables::Expand32 kExpand32 = tables::make_expand32();

struct Bits16 {
  using Element = uint16_t;

  static void pack(const Element* from, uint8_t mask, Element* to) {
    const __m128i columns = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kColumns.of[mask])));
    // Column c is bytes 2c and 2c + 1.
    const __m128i bytes = _mm_add_epi16(_mm_mullo_epi16(columns, _mm_set1_epi16(0x0202)), _mm_set1_epi16(0x0100));
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));  // [8]
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(values, bytes));
  }

  static void unpack(const Element* from, uint8_t mask, Element* to) {
    const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand16.of[mask]));
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));  // [8]
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(values, places));
  }
};

struct Bits32 {
  using Element = uint32_t;

  static void pack(const Element* from, uint8_t mask, Element* to) {
    const __m256i columns = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kColumns.of[mask])));
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));  // [8]
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(values, columns));
  }

  static void unpack(const Element* from, uint8_t mask, Element* to) {
    const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpand32.of[mask]));
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));  // [8]
    const __m256i kept = _mm256_srai_epi32(places, 31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_and_si256(_mm256_permutevar8x32_epi32(values, places), kept));
  }
};

template <class Bits>
void pack_row(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t count) {
  const auto* from = static_cast<const typename Bits::Element*>(row);
  auto* to = static_cast<typename Bits::Element*>(values);
  auto* const end = to + count;
  for (; columns >= 8 && end - to >= 8; columns -= 8, from += 8, ++mask) {
    Bits::pack(from, *mask, to);
    to += _mm_popcnt_u32(*mask);
  }
  pack_row_scalar<typename Bits::Element>(from, mask, columns, to, end - to);
}

template <class Bits>
void unpack_row(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row) {
  const auto* from = static_cast<const typename Bits::Element*>(values);
  const auto* const end = from + readable;
  auto* to = static_cast<typename Bits::Element*>(row);
  for (; columns >= 8 && end - from >= 8; columns -= 8, to += 8, ++mask) {
    Bits::unpack(from, *mask, to);
    from += _mm_popcnt_u32(*mask);
  }
  unpack_row_scalar<typename Bits::Element>(from, end - from, mask, columns, to);
}

}  // namespace
}  // namespace losa::packing
