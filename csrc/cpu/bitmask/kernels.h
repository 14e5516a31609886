// Row kernels of csrc/cpu/bitmask.cpp, one set per instruction set.
#pragma once

#include <cstdint>

namespace losa::bitmask {

using PackRow = void (*)(const uint8_t* bools, int64_t columns, uint8_t* packed);
using UnpackRow = void (*)(const uint8_t* packed, int64_t columns, uint8_t* bools);

void pack_row_scalar(const uint8_t* bools, int64_t columns, uint8_t* packed);
void unpack_row_scalar(const uint8_t* packed, int64_t columns, uint8_t* bools);

void pack_row_avx2(const uint8_t* bools, int64_t columns, uint8_t* packed);
void unpack_row_avx2(const uint8_t* packed, int64_t columns, uint8_t* bools);

}  // namespace losa::bitmask
