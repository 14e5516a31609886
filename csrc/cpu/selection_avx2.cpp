// Compiled with AVX2 flags.
#include "cpu/selection_impl.h"

namespace losa::selection {

const Kernels kAvx2Kernels = kKernels;

}  // namespace losa::selection
