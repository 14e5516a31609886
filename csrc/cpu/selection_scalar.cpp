// The portable set of kernels; the others are compiled with their instruction set's flags.
#include "cpu/selection_impl.h"

namespace losa::selection {

const Kernels kScalarKernels = kKernels;

}  // namespace losa::selection
