// sparse_linear on CUDA: y = x W^T from a packed weight, for up to 16 rows of x.
//
// Which kernel multiplies what, where x is (batch, in) and the weight (out, in):
//
// | x          | values of W     | batch   | columns (in)       | kernel        | why                                 |
// |------------|-----------------|---------|--------------------|---------------|-------------------------------------|
// | bf16, fp16 | the type of x   | 1       | 32 * n up to 28672 | window_kernel | A warp has its 1024 columns of x    |
// |            |                 | 2       | 32 * n up to 20480 | window_kernel | in registers, a block all columns   |
// |            |                 | 3, 4    | 32 * n up to 12288 | window_kernel | of a row. Registers bound the       |
// |            |                 |         |                    |               | warps of a block.                   |
// |            |                 | 1 to 4  | every other number | row_kernel    | It reads masks of any alignment     |
// |            |                 | 5 to 16 | all                | row_kernel    | and x anew for each step. For fp32  |
// | fp32       | fp32, bf16,     | 1 to 16 | all                | row_kernel    | it has a path without tensor cores. |
// |            | fp16            |         |                    |               |                                     |
// | bf16, fp16 | another type    | 1 to 16 | all                | row_kernel    | losa_kernels converts x to fp32.    |
// | bf16, fp16 | the type of x,  | 1 to 16 | all                | tiles_kernel  | One bulk copy brings masks and      |
// |            | made into tiles |         |                    |               | values of 16 rows; tensor cores     |
// |            |                 |         |                    |               | use all of a tile (tiles.cu).       |
// | all        | all             | over 16 | all                | none          | losa_kernels unpacks W and takes    |
// |            |                 |         |                    |               | torch's product.                    |
//
// Columns are below 2^30. window_kernel reads the mask in aligned 32-bit words: if the bitmask begins elsewhere (a
// view), or W has 2^30 rows or more, row_kernel runs instead. Both kernels take the bitmask format, with row offsets,
// and N:M, whose rows have equally many values; row_kernel<.., true> is for N:M where every 8 columns have equally many
// values (1:4, 2:4, 4:8, ...; not M = 16), so that it counts no bits. Weights in torch's own 2:4 format and of other
// types take torch's products.
//
// Where x has the 16-bit type of the values, losa_kernels/sparse_linear/ways.py chooses among this file (`window`),
// tiles (`tiles`) and unpacking (`unpack`): by LOSA_SPARSE_LINEAR, by one measurement of each way, or, where nothing
// may be measured, by a rule: tiles from compute capability 9.0 on, else this file for up to 4 rows of x, else
// unpacking.
//
// The environment variable LOSA_WINDOW_LOT=1..4 sets how many rows window_kernel takes between two barriers (else 4),
// to compare them on a card. Where shared memory does not suffice there are fewer.
#include <algorithm>

#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "cuda/sparse_linear/row_kernel.h"
#include "cuda/sparse_linear/window_kernel.h"

