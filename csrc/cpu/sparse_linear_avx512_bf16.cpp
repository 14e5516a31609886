// Kernels of sparse_linear.cpp for bfloat16 weights and x on CPUs that multiply pairs of bfloat16: products are exact,
// sums fp32 (what is smaller than a normal fp32 number counts as zero).
#include "cpu/sparse_linear.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

#include "cpu/sparse_linear_loops.h"

namespace losa::sparse_linear {
namespace {

struct Pairs {
  using Vector = __m512;
  using Weights = __m512i;
  using Element = uint16_t;
  static constexpr int kLanes = 32, kBytes = 2, kStep = 32, kVectors = 1;

  static LOSA_INLINE __m512i load(const uint16_t* from) { return _mm512_loadu_si512(from); }
  static LOSA_INLINE Vector splat(float value) { return _mm512_set1_ps(value); }
  static LOSA_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static LOSA_INLINE Vector multiply_add(__m512i a, __m512i b, Vector c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static LOSA_INLINE float total(Vector values) { return _mm512_reduce_add_ps(values); }

  static LOSA_INLINE void expand(uint64_t word, int step, const uint8_t*& from, Weights (&w)[1]) {
    const auto mask = static_cast<uint32_t>(word >> (32 * step));
    w[0] = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(from));
    from += kBytes * _mm_popcnt_u32(mask);
  }
};

}  // namespace

Plan plan_avx512_bfloat16(int64_t batch) {
  if (batch <= 4) return {dot<Pairs, 2, 4, 1>, 4, Pairs::kLanes, Layout::kBfloat16};
  return {dot<Pairs, 2, 8, 1>, 8, Pairs::kLanes, Layout::kBfloat16};
}

}  // namespace losa::sparse_linear

#else  // a target without these never selects them

namespace losa::sparse_linear {

Plan plan_avx512_bfloat16(int64_t batch) {
  return plan_avx512(FloatType::kBFloat16, batch);
}

}  // namespace losa::sparse_linear

#endif
