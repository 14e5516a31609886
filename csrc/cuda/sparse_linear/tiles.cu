// A weight in tiles on CUDA: making it from packed rows, multiplying by it, unpacking it; launches and their shared
// memory. The table at the head of sparse_linear.cu says which products take this way.
#include <algorithm>

#include "cuda/per_device.h"
#include "cuda/sparse_linear/tile_packing.h"
#include "cuda/sparse_linear/tiles_kernel.h"

namespace losa::sparse_linear {

// Warps and stages of a block; there is a block for each group of rows. stage_bytes: of a head and the largest chunk;
// batch: rows of x that the kernel takes, 8 or 16; shared_bytes: the most that a block may have. The least is one warp
// with one stage, about 9 KB.
inline TileShape shape_of(const Tiles& tiles, int stage_bytes, int batch, int shared_bytes) {
  constexpr int kFewWarps = 4;
  const int chunks = tiles.chunks(), most = std::min(chunks, kTileWarps), turns = (chunks + most - 1) / most;
  // As many turns, by no more warps than they take.
  TileShape shape{
      .warps = (chunks + turns - 1) / turns, .stages = std::min(turns, kTileStages), .stage_bytes = stage_bytes};
  const auto fits = [&](int bytes) { return shape.bytes(batch) <= bytes; };
  // Two blocks a multiprocessor, so that one's copies go on while the other adds up its sums; or one that fits.
  const int half = shared_bytes / 2 - 1024;
  while (!fits(half) && shape.stages > 2) --shape.stages;
  while (!fits(half) && shape.warps > kFewWarps) --shape.warps;
  while (!fits(shared_bytes) && shape.stages > 1) --shape.stages;
  while (!fits(shared_bytes) && shape.warps > 1) --shape.warps;
  return shape;
}

template <FloatType kValue, int kBatch>
void launch_tiles(TileTask task, int largest, int shared_bytes, cudaStream_t stream) {
  task.shape = shape_of(task.tiles, kStageHead + largest, kBatch, shared_bytes);
  const int bytes = task.shape.bytes(kBatch);
  const auto kernel = tiles_kernel<kValue, kBatch>;
  static PerDevice<> prepared;
  prepared.get(0, [&] { return prefer_shared_memory(kernel, shared_bytes); });
  const auto grid = static_cast<unsigned>(task.tiles.groups()), threads = static_cast<unsigned>(32 * task.shape.warps);
  LOSA_LAUNCH_DEPENDENT(kernel, grid, threads, bytes, stream, task);
}

// largest: the bytes of the largest chunk. rows and columns of the weight are not 0, the batch is 1 to 16.
template <FloatType kValue>
void launch_tiles(const TileTask& task, int largest, int shared_bytes, cudaStream_t stream) {
  if (task.batch <= 8) {
    launch_tiles<kValue, 8>(task, largest, shared_bytes, stream);
  } else {
    launch_tiles<kValue, 16>(task, largest, shared_bytes, stream);
  }
}

template void launch_tiles<FloatType::kBFloat16>(const TileTask&, int, int, cudaStream_t);
template void launch_tiles<FloatType::kHalf>(const TileTask&, int, int, cudaStream_t);

inline unsigned tile_blocks(int64_t warps) {
  return static_cast<unsigned>((warps + kTilePackWarps - 1) / kTilePackWarps);
}

void launch_count_tiles(const PackedRows& weight, const Tiles& tiles, int64_t* sizes, cudaStream_t stream) {
  LOSA_LAUNCH(count_tiles_kernel, tile_blocks(tiles.groups() * tiles.chunks()), 32 * kTilePackWarps, 0, stream, weight,
              tiles, sizes);
}

void launch_write_tiles(const PackedRows& weight, const Tiles& tiles, uint8_t* data, cudaStream_t stream) {
  LOSA_LAUNCH(write_tiles_kernel, tile_blocks(tiles.groups()), 32 * kTilePackWarps, 0, stream, weight, tiles, data);
}

void launch_unpack_tiles(const Tiles& tiles, uint16_t* dense, cudaStream_t stream) {
  LOSA_LAUNCH(unpack_tiles_kernel, tile_blocks(tiles.groups() * tiles.chunks()), 32 * kTilePackWarps, 0, stream, tiles,
              dense);
}

}  // namespace losa::sparse_linear

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/packing_checks.h"
#include "cuda/sparse_linear/x_and_y.h"