namespace losa::sparse_linear {

// How a call is to run. 0 leaves a number to the launcher.
struct Choice {
  int split;  // warps of row_kernel that share a group of rows; a number asks for this kernel as well
  int lot;    // rows of window_kernel between two barriers
  int multiprocessors;
};

// A weight with few rows leaves multiprocessors idle: then up to 8 warps of a block share the columns of a group of
// rows.
inline int split_for(int64_t rows, int rows_of_warp, int columns, int multiprocessors) {
  const int64_t groups = (rows + rows_of_warp - 1) / rows_of_warp, wanted = int64_t{8} * multiprocessors;
  int split = 1;
  while (split < kWarps && groups * split < wanted && columns >= 2 * split * kStepColumns) split *= 2;
  return split;
}

template <bool kTensorCores, FloatType kValue, int kBatch, bool kEqualBytes>
void launch_row_kernel(Task task, const Choice& choice, cudaStream_t stream) {
  constexpr int kRows = rows_of_warp(kTensorCores, kBatch);
  constexpr int kBytes = RowBuffers<ElementBits<kValue>, kRows>::kBytes;
  const int64_t rows = task.weight.rows;
  const int columns = task.weight.columns;
  task.split = choice.split > 0 ? choice.split : split_for(rows, kRows, columns, choice.multiprocessors);
  const int steps = (columns + kStepColumns - 1) / kStepColumns;
  task.slice = (steps + task.split - 1) / task.split * kStepColumns;
  const int64_t block_rows = kWarps / task.split * kRows;
  const auto grid = static_cast<unsigned>((rows + block_rows - 1) / block_rows);
  const auto kernel = row_kernel<kTensorCores, kValue, kBatch, kEqualBytes>;
  static PerDevice<> prepared;
  prepared.get(0, [&] { return prefer_shared_memory(kernel, kBytes); });
  LOSA_LAUNCH_DEPENDENT(kernel, grid, kThreads, kBytes, stream, task);
}

template <bool kTensorCores, FloatType kValue, int kBatch>
void launch_row_kernel(const Task& task, const Choice& choice, cudaStream_t stream) {
  if (task.weight.per_byte > 0) {
    launch_row_kernel<kTensorCores, kValue, kBatch, true>(task, choice, stream);
  } else {
    launch_row_kernel<kTensorCores, kValue, kBatch, false>(task, choice, stream);
  }
}

// The shared memory that every GPU from compute capability 8.0 on has for one block.
constexpr int kMostShared = 99 << 10;
static_assert(WindowShape{.windows = most_windows(1), .lot = 1}.bytes(1) <= kMostShared);
static_assert(WindowShape{.windows = most_windows(2), .lot = 1}.bytes(2) <= kMostShared);
static_assert(WindowShape{.windows = most_windows(4), .lot = 1}.bytes(4) <= kMostShared);

template <FloatType kValue, int kBatch>
void launch_window_kernel(const Task& task, int windows, const Choice& choice, cudaStream_t stream) {
  WindowShape shape{.windows = windows, .lot = choice.lot > 0 ? std::min(choice.lot, kMostLot) : kMostLot};
  while (shape.bytes(kBatch) > kMostShared) --shape.lot;
  const auto kernel = window_kernel<kValue, kBatch>;
  const int threads = 32 * windows, bytes = shape.bytes(kBatch);
  static PerDevice<(most_windows(kBatch) + 1) * (kMostLot + 1)> residents;
  const int resident = residents.get(windows * (kMostLot + 1) + shape.lot, [&] {
    prefer_shared_memory(kernel, kMostShared);  // the same in every thread's calls
    int blocks = 0;
    LOSA_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes));
    return std::max(blocks, 1);
  });
  // One wave of blocks, all of nearly as many rows.
  const auto rows = static_cast<int>(task.weight.rows), blocks = std::min(rows, resident * choice.multiprocessors);
  shape.rows = rows / blocks;
  shape.longer = rows % blocks;
  LOSA_LAUNCH_DEPENDENT(kernel, static_cast<unsigned>(blocks), threads, bytes, stream, task, shape);
}

// Whether window_kernel can take the task: a block has a warp for each window, a lane whole words of the mask.
inline bool fits_window_kernel(const Task& task, int windows) {
  const Weight& weight = task.weight;
  return task.batch <= 4 && windows > 0 && windows <= most_windows(task.batch) && weight.word_aligned &&
      weight.columns % 32 == 0 && weight.rows < int64_t{1} << 30;
}

// The kernel of the table above. kTensorCores: x has the 16-bit type of the values; else x is fp32.
template <bool kTensorCores, FloatType kValue>
void launch_sparse_linear(const Task& task, const Choice& choice, cudaStream_t stream) {
  if (task.weight.rows == 0 || task.batch == 0) return;
  if constexpr (kTensorCores) {
    const int windows = (task.weight.columns + kWindowColumns - 1) / kWindowColumns;
    if (choice.split == 0 && fits_window_kernel(task, windows)) {
      const auto run = task.batch == 1 ? launch_window_kernel<kValue, 1>
          : task.batch == 2            ? launch_window_kernel<kValue, 2>
                                       : launch_window_kernel<kValue, 4>;
      return run(task, windows, choice, stream);
    }
  }
  const auto run = task.batch <= 1 ? launch_row_kernel<kTensorCores, kValue, 1>
      : task.batch <= 2            ? launch_row_kernel<kTensorCores, kValue, 2>
      : task.batch <= 4            ? launch_row_kernel<kTensorCores, kValue, 4>
      : task.batch <= 8            ? launch_row_kernel<kTensorCores, kValue, 8>
                                   : launch_row_kernel<kTensorCores, kValue, 16>;
  run(task, choice, stream);
}

template void launch_sparse_linear<true, FloatType::kBFloat16>(const Task&, const Choice&, cudaStream_t);
template void launch_sparse_linear<true, FloatType::kHalf>(const Task&, const Choice&, cudaStream_t);
template void launch_sparse_linear<false, FloatType::kBFloat16>(const Task&, const Choice&, cudaStream_t);
template void launch_sparse_linear<false, FloatType::kHalf>(const Task&, const Choice&, cudaStream_t);
template void launch_sparse_linear<false, FloatType::kFloat>(const Task&, const Choice&, cudaStream_t);

}  // namespace losa::sparse_linear

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/packing_checks.h"
#include "common/settings.h"
#include "cuda/sparse_linear/x_and_y.h"

