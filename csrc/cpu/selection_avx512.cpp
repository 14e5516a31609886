// Compiled with AVX-512 flags.
#include "cpu/selection_impl.h"

namespace losa::selection {

const Kernels kAvx512Kernels = kKernels;

}  // namespace losa::selection