namespace losa::sparse_linear {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMostGroups = int64_t{1} << 31;  // blocks of a launch

void check_size(int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(rows > 0 && rows / kTileRows < kMostGroups - 1, "rows: expected 1 to ", kMostGroups * kTileRows,
                  ", got ", rows);
  STD_TORCH_CHECK(columns > 0 && columns < kMostColumns, "columns: expected 1 to ", kMostColumns - 1, ", got ",
                  columns);
}

bool is_vector(const Tensor& tensor, ScalarType type) {
  return tensor.dim() == 1 && tensor.scalar_type() == type && tensor.is_contiguous();
}

Tiles tiles_of(const Tensor& data, const Tensor& offsets, int64_t rows, int64_t columns) {
  check_size(rows, columns);
  const Tiles tiles{.data = static_cast<const uint8_t*>(data.const_data_ptr()),
                    .offsets = static_cast<const int64_t*>(offsets.const_data_ptr()),
                    .rows = rows,
                    .columns = static_cast<int>(columns)};
  STD_TORCH_CHECK(is_vector(data, ScalarType::Byte) && reinterpret_cast<uintptr_t>(tiles.data) % kCopyUnit == 0,
                  "data: expected a contiguous uint8 vector at a 16-byte boundary");
  STD_TORCH_CHECK(is_vector(offsets, ScalarType::Long) && offsets.size(0) == tiles.groups() * tiles.chunks() + 1,
                  "offsets: expected int64 (", tiles.groups() * tiles.chunks() + 1, ",), contiguous");
  return tiles;
}

Tensor count_tiles(const Tensor& bitmask, int64_t columns) {
  STD_TORCH_CHECK(bitmask.dim() == 2, "bitmask: expected a uint8 tensor (out, ceil(in / 8))");
  const int64_t rows = bitmask.size(0);
  check_mask(bitmask, rows, columns, "bitmask");
  check_size(rows, columns);
  const DeviceGuard guard(bitmask.get_device_index());
  const Tensor bits = torch::stable::contiguous(bitmask);
  const Tiles tiles{.data = nullptr, .offsets = nullptr, .rows = rows, .columns = static_cast<int>(columns)};
  const PackedRows weight{
      .mask = static_cast<const uint8_t*>(bits.const_data_ptr()), .rows = rows, .columns = tiles.columns};
  Tensor sizes = torch::stable::new_empty(bitmask, {tiles.groups() * tiles.chunks()}, ScalarType::Long);
  launch_count_tiles(weight, tiles, static_cast<int64_t*>(sizes.mutable_data_ptr()), current_stream(bitmask));
  return sizes;
}

void write_tiles(const Tensor& values, const Tensor& bitmask, const std::optional<Tensor>& row_offsets, int64_t columns,
                 const Tensor& offsets, const Tensor& data) {
  STD_TORCH_CHECK(bitmask.dim() == 2, "bitmask: expected a uint8 tensor (out, ceil(in / 8))");
  const int64_t rows = bitmask.size(0), total = values.numel();
  check_mask(bitmask, rows, columns, "bitmask");
  packing::check_values(values, row_offsets, rows);
  STD_TORCH_CHECK(values.is_contiguous() && values.element_size() == 2, "values: expected 16 bits, contiguous");
  const DeviceGuard guard(values.get_device_index());
  const Tensor bits = torch::stable::contiguous(bitmask);
  const Tiles tiles = tiles_of(data, offsets, rows, columns);
  const PackedRows weight{.values = static_cast<const uint16_t*>(values.const_data_ptr()),
                          .total = total,
                          .offsets = row_offsets ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr,
                          .length = total / rows,
                          .mask = static_cast<const uint8_t*>(bits.const_data_ptr()),
                          .rows = rows,
                          .columns = tiles.columns};
  launch_write_tiles(weight, tiles, static_cast<uint8_t*>(data.mutable_data_ptr()), current_stream(values));
}

void unpack_tiles(const Tensor& data, const Tensor& offsets, const Tensor& dense) {
  STD_TORCH_CHECK(dense.dim() == 2 && dense.is_contiguous() && dense.element_size() == 2,
                  "dense: expected a contiguous tensor (out, in) of 16 bits");
  const DeviceGuard guard(dense.get_device_index());
  const Tiles tiles = tiles_of(data, offsets, dense.size(0), dense.size(1));
  launch_unpack_tiles(tiles, static_cast<uint16_t*>(dense.mutable_data_ptr()), current_stream(dense));
}

Tensor sparse_linear_tiles(const Tensor& x, const Tensor& data, const Tensor& offsets, int64_t rows, int64_t largest,
                           const std::optional<Tensor>& bias) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1, "x: expected (..., in)");
  const FloatType value = float_type(x, "x");
  STD_TORCH_CHECK(value != FloatType::kFloat, "x: expected bfloat16 or float16");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == rows && bias->is_contiguous()),
                  "bias: expected a contiguous tensor (", rows, ",)");
  const int64_t columns = x.size(dims - 1);
  const Tiles tiles = tiles_of(data, offsets, rows, columns);
  const int64_t batch = batch_of(x);
  const DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  Tensor y = result_of(x, rows);
  if (batch == 0) return y;

  constexpr int64_t kMost = kChunkTiles * (kTileMaskBytes + 2 * kTileRows * kTileColumns);
  STD_TORCH_CHECK(0 < largest && largest <= kMost && largest % kCopyUnit == 0, "largest: expected a multiple of ",
                  kCopyUnit, " up to ", kMost, ", got ", largest);
  const Tensor padded = padded_x(x, batch, columns, kTileColumns, stream);
  const TileTask task{.tiles = tiles,
                      .x = padded.const_data_ptr(),
                      .x_stride = int64_t{tiles.tiles()} * kTileColumns,
                      .batch = static_cast<int>(batch),
                      .bias = bias ? bias->const_data_ptr() : nullptr,
                      .bias_type = bias ? float_type(*bias, "bias") : FloatType::kFloat,
                      .y = y.mutable_data_ptr(),
                      .shape = {}};  // launch_tiles sets it
  const auto launch = value == FloatType::kHalf ? launch_tiles<FloatType::kHalf> : launch_tiles<FloatType::kBFloat16>;
  launch(task, static_cast<int>(largest), device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(), stream);
  return y;
}

}  // namespace
}  // namespace losa::sparse_linear

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("count_tiles", TORCH_BOX(&losa::sparse_linear::count_tiles));
  library.impl("write_tiles", TORCH_BOX(&losa::sparse_linear::write_tiles));
  library.impl("unpack_tiles", TORCH_BOX(&losa::sparse_linear::unpack_tiles));
  library.impl("sparse_linear_tiles", TORCH_BOX(&losa::sparse_linear::sparse_linear_tiles));
}

#endif
