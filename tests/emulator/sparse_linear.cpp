#include "cuda/sparse_linear/sparse_linear.cu"

#include "driver.h"

namespace sparse_linear = losa::sparse_linear;
using losa::FloatType;

// multiply ROWS COLUMNS BATCH TENSOR_CORES VALUE BIAS_VALUE PER_BYTE SPLIT ALIGNED LEAD LOT:
// values, mask, offsets (or no file), x (of padded rows), bias (or no file) -> y, attributes
// devices: the same by three calls, the third on another device. attributes: how many attributes of kernels were set
// when each call had ended, and the threads of a block
int main(int argc, char** argv) {
  const Driver driver(argc, argv);
  const int64_t rows = driver[0], columns = driver[1], batch = driver[2];
  const bool tensor = driver[3] != 0, aligned = driver[8] != 0;
  const auto value = static_cast<FloatType>(driver[4]);
  const int64_t size = value == FloatType::kFloat ? 4 : 2, x_size = tensor ? size : 4;
  // The buffer's first bytes may belong to another tensor: then the first value does not lie at a 16-byte boundary.
  const auto values = driver.read<uint8_t>("values");
  const int64_t lead = driver[9];
  const auto mask = driver.read<uint8_t>("mask");
  auto offsets = driver.read<int64_t>("offsets");
  auto x = driver.read<uint8_t>("x");
  auto bias = driver.read<uint8_t>("bias");
  std::vector<uint8_t> y(batch * rows * x_size, 0xa5);
  emulator::write_late(x);
  emulator::write_late(y);
  const auto total = static_cast<int64_t>(values.size()) / size;
  const sparse_linear::Weight weight{.values = values.data(),
                                     .lead = lead,
                                     .total = total,
                                     .offsets = data_or_null(offsets),
                                     .length = (total - lead) / rows,
                                     .per_byte = static_cast<int>(driver[6]),
                                     .mask = mask.data(),
                                     .mask_stride = losa::packed_width(columns),
                                     .rows = rows,
                                     .columns = static_cast<int>(columns),
                                     .word_aligned = aligned && losa::packed_width(columns) % 4 == 0};
  const sparse_linear::Task task{.weight = weight,
                                 .x = x.data(),
                                 .x_stride = (columns + 7) / 8 * 8,
                                 .batch = static_cast<int>(batch),
                                 .bias = data_or_null(bias),
                                 .bias_type = static_cast<FloatType>(driver[5]),
                                 .y = y.data(),
                                 .split = 1,
                                 .slice = 0};
  const auto run = !tensor
      ? (value == FloatType::kFloat          ? sparse_linear::launch_sparse_linear<false, FloatType::kFloat>
             : value == FloatType::kBFloat16 ? sparse_linear::launch_sparse_linear<false, FloatType::kBFloat16>
                                             : sparse_linear::launch_sparse_linear<false, FloatType::kHalf>)
      : value == FloatType::kHalf ? sparse_linear::launch_sparse_linear<true, FloatType::kHalf>
                                  : sparse_linear::launch_sparse_linear<true, FloatType::kBFloat16>;
  const sparse_linear::Choice choice{
      .split = static_cast<int>(driver[7]), .lot = static_cast<int>(driver[10]), .multiprocessors = 2};
  std::vector<int> attributes;
  for (int device : {0, 0, 1}) {
    emulator::machine.device = device;
    run(task, choice, nullptr);
    attributes.push_back(emulator::machine.attributes_set);
    if (driver.command != "devices") break;
  }
  attributes.push_back(static_cast<int>(blockDim.x));
  driver.write("y", y);
  driver.write("attributes", attributes);
}
