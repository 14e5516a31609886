// Row kernels of csrc/cpu/packing.cpp. Elements are moved as integers of their size, so every bit pattern survives.
#pragma once

#include <cstdint>

namespace losa::packing {

// The kept elements of a row, one after another: exactly `count` of them are written, as many as the mask has bits.
using PackRow = void (*)(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t count);

// The inverse, with zeros at pruned places. `readable` elements may be read from `values`: this row's and what follows.
using UnpackRow = void (*)(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row);

template <class Element>
void pack_row_scalar(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t count);
template <class Element>
void unpack_row_scalar(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row);

void pack_row16_avx2(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t count);
void pack_row32_avx2(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t count);
void unpack_row16_avx2(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row);
void unpack_row32_avx2(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row);

void pack_row16_avx512(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t count);
void pack_row32_avx512(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t count);
void unpack_row16_avx512(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row);
void unpack_row32_avx512(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row);

}  // namespace losa::packing
