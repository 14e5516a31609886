// Rows of packed values, one kept element after another: for elements of 1 and 8 bytes, for CPUs without vector
// instructions that move kept elements together, and for the end of a row.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace losa::packing {
namespace {

template <class Element>
void pack_row_scalar(const void* row, const uint8_t* mask, int64_t columns, void* values, int64_t) {
  const auto* from = static_cast<const Element*>(row);
  auto* to = static_cast<Element*>(values);
  for (; columns > 0; columns -= 8, from += 8, ++mask) {
    unsigned bits = *mask & column_bits(columns);
    for (; bits != 0; bits &= bits - 1) *to++ = from[__builtin_ctz(bits)];
  }
}

template <class Element>
void unpack_row_scalar(const void* values, int64_t readable, const uint8_t* mask, int64_t columns, void* row) {
  const auto* from = static_cast<const Element*>(values);
  const auto* const end = from + readable;
  auto* to = static_cast<Element*>(row);
  for (int64_t column = 0; column < columns; ++column) to[column] = 0;
  for (; columns > 0; columns -= 8, to += 8, ++mask) {
    for (unsigned bits = *mask & column_bits(columns); bits != 0 && from < end; bits &= bits - 1) {
      to[__builtin_ctz(bits)] = *from++;
    }
  }
}

}  // namespace
}  // namespace losa::packing
