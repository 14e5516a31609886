// Every native operator of losa, in one place. Implementations register themselves at the foot of their files in
// csrc/cpu and csrc/cuda; fake (meta) kernels live beside the Python function in losa_kernels/<op>.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(losa, library) {
  // mask: bool (out, in) -> uint8 (out, ceil(in / 8)), bit b of byte j = column 8j + b
  library.def("pack_mask(Tensor mask) -> Tensor");
  // packed: uint8 (out, ceil(in_features / 8)) -> bool (out, in_features)
  library.def("unpack_mask(Tensor packed, int in_features) -> Tensor");
  // Which share of their columns packed masks (out, ceil(in_features / 8)) keep together, 0..1, by some rows of each.
  library.def("kept_share(Tensor[] masks, int in_features) -> float");

  // Fills out (out, in) with M * (W + B A); base = false leaves W out, no lora_A (r, in) and lora_B (out, r) B A. fp32
  // factors, B scaled. Without mask (packed), entries with W != 0 are kept.
  library.def(
      "compose_masked_lora(Tensor weight, Tensor? mask, bool base, Tensor? lora_A, Tensor? lora_B, Tensor(a!) out) -> "
      "()");
  // gradient G (out, in): dA (r, in) += B^T (M * G), dB (out, r) += (M * G) A^T; both fp32.
  library.def(
      "project_masked_lora(Tensor gradient, Tensor weight, Tensor? mask, Tensor lora_A, Tensor lora_B, Tensor(a!)? dA, "
      "Tensor(b!)? dB) -> ()");
  // Products that form kept entries alone, all fp32. Rows of x (tokens, in) up to ends[0] have the first group's W_eff,
  // those from there to ends[1] the second's, and so on; a group may have none. Fills these rows of out (tokens, out)
  // with x W_eff^T + bias. Factors are those of compose_masked_lora, one of each a group; biases may be empty.
  library.def(
      "multiply_masked_lora(Tensor x, int[] ends, Tensor[] weights, Tensor[] masks, Tensor[] lora_A, Tensor[] lora_B, "
      "Tensor[] biases, Tensor(a!) out) -> ()");
  // Fills the groups' rows of dx (tokens, in) with dY W_eff; and project_masked_lora of each group's G = dY^T x. dx, dA
  // and dB may be left out; without dx, weights may have any type.
  library.def(
      "differentiate_masked_lora(Tensor dy, Tensor? x, int[] ends, Tensor[] weights, Tensor[] masks, Tensor[] lora_A, "
      "Tensor[] lora_B, Tensor(a!)? dx, Tensor(b!)[] dA, Tensor(c!)[] dB) -> ()");

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
  // The same where every byte of the bitmask has per_byte bits: N:M with m = 4 or 8
  library.def("sparse_linear_nm(Tensor x, Tensor values, Tensor bitmask, int per_byte, Tensor? bias) -> Tensor");
  // The same of a dense weight (out, in), on CPUs alone
  library.def("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");

  // Weights of 16-bit values in tiles (losa_kernels/sparse_linear/TILES.md), on CUDA alone: how many units of 16 bytes
  // each chunk takes, int64 (chunks,), from a bitmask of so many columns.
  library.def("count_tiles(Tensor bitmask, int columns) -> Tensor");
  // Fills data, uint8, from values and bitmask as above. offsets: int64 (chunks + 1,), the sums of the sizes.
  library.def(
      "write_tiles(Tensor values, Tensor bitmask, Tensor? row_offsets, int columns, Tensor offsets, Tensor(a!) data) -> "
      "()");
  // Fills dense (out, in), of 16 bits.
  library.def("unpack_tiles(Tensor data, Tensor offsets, Tensor(a!) dense) -> ()");
  // sparse_linear of tiles of a weight (rows, in) of x's dtype; largest: the bytes of the largest chunk
  library.def(
      "sparse_linear_tiles(Tensor x, Tensor data, Tensor offsets, int rows, int largest, Tensor? bias) -> Tensor");

  // One token of a decoder. x (rows, n) += update; then its RMS norm times weight (n,)
  library.def("add_rms_norm(Tensor(a!) x, Tensor? update, Tensor weight, float eps) -> Tensor");
  // heads (queries + 2 keys, size), cos and sin (places, size), position int64 (1,), cache (2, keys, places, size)
  // -> queries, turned as the keys are; keys and values go into the cache
  library.def(
      "rotate_and_store(Tensor heads, Tensor cos, Tensor sin, Tensor position, Tensor(a!) cache, Tensor? q_norm, Tensor? "
      "k_norm, float eps) -> Tensor");
  // q (queries, size) over places 0 to position of the cache; finished int32 (queries,), zero before and afterwards
  library.def(
      "attend_cache(Tensor q, Tensor cache, Tensor position, int places, float scaling, Tensor(a!) finished) -> Tensor");
  // (..., 2 n) -> silu(gate) * up (..., n)
  library.def("gated_silu(Tensor gate_up) -> Tensor");

  // features (L, n, p), dense rows -> fp64 (L, n, n), the Gram of each layer's samples less their mean
  library.def("gram(Tensor features) -> Tensor");

  // Packed mask by |w| norm: per row `count` go, or per group of m where m > 0; what mask (packed) lacks goes anyway.
  // faults (int32, one element; CUDA alone): bit 0 is set for norms that are not finite or negative,
  // bit 1 for weights that are not finite.
  library.def(
      "wanda_select(Tensor weight, Tensor input_norms, int count, int m, Tensor? mask, Tensor(a!)? faults=None) -> "
      "Tensor");
  // int64 (ceil(in_features / block_size),): entries of each column block that the packed mask lacks
  library.def("pruned_per_block(Tensor mask, int in_features, int block_size) -> Tensor");
  // Which counts[index] (int64) entries of columns [start, end) have the smallest (w / u_jj)^2, what mask lacks first:
  // state[:3] = (key, column, row), see sweep_block. state: int32, zero before its first use; scratch: float,
  // out x (end - start).
  library.def(
      "select_block(Tensor weight, Tensor factor, int start, int end, Tensor counts, int index, Tensor? mask, "
      "Tensor(a!) scratch, Tensor(b!) state) -> ()");
  // SparseGPT's sweep of columns [start, end): weight is compensated inside the block, errors (out, end - start)
  // written, loss added to, kept (packed) set. m = 0: scores go whose bits are below key, or equal to it in the first
  // `column` columns or the first `row` rows of the next one. m > 0: `prune` of each group of m, from updated weights.
  // errors three times as wide: their high part twice and their low part, rounded to TF32 each.
  library.def(
      "sweep_block(Tensor(a!) weight, Tensor factor, int start, int end, int m, int prune, Tensor? state, Tensor? mask, "
      "Tensor(b!) kept, Tensor(c!) errors, Tensor(d!) loss) -> ()");
  // Rows and columns [start, end), up to 128, of a symmetric float matrix (n, n) become an identity; inverse is R^-1 of
  // what they were, R R^T with R upper triangular. failed (int32, one element) becomes 1 where a pivot is not positive.
  library.def("factor_panel(Tensor(a!) matrix, int start, int end, Tensor(b!) inverse, Tensor(c!) failed) -> ()");
}
