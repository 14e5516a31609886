#include "cpu/sparse_linear/kernels.h"

#if defined(__AVX512VBMI2__)
#include "cpu/sparse_linear/decoders_avx512.h"
#elif defined(__AVX2__)
#include "cpu/sparse_linear/decoders_avx2.h"
#else
#include "cpu/sparse_linear/kept_products.h"
#endif

namespace losa::sparse_linear {

const Kernels LOSA_ISA::kKernels = {.plan = plan};

}  // namespace losa::sparse_linear
