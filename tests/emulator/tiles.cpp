#include "cuda/sparse_linear/tiles.cu"

#include "driver.h"

namespace sparse_linear = losa::sparse_linear;
using losa::FloatType;

// ROWS COLUMNS, then
// pack: values, mask, offsets (or no file) -> data, places; as the host would with the sums of the chunks' sizes
// unpack: data, places -> dense
// multiply BATCH VALUE BIAS_VALUE BULK SHARED: data, places, x (rows of columns rounded up to 64), bias (or no file)
//   -> y, by a device whose blocks may have SHARED bytes
int main(int argc, char** argv) {
  const Driver driver(argc, argv);
  const int64_t rows = driver[0];
  const auto columns = static_cast<int>(driver[1]);
  auto data = driver.read<uint8_t>("data");
  auto places = driver.read<int64_t>("places");
  sparse_linear::Tiles tiles{.data = data.data(), .offsets = places.data(), .rows = rows, .columns = columns};
  const int64_t chunks = tiles.groups() * tiles.chunks();
  if (driver.command == "pack") {
    const auto values = driver.read<uint16_t>("values");
    const auto mask = driver.read<uint8_t>("mask");
    auto offsets = driver.read<int64_t>("offsets");
    const auto total = static_cast<int64_t>(values.size());
    const int64_t length = total / rows;
    const sparse_linear::PackedRows weight{.values = values.data(),
                                           .total = total,
                                           .offsets = data_or_null(offsets),
                                           .length = length,
                                           .mask = mask.data(),
                                           .rows = rows,
                                           .columns = columns};
    std::vector<int64_t> sizes(chunks, -1);
    sparse_linear::launch_count_tiles(weight, tiles, sizes.data(), nullptr);
    places.assign(chunks + 1, 0);
    for (int64_t i = 0; i < chunks; ++i) places[i + 1] = places[i] + sizes[i];
    data.assign(16 * places[chunks], 0xa5);
    tiles.offsets = places.data();
    sparse_linear::launch_write_tiles(weight, tiles, data.data(), nullptr);
    driver.write("data", data);
    driver.write("places", places);
  } else if (driver.command == "unpack") {
    std::vector<uint16_t> dense(rows * columns, 0xa5a5);
    sparse_linear::launch_unpack_tiles(tiles, dense.data(), nullptr);
    driver.write("dense", dense);
  } else {
    auto x = driver.read<uint16_t>("x");
    auto bias = driver.read<uint8_t>("bias");
    const auto batch = static_cast<int>(driver[2]);
    emulator::machine.has_bulk_copies = driver[5] != 0;
    int64_t largest = 0;
    for (int64_t i = 0; i < chunks; ++i) largest = std::max(largest, 16 * (places[i + 1] - places[i]));
    std::vector<uint16_t> y(batch * rows, 0xa5a5);
    emulator::write_late(x);
    emulator::write_late(y);
    const sparse_linear::TileTask task{.tiles = tiles,
                                       .x = x.data(),
                                       .x_stride = int64_t{tiles.tiles()} * sparse_linear::kTileColumns,
                                       .batch = batch,
                                       .bias = data_or_null(bias),
                                       .bias_type = static_cast<FloatType>(driver[4]),
                                       .y = y.data(),
                                       .shape = {}};
    const bool half = static_cast<FloatType>(driver[3]) == FloatType::kHalf;
    const auto run =
        half ? sparse_linear::launch_tiles<FloatType::kHalf> : sparse_linear::launch_tiles<FloatType::kBFloat16>;
    run(task, static_cast<int>(largest), static_cast<int>(driver[6]), nullptr);
    driver.write("y", y);
  }
}
