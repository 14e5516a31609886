// Row kernels of packed masks, for bitmask.cpp and every op that reads or writes a mask row by row.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace losa::bitmask {

struct Kernels {
  // bools (columns,), any nonzero byte is true -> packed (ceil(columns / 8),)
  void (*pack_row)(const uint8_t* bools, int64_t columns, uint8_t* packed);
  // packed (ceil(columns / 8),) -> bools (columns,) of 0 and 1
  void (*unpack_row)(const uint8_t* packed, int64_t columns, uint8_t* bools);
};

LOSA_KERNELS(Kernels)

}  // namespace losa::bitmask
