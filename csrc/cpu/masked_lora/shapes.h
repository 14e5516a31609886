// Sizes that the operators and kernels of a masked-LoRA linear agree on, on every instruction set.
#pragma once

#include <cstdint>

namespace losa::masked_lora {

// Columns (a multiple of 32) whose slice of lora_A, 64 KB, stays in the second-level cache while the rows pass by. Long
// pieces of a row, because a row comes from memory.
constexpr int64_t chunk_columns(int64_t rank) {
  return (1 << 14) / (rank > 4 ? rank : 4) / 32 * 32;
}

// Whole registers of any instruction set.
constexpr int64_t padded(int64_t columns) {
  return (columns + 31) / 32 * 32;
}

// Rows of M * G that are projected together.
constexpr int64_t kProjectRows = 8;
// Tokens of a pass are padded to a multiple of kTokens.
constexpr int64_t kTokens = 16;
// Rows and columns of the weight whose kept entries are listed at once.
constexpr int64_t kBlock = 64;
// Features of out that share a pass over x; their sums stay in the second-level cache.
constexpr int64_t kOutFeatures = 96;
// Rows whose kept entries of G are formed together, for a block of x in the first-level cache.
constexpr int64_t kSampleRows = 64;

// Columns, a multiple of kBlock, of a tile of kSampleRows.
constexpr int64_t sample_columns(int64_t rank) {
  const int64_t columns = chunk_columns(rank) / kBlock * kBlock;
  return columns < 1024 ? columns : 1024;
}

// Floats of a kernel's scratch.
constexpr int64_t compose_scratch(int64_t rank) {
  return rank * chunk_columns(rank);
}

constexpr int64_t project_scratch(int64_t rank) {
  return (rank + kProjectRows) * chunk_columns(rank);
}

constexpr int64_t sample_scratch(int64_t rank) {
  return (rank + kSampleRows) * sample_columns(rank);
}

constexpr int64_t multiply_scratch(int64_t rank, int64_t padded_tokens) {
  return kOutFeatures * padded_tokens + compose_scratch(rank);
}

}  // namespace losa::masked_lora
