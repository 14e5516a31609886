// Rows of a matrix shared out over torch's threads. For files that are compiled for any CPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace losa {

// Below this many columns of work a second thread costs more than it saves.
constexpr int64_t kColumnsPerTask = 1 << 16;

template <class Body>
void for_each_row(int64_t rows, int64_t columns, const Body& body) {
  if (columns == 0) return;  // rows without columns take no memory: there may be any number of them
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kColumnsPerTask / columns),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) body(row);
                              });
}

}  // namespace losa
