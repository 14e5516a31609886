// Kernels for bfloat16 weights and x on CPUs that multiply pairs of bfloat16: products are exact, sums fp32 (numbers
// smaller than a normal fp32 number count as zero).
#include "cpu/simd/expand_avx512.h"
#include "cpu/sparse_linear/kernels.h"
#include "cpu/sparse_linear/loops.h"

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

  static LOSA_INLINE int64_t kept(uint64_t word, int step) {
    return _mm_popcnt_u32(static_cast<uint32_t>(word >> (32 * step)));
  }

  static LOSA_INLINE void expand(uint64_t word, int step, const uint8_t* from, Weights (&w)[1]) {
    w[0] = expand16(static_cast<__mmask32>(word >> (32 * step)), _mm512_loadu_si512(from));
  }
};

template <bool kFixed>
Plan plan(int64_t batch) {
  if (batch <= 1) return {Dot<Pairs, kFixed, 1, 1, 2>::run, 1, Pairs::kLanes, Layout::kBFloat16};
  if (batch <= 2) return {Dot<Pairs, kFixed, 1, 2, 2>::run, 2, Pairs::kLanes, Layout::kBFloat16};
  if (batch <= 4) return {Dot<Pairs, kFixed, 2, 4, 1>::run, 4, Pairs::kLanes, Layout::kBFloat16};
  return {Dot<Pairs, kFixed, 2, 8, 1>::run, 8, Pairs::kLanes, Layout::kBFloat16};
}

}  // namespace

Plan plan_bfloat16_pairs(int64_t batch, bool fixed) {
  return fixed ? plan<true>(batch) : plan<false>(batch);
}

}  // namespace losa::sparse_linear
