// AVX-512: expand instructions move values to their columns, 16 or 32 at a time.
#pragma once

#include "cpu/simd/expand_avx512.h"
#include "cpu/sparse_linear/loops.h"

namespace losa::sparse_linear {
namespace {

struct Registers {
  using Vector = __m512;
  using Weights = Vector;
  using Element = float;
  static constexpr int kLanes = 16;

  static LOSA_INLINE Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static LOSA_INLINE void store(float* to, Vector values) { _mm512_storeu_ps(to, values); }
  static LOSA_INLINE Vector splat(float value) { return _mm512_set1_ps(value); }
  static LOSA_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static LOSA_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static LOSA_INLINE float total(Vector values) { return _mm512_reduce_add_ps(values); }

  static LOSA_INLINE int64_t columns(const uint8_t* mask, int64_t words, uint16_t* at) {
    const uint16_t* const begin = at;
    const __m512i counting = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14,
                                              13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i offsets = _mm512_slli_epi16(counting, 6);
    for (int64_t i = 0; i < 2 * words; ++i) {
      uint32_t bits;
      std::memcpy(&bits, mask + 4 * i, sizeof bits);
      _mm512_storeu_si512(at, compress16(bits, offsets));
      offsets = _mm512_add_epi16(offsets, _mm512_set1_epi16(32 * 64));
      at += _mm_popcnt_u32(bits);
    }
    return at - begin;
  }
};

struct Float : Registers {
  static constexpr int kBytes = 4, kStep = 16, kVectors = 1;
  static constexpr Layout kLayout = Layout::kFloat;

  static LOSA_INLINE int64_t kept(uint64_t word, int step) {
    return _mm_popcnt_u32(static_cast<uint16_t>(word >> (16 * step)));
  }

  static LOSA_INLINE void expand(uint64_t word, int step, const uint8_t* from, Vector (&w)[1]) {
    w[0] = _mm512_castsi512_ps(expand32(static_cast<__mmask16>(word >> (16 * step)), _mm512_loadu_si512(from)));
  }

  static LOSA_INLINE const float* widen(const uint8_t* from, int64_t, float*) {
    return reinterpret_cast<const float*>(from);
  }
};

struct BFloat16 : Registers {
  static constexpr int kBytes = 2, kStep = 32, kVectors = 2;
  static constexpr Layout kLayout = Layout::kEvenOdd;

  static LOSA_INLINE int64_t kept(uint64_t word, int step) {
    return _mm_popcnt_u32(static_cast<uint32_t>(word >> (32 * step)));
  }

  static LOSA_INLINE void expand(uint64_t word, int step, const uint8_t* from, Vector (&w)[2]) {
    const __m512i values = expand16(static_cast<__mmask32>(word >> (32 * step)), _mm512_loadu_si512(from));
    // Even columns are lower halves of 32 bits, odd ones upper halves: no shuffle is needed to make floats of either.
    w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(values, 16));
    w[1] = _mm512_castsi512_ps(_mm512_and_si512(values, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  static LOSA_INLINE const float* widen(const uint8_t* from, int64_t count, float* w) {
    return widen_values<BFloat16Lanes>(from, count, w);
  }
};

struct Half : Registers {
  static constexpr int kBytes = 2, kStep = 32, kVectors = 2;
  static constexpr Layout kLayout = Layout::kFloat;

  static LOSA_INLINE int64_t kept(uint64_t word, int step) {
    return _mm_popcnt_u32(static_cast<uint32_t>(word >> (32 * step)));
  }

  static LOSA_INLINE void expand(uint64_t word, int step, const uint8_t* from, Vector (&w)[2]) {
    const __m512i values = expand16(static_cast<__mmask32>(word >> (32 * step)), _mm512_loadu_si512(from));
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(values));
    w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(values, 1));
  }

  static LOSA_INLINE const float* widen(const uint8_t* from, int64_t count, float* w) {
    return widen_values<HalfLanes>(from, count, w);
  }
};

// The kernel for D's weights and `batch` rows of x.
template <class D, bool kFixed>
Plan plan(int64_t batch) {
  if (batch <= 1) return {Dot<D, kFixed, 1, 1, 4>::run, 1, D::kLanes, D::kLayout};
  if (batch <= 2) return {Dot<D, kFixed, 1, 2, 2>::run, 2, D::kLanes, D::kLayout};
  if (batch <= 4) return {Dot<D, kFixed, 2, 4, 1>::run, 4, D::kLanes, D::kLayout};
  if (batch <= 8) return {Dot<D, kFixed, 2, 8, 1>::run, 8, D::kLanes, D::kLayout};
  return {axpy<D>, 16, 1, Layout::kFloat};
}

}  // namespace
}  // namespace losa::sparse_linear
