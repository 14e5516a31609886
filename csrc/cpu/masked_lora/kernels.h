// The kernels of panels.cpp and products.cpp, and what each of them is given. Strides are in elements; the last
// dimension of every matrix is dense.
#pragma once

#include <cstdint>

#include "common/float_type.h"
#include "cpu/isa.h"
#include "cpu/masked_lora/shapes.h"

namespace losa::masked_lora {

// Which entries of a panel are kept: by packed bits, or by weight != 0 if bits is null.
struct Kept {
  const uint8_t* bits;
  int64_t bits_stride;
  const void* weight;
  int64_t weight_stride;
  FloatType weight_type;
};

// out = M * (W + B A), rounded once to out's type. Without base: M * (B A); rank 0: M * W.
struct Compose {
  Kept kept;
  bool base;
  const float* lora_A;  // (rank, columns)
  const float* lora_B;  // (rows, rank), scaled, dense
  int64_t lora_A_stride, rank;
  void* out;
  int64_t out_stride;
  FloatType out_type;
  int64_t rows, columns;
  float* scratch;
};

// Of a gradient panel G:  dA += B^T (M * G),  dB += (M * G) A^T. dA or dB may be null.
struct Project {
  Kept kept;
  const void* gradient;
  int64_t gradient_stride;
  FloatType gradient_type;
  const float* lora_A;  // (rank, columns)
  const float* lora_B;  // (rows, rank), scaled, dense
  int64_t lora_A_stride, rank;
  float* dA;  // (rank, padded columns)
  float* dB;  // (rows, rank), dense
  int64_t rows, columns;
  float* scratch;
};

// A matrix (tokens, features) as passes over the tokens see it: for each pass (features, its tokens), dense. Passes
// have as many tokens as the instruction set likes. The last pass has the remaining tokens, with zeros up to a multiple
// of kTokens.
struct Passes {
  const float* data;
  int64_t features;  // of the whole matrix
  int64_t first;     // feature that row or column 0 of a panel is
};

// dA += B^T (M * G),  dB += (M * G) A^T, where only the entries of G = dY^T x are formed that the mask keeps. dA or dB
// may be null.
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

struct Kernels {
  // Beside a dense product: panels.cpp.
  void (*compose)(const Compose& panel);
  void (*project)(const Project& panel);
  // Products of nothing but kept entries: products.cpp.
  void (*split)(const Split& part);
  void (*multiply)(const Multiply& product);
  void (*sample)(const Sample& panel);
};

LOSA_KERNELS(Kernels)

}  // namespace losa::masked_lora
