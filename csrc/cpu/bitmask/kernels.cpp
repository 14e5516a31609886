// AVX2 rows of bitmask.cpp. Compiled with AVX2 flags, so it includes nothing whose inline code other files could share.
#include "cpu/bitmask.h"

#if defined(__AVX2__)

#include <immintrin.h>

#include <cstring>

namespace losa::bitmask {

void pack_row_avx2(const uint8_t* bools, int64_t columns, uint8_t* packed) {
  const __m256i zero = _mm256_setzero_si256();
  for (; columns >= 32; columns -= 32, bools += 32, packed += 4) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bools));
    const int bits = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(values, zero));
    std::memcpy(packed, &bits, 4);
  }
  pack_row_scalar(bools, columns, packed);
}

void unpack_row_avx2(const uint8_t* packed, int64_t columns, uint8_t* bools) {
  // Byte k of the register takes packed byte k / 8, of which bit k % 8 is tested.
  const __m256i source_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i one = _mm256_set1_epi8(1);
  for (; columns >= 32; columns -= 32, packed += 4, bools += 32) {
    int bits;
    std::memcpy(&bits, packed, 4);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), source_byte);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bools), _mm256_and_si256(set, one));
  }
  unpack_row_scalar(packed, columns, bools);
}

}  // namespace losa::bitmask

#else  // a target without AVX2 never selects these

namespace losa::bitmask {

void pack_row_avx2(const uint8_t* bools, int64_t columns, uint8_t* packed) {
  pack_row_scalar(bools, columns, packed);
}

void unpack_row_avx2(const uint8_t* packed, int64_t columns, uint8_t* bools) {
  unpack_row_scalar(packed, columns, bools);
}

}  // namespace losa::bitmask

#endif
