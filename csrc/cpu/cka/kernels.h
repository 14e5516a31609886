// The kernel of cka.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/float_type.h"
#include "cpu/isa.h"

namespace losa::cka {

// Some columns of one layer's features, and the Gram that they are added to.
struct Slice {
  const void* features;  // sample 0 at the slice's first column
  FloatType type;
  int64_t stride;  // elements from sample to sample
  int64_t samples, columns;
  double* gram;    // samples x samples: on and above the diagonal; entries below it are not defined
  float* scratch;  // 64-byte aligned
};

// Columns that are centred and multiplied together: the columns of all samples stay in the
// second-level cache, and fp32 sums stay short.
constexpr int64_t panel_columns(int64_t samples) {
  return std::clamp<int64_t>((int64_t{1} << 16) / samples & ~int64_t{63}, 256, 2048);
}

// floats of scratch; samples are padded to a multiple of at most 8
constexpr int64_t slice_scratch(int64_t samples) {
  return (samples + 9) * panel_columns(samples);
}

struct Kernels {
  // Adds the Gram of a slice's centred samples to slice.gram.
  void (*add_slice)(const Slice& slice);
};

LOSA_KERNELS(Kernels)

}  // namespace losa::cka