namespace losa::sparse_linear {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

int window_lot() {
  static_assert(kMostLot == 4);
  static const int lot = setting("LOSA_WINDOW_LOT", {"auto", "1", "2", "3", "4"});
  return lot;
}

// How many elements before values' first one lie between it and a multiple of 16 bytes. They are of the same storage;
// if they are not, values become a copy that begins at such a multiple.
int64_t align_values(Tensor& values) {
  const auto size = static_cast<int64_t>(values.element_size());
  const int64_t lead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16) / size;
  int64_t before = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(values.get(), &before));
  if (lead <= before) return lead;
  values = torch::stable::clone(values);
  return 0;
}

Weight weight_of(const Tensor& values, int64_t lead, const Tensor& bitmask, const std::optional<Tensor>& row_offsets,
                 int64_t columns, int64_t per_byte) {
  const auto size = static_cast<int64_t>(values.element_size());
  const int64_t rows = bitmask.size(0), width = bitmask.size(1), total = values.numel();
  const auto* const mask = static_cast<const uint8_t*>(bitmask.const_data_ptr());
  return {.values = static_cast<const uint8_t*>(values.const_data_ptr()) - lead * size,
          .lead = lead,
          .total = lead + total,
          .offsets = row_offsets.has_value() ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr,
          .length = total / rows,
          .per_byte = static_cast<int>(per_byte),
          .mask = mask,
          .mask_stride = width,
          .rows = rows,
          .columns = static_cast<int>(columns),
          .word_aligned = width % 4 == 0 && reinterpret_cast<uintptr_t>(mask) % 4 == 0};
}

// x (..., in) -> (..., out) of the dtype of x.
Tensor multiply(const Tensor& x, Tensor values, const Tensor& bitmask, const std::optional<Tensor>& row_offsets,
                const std::optional<Tensor>& bias, int64_t per_byte) {
  packing::check_sparse_linear(x, values, bitmask, row_offsets, bias);
  const FloatType value = float_type(values, "values"), x_type = float_type(x, "x");
  STD_TORCH_CHECK(x_type == value || x_type == FloatType::kFloat, "x: expected float32 or the dtype of values");
  const int64_t rows = bitmask.size(0), columns = x.size(x.dim() - 1);
  STD_TORCH_CHECK(columns < kMostColumns, "x: expected fewer than ", kMostColumns, " columns, got ", columns);

  const int64_t batch = batch_of(x);
  const DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  Tensor y = result_of(x, rows);
  if (batch == 0 || rows == 0) return y;

  const Tensor padded = padded_x(x, batch, columns, 8, stream);
  const int64_t lead = align_values(values);
  const Task task{.weight = weight_of(values, lead, bitmask, row_offsets, columns, per_byte),
                  .x = padded.const_data_ptr(),
                  .x_stride = (columns + 7) / 8 * 8,
                  .batch = static_cast<int>(batch),
                  .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
                  .bias_type = bias.has_value() ? float_type(*bias, "bias") : FloatType::kFloat,
                  .y = y.mutable_data_ptr(),
                  .split = 1,
                  .slice = 0};
  const auto launch = x_type == FloatType::kFloat
      ? (value == FloatType::kFloat          ? launch_sparse_linear<false, FloatType::kFloat>
             : value == FloatType::kBFloat16 ? launch_sparse_linear<false, FloatType::kBFloat16>
                                             : launch_sparse_linear<false, FloatType::kHalf>)
      : value == FloatType::kBFloat16 ? launch_sparse_linear<true, FloatType::kBFloat16>
                                      : launch_sparse_linear<true, FloatType::kHalf>;
  launch(task, {.split = 0, .lot = window_lot(), .multiprocessors = multiprocessors()}, stream);
  return y;
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& bitmask,
                     const std::optional<Tensor>& row_offsets, const std::optional<Tensor>& bias) {
  return multiply(x, values, bitmask, row_offsets, bias, 0);
}

Tensor sparse_linear_nm(const Tensor& x, const Tensor& values, const Tensor& bitmask, int64_t per_byte,
                        const std::optional<Tensor>& bias) {
  packing::check_per_byte(x, values, bitmask, per_byte);
  return multiply(x, values, bitmask, std::nullopt, bias, per_byte);
}

}  // namespace
}  // namespace losa::sparse_linear

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("sparse_linear", TORCH_BOX(&losa::sparse_linear::sparse_linear));
  library.impl("sparse_linear_nm", TORCH_BOX(&losa::sparse_linear::sparse_linear_nm));
}

#endif
