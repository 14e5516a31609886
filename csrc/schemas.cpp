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
  // The same on CUDA, where every byte of the bitmask has per_byte bits: N:M with m = 4 or 8
  library.def("sparse_linear_nm(Tensor x, Tensor values, Tensor bitmask, int per_byte, Tensor? bias) -> Tensor");

  // Packed mask by |w| norm: per row `count` go, or per group of m where m > 0; what mask (packed) lacks goes anyway.
  library.def("wanda_select(Tensor weight, Tensor input_norms, int count, int m, Tensor? mask) -> Tensor");
  // int64 (ceil(in_features / block_size),): entries of each column block that the packed mask lacks
  library.def("pruned_per_block(Tensor mask, int in_features, int block_size) -> Tensor");
  // Which `count` entries of columns [start, end) have the smallest (w / u_jj)^2, what mask lacks first: state[:3] =
  // (key, column, row), see sweep_block. state: int32, zero before its first use; scratch: float, out x (end - start).
  library.def(
      "select_block(Tensor weight, Tensor factor, int start, int end, int count, Tensor? mask, Tensor(a!) scratch, "
      "Tensor(b!) state) -> ()");
  // SparseGPT's sweep of columns [start, end): weight is compensated inside the block, errors (out, end - start)
  // written, loss added to, kept (packed) set. m = 0: scores go whose bits are below key, or equal to it in the first
  // `column` columns or the first `row` rows of the next one. m > 0: `prune` of each group of m, from updated weights.
  library.def(
      "sweep_block(Tensor(a!) weight, Tensor factor, int start, int end, int m, int prune, Tensor? state, Tensor? mask, "
      "Tensor(b!) kept, Tensor(c!) errors, Tensor(d!) loss) -> ()");
}
