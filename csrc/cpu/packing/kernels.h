// Row kernels of packing.cpp. Elements are moved as integers of their size, so every bit pattern survives.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace losa::packing {

// row (columns,) and its packed mask -> values (count,), the kept elements one after another. Exactly `count` elements
// are written, as many as the mask has bits.
using PackRow = void (*)(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t count);

// The inverse: row (columns,), with zeros where the mask's bit is 0. `readable` elements may be read from `values`:
// this row's values and what follows them in the buffer.
using UnpackRow = void (*)(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row);

// For elements of 1, 2, 4 and 8 bytes.
struct Kernels {
  PackRow pack_row8, pack_row16, pack_row32, pack_row64;
  UnpackRow unpack_row8, unpack_row16, unpack_row32, unpack_row64;
};

LOSA_KERNELS(Kernels)

}  // namespace losa::packing
