// What decoder_step.cpp and its kernels agree on. All rows are contiguous and of one type; sums are fp32.
#pragma once

#include <cstdint>

#include "common/float_type.h"
#include "cpu/isa.h"

namespace losa::decoder_step {

// Queries that share a key head, over places [0, count) of the cache.
struct Attention {
  FloatType type;
  const void* q;  // (queries, size)
  int64_t queries;
  const void* keys;  // (count, size), as are values
  const void* values;
  int64_t count, size;
  float scaling;
  void* out;  // (queries, size)
  float* scratch;
};

struct Kernels {
  // x (columns,) += update, where there is one; out = x / sqrt(mean(x^2) + eps) * weight. The sum, the normalised row
  // and its product are each rounded.
  void (*add_rms_norm)(FloatType type, void* x, const void* update, const void* weight, void* out, int64_t columns,
                       float eps);
  // out = x cos + roll(x, size / 2) sin, of the norm of x (size,) where it has a weight; size is even.
  void (*rotate)(FloatType type, const void* x, const void* cos, const void* sin, const void* norm, float eps,
                 void* out, int64_t size);
  void (*attend)(const Attention& task);
  // Elements of fp32 that attend takes, for any number of queries.
  int64_t (*attend_scratch)(int64_t count, int64_t size);
  // out = silu(gate) * up (count,); silu is rounded, and so is the product.
  void (*gated_silu)(FloatType type, const void* gate, const void* up, void* out, int64_t count);
};

LOSA_KERNELS(Kernels)

}  // namespace losa::decoder_step
