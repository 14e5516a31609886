// Rows of packed masks: 32 columns at a time with AVX2, else 8 in a 64-bit register.
#include "cpu/bitmask/kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>

#include "common/bits.h"

namespace losa::bitmask {
namespace {

void pack_row(const uint8_t* bools, int64_t columns, uint8_t* packed) {
#if defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  for (; columns >= 32; columns -= 32, bools += 32, packed += 4) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bools));
    const int bits = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(values, zero));
    std::memcpy(packed, &bits, 4);
  }
#endif
  for (; columns > 0; columns -= 8, bools += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, bools, columns < 8 ? columns : 8);
    *packed++ = pack_byte(eight);
  }
}

void unpack_row(const uint8_t* packed, int64_t columns, uint8_t* bools) {
#if defined(__AVX2__)
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
#endif
  for (; columns > 0; columns -= 8, bools += 8) {
    const uint64_t eight = unpack_byte(*packed++);
    std::memcpy(bools, &eight, columns < 8 ? columns : 8);
  }
}

}  // namespace

const Kernels LOSA_ISA::kKernels = {.pack_row = pack_row, .unpack_row = unpack_row};

}  // namespace losa::bitmask
