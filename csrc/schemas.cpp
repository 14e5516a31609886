// Every native operator of losa, in one place. Implementations register themselves at the foot of csrc/cpu/<op>.cpp and
// csrc/cuda/<op>.cu; fake (meta) kernels live beside the Python function in losa_kernels/<op>.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(losa, library) {
  // mask: bool (out, in) -> uint8 (out, ceil(in / 8)), bit b of byte j = column 8j + b
  library.def("pack_mask(Tensor mask) -> Tensor");
  // packed: uint8 (out, ceil(in_features / 8)) -> bool (out, in_features)
  library.def("unpack_mask(Tensor packed, int in_features) -> Tensor");

  // weight (out, in), mask packed -> values (kept,), row_offsets int64 (out,)
  library.def("pack_bitmask(Tensor weight, Tensor mask) -> (Tensor, Tensor)");
  // weight (out, in), mask packed -> values (out, in / m * keep_n), packed mask of stored positions
  library.def("pack_nm(Tensor weight, Tensor mask, int keep_n, int m) -> (Tensor, Tensor)");
  // mask packed (out, ceil(in_features / 8)) -> int64 (), the most kept of any m columns m * i .. m * i + m - 1
  library.def("largest_group(Tensor mask, int in_features, int m) -> Tensor");
  // Fills dense (out, in). Without row_offsets all rows have equally many values.
  library.def("unpack_bitmask(Tensor(a!) dense, Tensor values, Tensor bitmask, Tensor? row_offsets) -> ()");
  // x (..., in) with at most 16 rows, values and bitmask of a weight (out, in) as above, bias (out,) -> (..., out)
  library.def("sparse_linear(Tensor x, Tensor values, Tensor bitmask, Tensor? row_offsets, Tensor? bias) -> Tensor");
}
