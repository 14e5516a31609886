// Few blocks, so that their loops over rows and keys take several turns.
#define LOSA_MAX_BLOCKS 3

#include "cuda/pruning/column_sweep.cu"
#include "cuda/pruning/factor.cu"
#include "cuda/pruning/wanda.cu"
#include "cuda/selection/selection.cu"
#include "driver.h"

namespace selection = losa::selection;
namespace column_sweep = losa::column_sweep;
using losa::FloatType;
using losa::radix_select::kUnit;

// wanda ROWS COLUMNS COUNT M TYPE: weight, norms, mask (or no file) -> packed, faults
void wanda(const Driver& driver) {
  const int64_t rows = driver[0], columns = driver[1], m = driver[3];
  const auto weight = driver.read<uint8_t>("weight");
  const auto norms = driver.read<float>("norms");
  auto mask = driver.read<uint8_t>("mask");
  std::vector<uint8_t> packed(rows * losa::packed_width(columns), 0xa5);
  std::vector<int> faults(1, 0);
  const losa::wanda::Wanda task{.weight = weight.data(),
                                .norms = norms.data(),
                                .mask = data_or_null(mask),
                                .rows = rows,
                                .columns = columns,
                                .count = static_cast<int>(driver[2]),
                                .packed = packed.data(),
                                .faults = faults.data(),
                                .aligned = columns % kUnit == 0};
  switch (static_cast<FloatType>(driver[4])) {
    case FloatType::kFloat: losa::wanda::launch_wanda<FloatType::kFloat>(task, m, nullptr); break;
    case FloatType::kBFloat16: losa::wanda::launch_wanda<FloatType::kBFloat16>(task, m, nullptr); break;
    case FloatType::kHalf: losa::wanda::launch_wanda<FloatType::kHalf>(task, m, nullptr); break;
  }
  driver.write("packed", packed);
  driver.write("faults", faults);
}

// pruned ROWS COLUMNS BLOCK_SIZE: mask -> pruned
void pruned_per_block(const Driver& driver) {
  const int64_t rows = driver[0], columns = driver[1], size = driver[2];
  const auto mask = driver.read<uint8_t>("mask");
  std::vector<int64_t> pruned((columns + size - 1) / size, -1);
  selection::launch_pruned_per_block(mask.data(), rows, columns, size, pruned.data(), nullptr);
  driver.write("pruned", pruned);
}

// factor COLUMNS START END: matrix -> matrix, inverse, failed
void factor(const Driver& driver) {
  const int64_t columns = driver[0], start = driver[1], width = driver[2] - start;
  auto matrix = driver.read<float>("matrix");
  std::vector<float> inverse(width * width, NAN);
  std::vector<int> failed(1, 0);
  losa::factor::launch_panel({.matrix = matrix.data() + start * (columns + 1),
                              .stride = columns,
                              .width = static_cast<int>(width),
                              .inverse = inverse.data(),
                              .failed = failed.data()},
                             nullptr);
  driver.write("matrix", matrix);
  driver.write("inverse", inverse);
  driver.write("failed", failed);
}

// prune ROWS COLUMNS BLOCK_SIZE M PRUNE SPLIT:
// weight, factor, counts (of each block, for M = 0), mask -> weight, packed, loss
void prune(const Driver& driver) {
  const int64_t rows = driver[0], columns = driver[1], size = driver[2], m = driver[3];
  const int64_t stride = losa::packed_width(columns);
  auto weight = driver.read<float>("weight");
  const auto factor = driver.read<float>("factor");
  const auto counts = driver.read<int64_t>("counts");
  auto mask = driver.read<uint8_t>("mask");
  std::vector<uint8_t> kept(rows * stride, 0xa5);
  std::vector<float> loss(rows, 0.0f);
  std::vector<int> state(selection::kStateInts, 0);
  for (int64_t start = 0; start < columns; start += size) {
    const int64_t end = std::min(start + size, columns), width = end - start;
    if (m == 0) {
      std::vector<int> keys(rows * width, -7);
      const selection::ColumnBlock block{.weight = weight.data() + start,
                                         .stride = columns,
                                         .diagonal = factor.data() + start * (columns + 1),
                                         .diagonal_stride = columns + 1,
                                         .mask = data_or_null(mask),
                                         .mask_stride = stride,
                                         .first_column = start,
                                         .rows = static_cast<unsigned>(rows),
                                         .width = static_cast<unsigned>(width),
                                         .count = &counts.at(start / size),
                                         .aligned = columns % 4 == 0 && start % 4 == 0 && width % kUnit == 0};
      selection::launch_select_block(block, keys.data(), state.data(), nullptr);
      for (std::size_t i = selection::kArrived; i < state.size(); ++i) {
        if (state[i] != 0) std::abort();  // the next block needs them zero
      }
    }
    const bool split = driver[5] != 0;
    const int64_t parts = split ? 3 : 1, errors_stride = parts * width + 4;
    std::vector<float> errors(rows * errors_stride - 4, NAN);
    const bool aligned = columns % 4 == 0 && start % 4 == 0 && width % 4 == 0 && errors_stride % 4 == 0;
    const column_sweep::Sweep task{.weight = weight.data() + start,
                                   .stride = columns,
                                   .factor = factor.data() + start * (columns + 1),
                                   .factor_stride = columns,
                                   .width = static_cast<int>(width),
                                   .prune = static_cast<int>(driver[4]),
                                   .rows = rows,
                                   .bound = state.data(),
                                   .mask = mask.empty() ? nullptr : mask.data() + start / 8,
                                   .kept = kept.data() + start / 8,
                                   .packed_stride = stride,
                                   .errors = errors.data(),
                                   .errors_stride = errors_stride,
                                   .split = split,
                                   .loss = loss.data(),
                                   .aligned = aligned};
    column_sweep::launch_sweep_block(task, m, nullptr);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = end; j < columns; ++j) {
        for (int64_t i = 0; i < width; ++i) {
          const float* error = errors.data() + row * errors_stride + i;
          if (split && error[0] != error[width]) std::abort();
          const float whole = split ? error[0] + error[2 * width] : error[0];
          weight[row * columns + j] -= whole * factor[(start + i) * columns + j];
        }
      }
    }
  }
  driver.write("weight", weight);
  driver.write("packed", kept);
  driver.write("loss", loss);
}

int main(int argc, char** argv) {
  const Driver driver(argc, argv);
  if (driver.command == "wanda") wanda(driver);
  if (driver.command == "pruned") pruned_per_block(driver);
  if (driver.command == "factor") factor(driver);
  if (driver.command == "prune") prune(driver);
}
