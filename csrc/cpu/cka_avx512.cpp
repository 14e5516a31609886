// Compiled with AVX-512 flags.
#include "cpu/cka_impl.h"

namespace losa::cka {

void add_slice_avx512(const Slice& slice) {
  add_slice(slice);
}

}  // namespace losa::cka
