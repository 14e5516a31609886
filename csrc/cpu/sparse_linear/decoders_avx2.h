// AVX2: a byte of the mask picks a shuffle that moves up to 8 values to their columns.
#pragma once

#include "cpu/simd/expand_tables.h"
#include "cpu/sparse_linear/loops.h"

namespace losa::sparse_linear {
namespace {

constexpr tables::Columns<uint16_t, 64> kOffsets = tables::make_columns<uint16_t, 64>();
constexpr tables::Expand16<2> kExpand16 = tables::make_expand16<2>();
constexpr tables::Expand16<4> kWiden16 = tables::make_expand16<4>();
constexpr tables::Expand32 kExpand32 = tables::make_expand32();

struct Registers {
  using Vector = __m256;
  using Weights = Vector;
  using Element = float;
  static constexpr int kLanes = 8, kStep = 8, kVectors = 1;

  static LOSA_INLINE Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static LOSA_INLINE void store(float* to, Vector values) { _mm256_storeu_ps(to, values); }
  static LOSA_INLINE Vector splat(float value) { return _mm256_set1_ps(value); }
  static LOSA_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static LOSA_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

  static LOSA_INLINE float total(Vector values) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  // A mask byte times kSize, the size of a table's row: two instructions, where a byte of its own would take three.
  template <int kSize>
  static LOSA_INLINE uint64_t byte_times(uint64_t word, int byte) {
    constexpr int kBits = kSize == 32 ? 5 : 4;
    return (byte == 0 ? word << kBits : word >> (8 * byte - kBits)) & (255 * kSize);
  }

  static LOSA_INLINE int64_t kept(uint64_t word, int step) { return _mm_popcnt_u64(byte_times<32>(word, step)); }

  static LOSA_INLINE int64_t columns(const uint8_t* mask, int64_t words, uint16_t* at) {
    const uint16_t* const begin = at;
    __m128i first = _mm_setzero_si128();
    for (int64_t i = 0; i < words; ++i) {
      const uint64_t word = load_word(mask + 8 * i);
#pragma GCC unroll 8
      for (int byte = 0; byte < 8; ++byte) {
        const uint64_t row = byte_times<16>(word, byte);
        const auto* offsets = reinterpret_cast<const uint8_t*>(kOffsets.of) + row;
        const __m128i places = _mm_add_epi16(first, _mm_load_si128(reinterpret_cast<const __m128i*>(offsets)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at), places);
        first = _mm_add_epi16(first, _mm_set1_epi16(8 * 64));
        at += _mm_popcnt_u64(row);
      }
    }
    return at - begin;
  }
};

struct Float : Registers {
  static constexpr int kBytes = 4;

  static LOSA_INLINE void expand(uint64_t word, int step, const uint8_t* from, Vector (&w)[1]) {
    const uint64_t at = byte_times<32>(word, step);
    const auto* table = reinterpret_cast<const uint8_t*>(kExpand32.of) + at;
    const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i*>(table));
    const __m256 values = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    // Without the AND, what lies at pruned places (a neighbour's NaN) would reach the sum.
    w[0] = _mm256_and_ps(_mm256_permutevar8x32_ps(values, places), _mm256_castsi256_ps(_mm256_srai_epi32(places, 31)));
  }

  static LOSA_INLINE const float* widen(const uint8_t* from, int64_t, float*) {
    return reinterpret_cast<const float*>(from);
  }
};

struct BFloat16 : Registers {
  static constexpr int kBytes = 2;

  static LOSA_INLINE void expand(uint64_t word, int step, const uint8_t* from, Vector (&w)[1]) {
    const uint64_t at = byte_times<32>(word, step);
    const auto* table = reinterpret_cast<const uint8_t*>(kWiden16.of) + at;
    // Each lane of 16 bytes reads all 8 values and writes 4 columns, straight into the upper halves of floats.
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    w[0] = _mm256_castsi256_ps(_mm256_shuffle_epi8(values, _mm256_load_si256(reinterpret_cast<const __m256i*>(table))));
  }

  static LOSA_INLINE const float* widen(const uint8_t* from, int64_t count, float* w) {
    return widen_values<BFloat16Lanes>(from, count, w);
  }
};

struct Half : Registers {
  static constexpr int kBytes = 2;

  static LOSA_INLINE void expand(uint64_t word, int step, const uint8_t* from, Vector (&w)[1]) {
    const uint64_t at = byte_times<16>(word, step);
    const auto* table = reinterpret_cast<const uint8_t*>(kExpand16.of) + at;
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    w[0] = _mm256_cvtph_ps(_mm_shuffle_epi8(values, _mm_load_si128(reinterpret_cast<const __m128i*>(table))));
  }

  static LOSA_INLINE const float* widen(const uint8_t* from, int64_t count, float* w) {
    return widen_values<HalfLanes>(from, count, w);
  }
};

// The kernel for D's weights and `batch` rows of x.
template <class D, bool kFixed>
Plan plan(int64_t batch) {
  if (batch <= 1) return {Dot<D, kFixed, 1, 1, 4>::run, 1, D::kLanes, Layout::kFloat};
  if (batch <= 2) return {Dot<D, kFixed, 1, 2, 2>::run, 2, D::kLanes, Layout::kFloat};
  if (batch <= 8) return {Dot<D, kFixed, 2, 4, 1>::run, 4, D::kLanes, Layout::kFloat};
  return {axpy<D>, 16, 1, Layout::kFloat};
}

}  // namespace
}  // namespace losa::sparse_linear
