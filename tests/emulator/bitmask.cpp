#include "cuda/bitmask.cu"

#include "driver.h"

// pack ROWS COLUMNS STRIDE BLOCKS: bools -> packed; unpack ROWS COLUMNS STRIDE BLOCKS: packed -> bools; BLOCKS at most
int main(int argc, char** argv) {
  const Driver driver(argc, argv);
  const int64_t rows = driver[0], columns = driver[1], stride = driver[2], width = losa::packed_width(columns);
  if (driver.command == "pack") {
    const auto bools = driver.read<uint8_t>("bools");
    std::vector<uint8_t> packed(rows * width, 0xa5);
    losa::bitmask::launch_pack(bools.data(), stride, rows, columns, packed.data(), nullptr, driver[3]);
    driver.write("packed", packed);
  } else {
    const auto packed = driver.read<uint8_t>("packed");
    std::vector<uint8_t> bools(rows * columns, 0xa5);
    losa::bitmask::launch_unpack(packed.data(), stride, rows, columns, bools.data(), nullptr, driver[3]);
    driver.write("bools", bools);
  }
}
