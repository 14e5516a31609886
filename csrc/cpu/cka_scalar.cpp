// The portable kernel; the others are compiled with their instruction set's flags.
#include "cpu/cka_impl.h"

namespace losa::cka {

void add_slice_scalar(const Slice& slice) {
  add_slice(slice);
}

}  // namespace losa::cka
