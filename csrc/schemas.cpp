// Every native operator of losa, in one place. Implementations register themselves at the foot of csrc/cpu/<op>.cpp and
// csrc/cuda/<op>.cu; fake (meta) kernels live beside the Python function in losa_kernels/<op>.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(losa, library) {
  // mask: bool (out, in) -> uint8 (out, ceil(in / 8)), bit b of byte j = column 8j + b
  library.def("pack_mask(Tensor mask) -> Tensor");
  // packed: uint8 (out, ceil(in_features / 8)) -> bool (out, in_features)
  library.def("unpack_mask(Tensor packed, int in_features) -> Tensor");
}
