// The kernels of csrc/cpu/masked_lora_sparse.cpp, one per instruction set: products that cost what the mask keeps.
// Tokens lie side by side in a register, so that an entry of the weight multiplies many of them, whatever its
// neighbours are.
#pragma once

#include "cpu/masked_lora.h"

namespace losa::masked_lora {

constexpr int64_t kTokens = 16;

// A matrix (tokens, features) as passes over the tokens see it: for each pass (features, its tokens), dense. Passes
// have as many tokens as the instruction set likes, the last what is left, with zeros up to a multiple of kTokens.
struct Passes {
  const float* data;
  int64_t features;  // of the whole matrix
  int64_t first;     // feature that row or column 0 of a panel is
};

// dA += B^T (M * G),  dB += (M * G) A^T of those entries of G = dY^T x alone that the mask keeps; either may be null.
struct Sample {
  const uint8_t* bits;
  int64_t bits_stride;
  Passes dy, x;
  int64_t tokens;       // with the zeros
  const float* lora_A;  // (rank, columns)
  const float* lora_B;  // (rows, rank), scaled, dense
  int64_t lora_A_stride, rank;
  float* dA;  // (rank, padded columns)
  float* dB;  // (rows, rank), dense
  int64_t rows, columns;
  float* scratch;
};

// out (tokens, features) = x W_eff^T + bias, or dY W_eff where it is transposed, for features [begin, end) of out.
struct Multiply {
  Kept kept;            // of the whole weight (rows, columns)
  const float* lora_A;  // (rank, columns)
  const float* lora_B;  // (rows, rank), scaled, dense
  int64_t lora_A_stride, rank, rows, columns;
  Passes in;
  int64_t padded_tokens, tokens;
  bool transposed;
  const float* bias;  // may be null
  float* out;
  int64_t out_stride, begin, end;
  float* scratch;
};

// Features [begin, end) of a dense-rowed matrix (tokens, features) into passes.
struct Split {
  const float* from;
  int64_t stride, tokens, features, begin, end;
  float* to;
};

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

constexpr int64_t sample_scratch(int64_t rank) {
  return (rank + kSampleRows) * sample_columns(rank);
}

constexpr int64_t multiply_scratch(int64_t rank, int64_t padded_tokens) {
  return kOutFeatures * padded_tokens + compose_scratch(rank);
}

void split_scalar(const Split& part);
void split_avx2(const Split& part);
void split_avx512(const Split& part);

void sample_scalar(const Sample& panel);
void sample_avx2(const Sample& panel);
void sample_avx512(const Sample& panel);

void multiply_scalar(const Multiply& product);
void multiply_avx2(const Multiply& product);
void multiply_avx512(const Multiply& product);

}  // namespace losa::masked_lora
