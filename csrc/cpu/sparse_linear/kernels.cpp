// Which kernel multiplies by a weight. The file of the instruction set has a plan<Type, kFixed>(batch) for each of the
// types Float, BFloat16 and Half.
#include "cpu/sparse_linear/kernels.h"

#if defined(__AVX512VBMI2__)
#include "cpu/sparse_linear/decoders_avx512.h"
#elif defined(__AVX2__)
#include "cpu/sparse_linear/decoders_avx2.h"
#else
#include "cpu/sparse_linear/kept_products.h"
#endif

namespace losa::sparse_linear {
namespace {

Plan plan(FloatType weight, int64_t batch, bool fixed) {
  switch (weight) {
    case FloatType::kFloat: return fixed ? plan<Float, true>(batch) : plan<Float, false>(batch);
    case FloatType::kHalf: return fixed ? plan<Half, true>(batch) : plan<Half, false>(batch);
    default: return fixed ? plan<BFloat16, true>(batch) : plan<BFloat16, false>(batch);
  }
}

}  // namespace

const Kernels LOSA_ISA::kKernels = {.plan = plan};

}  // namespace losa::sparse_linear
