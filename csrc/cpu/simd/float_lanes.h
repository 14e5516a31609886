// fp32, bf16 and fp16 in memory to fp32 and back, number by number and by registers, whole or in part. For files that
// are compiled once per instruction set, and for files compiled for any CPU: everything here has internal linkage.
#pragma once

#include <cstring>

#include "common/float_type.h"
#include "cpu/simd/lanes.h"

#if defined(__F16C__)
#include <immintrin.h>
#else
#include <torch/headeronly/util/Half.h>
#endif

namespace losa {
namespace {

using Shorts = uint16_t __attribute__((vector_size(2 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));

// Each type: what memory holds, one register of it, and how a number or a register becomes fp32 (widen) and is rounded
// to nearest even again (narrow).
struct FloatLanes {
  using Stored = float;
  using Register = Floats;
  static float widen(float stored) { return stored; }
  static float narrow(float value) { return value; }
  static Floats widen(Floats stored) { return stored; }
  static Floats narrow(Floats value) { return value; }
};

struct BFloat16Lanes {
  using Stored = uint16_t;
  using Register = Shorts;
  static float widen(uint16_t stored) { return __builtin_bit_cast(float, static_cast<uint32_t>(stored) << 16); }
  static uint16_t narrow(float value) {  // without a branch, so that it becomes vector code
    const auto bits = __builtin_bit_cast(uint32_t, value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
  }
  static Floats widen(const Shorts& stored) {
    return __builtin_bit_cast(Floats, __builtin_convertvector(stored, Words) << 16);
  }
  static Shorts narrow(const Floats& value) {
    const Words bits = __builtin_bit_cast(Words, value);
    const Words nan = __builtin_bit_cast(Words, value != value);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Shorts);
  }
};

struct HalfLanes {
  using Stored = uint16_t;
  using Register = Shorts;
#if defined(__F16C__)
  static float widen(uint16_t stored) { return _cvtsh_ss(stored); }
  static uint16_t narrow(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
  static float widen(uint16_t stored) { return static_cast<float>(c10::Half(stored, c10::Half::from_bits())); }
  static uint16_t narrow(float value) { return c10::Half(value).x; }
#endif
#if defined(__AVX512F__)
  static Floats widen(const Shorts& stored) {
    return __builtin_bit_cast(Floats, _mm512_cvtph_ps(__builtin_bit_cast(__m256i, stored)));
  }
  static Shorts narrow(const Floats& value) {
    return __builtin_bit_cast(Shorts, _mm512_cvtps_ph(__builtin_bit_cast(__m512, value), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static Floats widen(const Shorts& stored) {
    return __builtin_bit_cast(Floats, _mm256_cvtph_ps(__builtin_bit_cast(__m128i, stored)));
  }
  static Shorts narrow(const Floats& value) {
    return __builtin_bit_cast(Shorts, _mm256_cvtps_ph(__builtin_bit_cast(__m256, value), _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Floats widen(const Shorts& stored) {
    const Ints bits = __builtin_convertvector(stored, Ints), magnitude = bits & 0x7fff;
    // The exponent's bias is 112 less, and an exponent of ones stays so. An exponent of zeros means 2^-14 without the
    // leading one, which is subtracted in fp32: the number is normal there, and flushing denormals does not touch it.
    const Ints normal = (magnitude << 13) + (112 << 23);
    const Floats leading = __builtin_bit_cast(Floats, normal + (1 << 23));
    const Ints subnormal = __builtin_bit_cast(Ints, leading - 0x1p-14f);
    const Ints is_subnormal = magnitude < 0x0400, special = (magnitude >= 0x7c00) & 0x7f800000;
    const Ints value = (subnormal & is_subnormal) | (normal & ~is_subnormal);
    return __builtin_bit_cast(Floats, value | special | (bits & 0x8000) << 16);
  }
  static Shorts narrow(const Floats& value) {
    Shorts stored;
    for (int i = 0; i < kLanes; ++i) stored[i] = narrow(value[i]);
    return stored;
  }
#endif
};

// body(FloatLanes{}), body(BFloat16Lanes{}) or body(HalfLanes{})
template <class Body>
inline void with_type(FloatType type, const Body& body) {
  switch (type) {
    case FloatType::kFloat: return body(FloatLanes{});
    case FloatType::kBFloat16: return body(BFloat16Lanes{});
    case FloatType::kHalf: return body(HalfLanes{});
  }
}

template <class Type>
inline Floats load(const typename Type::Stored* from) {
  typename Type::Register stored;
  std::memcpy(&stored, from, sizeof stored);
  return Type::widen(stored);
}

template <class Type>
inline void store(typename Type::Stored* to, const Floats& value) {
  const typename Type::Register stored = Type::narrow(value);
  std::memcpy(to, &stored, sizeof stored);
}

// The first `count` lanes; lanes that are not loaded are 0.
template <class Type>
inline Floats load_part(const typename Type::Stored* from, int64_t count) {
  typename Type::Register stored = {};
  std::memcpy(&stored, from, static_cast<size_t>(count) * sizeof *from);
  return Type::widen(stored);
}

template <class Type>
inline void store_part(typename Type::Stored* to, const Floats& value, int64_t count) {
  const typename Type::Register stored = Type::narrow(value);
  std::memcpy(to, &stored, static_cast<size_t>(count) * sizeof *to);
}

// kLanes bits of a packed mask from `column` on, a multiple of kLanes, of which `count` exist.
inline uint32_t mask_bits(const uint8_t* bits, int64_t column, int64_t count = kLanes) {
  if constexpr (kLanes < 8) return bits[column >> 3] >> (column & 7);
  uint32_t word = 0;
  if (count >= kLanes) {
    std::memcpy(&word, bits + (column >> 3), kLanes / 8);
  } else {
    std::memcpy(&word, bits + (column >> 3), static_cast<size_t>((count + 7) / 8));
  }
  return word;
}

// One bit a lane: 1 where the lane is not 0.
inline uint32_t nonzero_bits(const Floats& value) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(__builtin_bit_cast(__m512, value), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(value[i] != 0) << i;
  return bits;
#endif
}

// +0.0 where a lane's bit is 0, whatever stands there.
inline Floats keep(const Floats& value, uint32_t bits) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(Floats,
                            _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), __builtin_bit_cast(__m512, value)));
#else
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  const Ints kept = (lane & static_cast<int32_t>(bits)) != 0;
  return __builtin_bit_cast(Floats, __builtin_bit_cast(Ints, value) & kept);
#endif
}

using Floats4 = float __attribute__((vector_size(16)));
using Floats8 = float __attribute__((vector_size(32)));

// A register's sum, by halves.
inline float sum(const Floats4& lanes) {
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

inline float sum(const Floats8& lanes) {
  Floats4 halves[2];
  std::memcpy(halves, &lanes, sizeof(lanes));
  return sum(halves[0] + halves[1]);
}

#if defined(__AVX512F__)
inline float sum(const Floats& lanes) {
  Floats8 halves[2];
  std::memcpy(halves, &lanes, sizeof(lanes));
  return sum(halves[0] + halves[1]);
}
#endif

// to[0..4) += the sums of a, b, c and d.
inline void add_sums(const Floats& a, const Floats& b, const Floats& c, const Floats& d, float* to) {
#if defined(__AVX512F__)
  const auto add_halves = [](const Floats& left, const Floats& right) {
    const __m512 l = __builtin_bit_cast(__m512, left), r = __builtin_bit_cast(__m512, right);
    return _mm512_add_ps(_mm512_shuffle_f32x4(l, r, 0x44), _mm512_shuffle_f32x4(l, r, 0xee));
  };
  const __m512 ab = add_halves(a, b), cd = add_halves(c, d);
  // One quarter each of a, b, c and d.
  __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
  sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));
  const __m512i every_fourth = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  const __m128 four = _mm512_castps512_ps128(_mm512_permutexvar_ps(every_fourth, sums));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
#elif defined(__AVX2__)
  const auto pairs = [](const Floats& left, const Floats& right) {
    return _mm256_hadd_ps(__builtin_bit_cast(__m256, left), __builtin_bit_cast(__m256, right));
  };
  const __m256 fours = _mm256_hadd_ps(pairs(a, b), pairs(c, d));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
#else
  to[0] += sum(a);
  to[1] += sum(b);
  to[2] += sum(c);
  to[3] += sum(d);
#endif
}

}  // namespace
}  // namespace losa
