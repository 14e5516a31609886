// sparse_linear on CUDA for up to 16 rows of x: which decode kernel runs, on how many blocks.
//
// | x                 | rows of x | columns               | kernel        | because                               |
// |-------------------|-----------|-----------------------|---------------|---------------------------------------|
// | the values' type, | 1         | 32 * n, at most 28672 | matvec_kernel | A warp has its 1024 columns of x in   |
// | bf16 or fp16      | 2         | 32 * n, at most 20480 | matvec_kernel | registers, a block all columns of a   |
// |                   | 3, 4      | 32 * n, at most 12288 | matvec_kernel | row; registers bound its warps.       |
// |                   | 1 to 16   | any other             | decode_kernel | It reads masks of any alignment, and  |
// | fp32              | 1 to 16   | any                   | decode_kernel | warps may share a row. Tensor cores   |
// |                   |           |                       |               | take no fp32.                         |
//
// Masks are words of 32 columns for matvec_kernel: a view of a bitmask that begins elsewhere goes to decode_kernel too.
// Both take values with row offsets (bitmask) and without (N:M); decode_kernel alone takes fp32 values.
// The environment variable LOSA_WINDOW_LOT=1..4 sets how many rows matvec_kernel takes between two barriers (else 4),
// to compare them on a card.
#include <algorithm>

#include "common/bits.h"
#include "common/launch.h"
#include "cuda/sparse_linear/row_kernel.h"
#include "cuda/sparse_linear/window_kernel.h"
#include "cuda/per_device.h"

namespace losa::sparse_linear {

// How a call is to run; 0 leaves the number to the launcher.
struct Choice {
  int split;  // warps of decode_kernel that share the columns of a group of rows, which also asks for this kernel
  int lot;    // rows of matvec_kernel between two barriers
  int multiprocessors;
};

// Few rows leave multiprocessors idle: then up to 8 warps of a block share the columns of a group of rows.
inline int split_for(int64_t rows, int rows_of_warp, int columns, int multiprocessors) {
  const int64_t groups = (rows + rows_of_warp - 1) / rows_of_warp, wanted = int64_t{8} * multiprocessors;
  int split = 1;
  while (split < kWarps && groups * split < wanted && columns >= 2 * split * kStepColumns) split *= 2;
  return split;
}

template <bool kTensor, FloatType kValue, int kBatch, bool kFixed>
void launch(Task task, const Choice& choice, cudaStream_t stream) {
  constexpr int kRows = rows_of(kTensor, kBatch);
  using Element = typename Stored<kValue>::Type;
  constexpr int kBytes = Rings<Element, kRows>::kBytes;
  const int64_t rows = task.weight.rows;
  const int columns = task.weight.columns;
  task.split = choice.split > 0 ? choice.split : split_for(rows, kRows, columns, choice.multiprocessors);
  const int steps = (columns + kStepColumns - 1) / kStepColumns;
  task.slice = (steps + task.split - 1) / task.split * kStepColumns;
  const int64_t block_rows = kWarps / task.split * kRows;
  const auto grid = static_cast<unsigned>((rows + block_rows - 1) / block_rows);
  const auto kernel = decode_kernel<kTensor, kValue, kBatch, kFixed>;
  static PerDevice<> prepared;
  prepared.get(0, [&] { return prefer_shared_memory(kernel, kBytes); });
  LOSA_LAUNCH_DEPENDENT(kernel, grid, kThreads, kBytes, stream, task);
}

template <bool kTensor, FloatType kValue, int kBatch>
void launch(const Task& task, const Choice& choice, cudaStream_t stream) {
  if (task.weight.per_byte > 0) {
    launch<kTensor, kValue, kBatch, true>(task, choice, stream);
  } else {
    launch<kTensor, kValue, kBatch, false>(task, choice, stream);
  }
}

// The shared memory that every GPU from compute capability 8.0 on has for one block.
constexpr int kMostShared = 99 << 10;
static_assert(Shape{most_windows(1), 1, 0, 0}.bytes(1) <= kMostShared);
static_assert(Shape{most_windows(2), 1, 0, 0}.bytes(2) <= kMostShared);
static_assert(Shape{most_windows(4), 1, 0, 0}.bytes(4) <= kMostShared);

template <FloatType kValue, int kBatch>
void launch_matvec(const Task& task, int windows, const Choice& choice, cudaStream_t stream) {
  Shape shape{windows, choice.lot > 0 ? std::min(choice.lot, kMostLot) : kMostLot, 0, 0};
  while (shape.bytes(kBatch) > kMostShared) --shape.lot;
  const auto kernel = matvec_kernel<kValue, kBatch>;
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

// Whether matvec_kernel can take it: a block has a warp for each window, a lane has whole words of the mask.
inline bool fits_matvec(const Task& task, int windows) {
  const Weight& weight = task.weight;
  return task.batch <= 4 && windows > 0 && windows <= most_windows(task.batch) && weight.words &&
      weight.columns % 32 == 0 && weight.rows < int64_t{1} << 30;
}

// kTensor: x has the values' type, of 16 bits; else it is fp32.
template <bool kTensor, FloatType kValue>
void launch_decode(const Task& task, const Choice& choice, cudaStream_t stream) {
  if (task.weight.rows == 0 || task.batch == 0) return;
  if constexpr (kTensor) {
    const int windows = (task.weight.columns + kWindowColumns - 1) / kWindowColumns;
    if (choice.split == 0 && fits_matvec(task, windows)) {
      const auto run = task.batch == 1 ? launch_matvec<kValue, 1>
          : task.batch == 2            ? launch_matvec<kValue, 2>
                                       : launch_matvec<kValue, 4>;
      return run(task, windows, choice, stream);
    }
  }
  const auto run = task.batch <= 1 ? launch<kTensor, kValue, 1>
      : task.batch <= 2            ? launch<kTensor, kValue, 2>
      : task.batch <= 4            ? launch<kTensor, kValue, 4>
      : task.batch <= 8            ? launch<kTensor, kValue, 8>
                                   : launch<kTensor, kValue, 16>;
  run(task, choice, stream);
}

template void launch_decode<true, FloatType::kBFloat16>(const Task&, const Choice&, cudaStream_t);
template void launch_decode<true, FloatType::kHalf>(const Task&, const Choice&, cudaStream_t);
template void launch_decode<false, FloatType::kBFloat16>(const Task&, const Choice&, cudaStream_t);
template void launch_decode<false, FloatType::kHalf>(const Task&, const Choice&, cudaStream_t);
template void launch_decode<false, FloatType::kFloat>(const Task&, const Choice&, cudaStream_t);

}  // namespace losa::sparse_linear

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <optional>

#include "common/packing_checks.h"
#include "cuda/sparse_linear/x_and_y.h"

namespace losa::sparse_linear {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

int window_lot() {
  static const int lot = [] {
    const char* const setting = std::getenv("LOSA_WINDOW_LOT");
    if (setting == nullptr || *setting == '\0') return 0;
    const bool known = setting[1] == '\0' && setting[0] >= '1' && setting[0] <= '0' + kMostLot;
    STD_TORCH_CHECK(known, "LOSA_WINDOW_LOT: expected a number from 1 to ", kMostLot, ", got '", setting, "'");
    return setting[0] - '0';
  }();
  return lot;
}

Tensor decode(const Tensor& x, const Tensor& values_in, const Tensor& bitmask, const std::optional<Tensor>& row_offsets,
              const std::optional<Tensor>& bias, int64_t per_byte) {
  const int64_t dims = x.dim();
  packing::check_sparse_linear(x, values_in, bitmask, row_offsets, bias);
  const FloatType value = float_type(values_in, "values"), x_value = float_type(x, "x");
  STD_TORCH_CHECK(x_value == value || x_value == FloatType::kFloat, "x: expected float32 or the dtype of values");
  const int64_t out = bitmask.size(0), columns = x.size(dims - 1), total = values_in.numel();
  STD_TORCH_CHECK(columns < kMostColumns, "x: expected fewer than ", kMostColumns, " columns, got ", columns);

  const int64_t batch = batch_of(x);
  const DeviceGuard guard(x.get_device_index());
  const auto stream = current_stream(x);
  Tensor y = result_of(x, out);
  if (batch == 0 || out == 0) return y;

  const Tensor rows = padded_rows(x, batch, columns, 8, stream);
  // A view's first value may lie between two 16-byte boundaries; what lies before it is the same storage.
  const auto size = static_cast<int64_t>(values_in.element_size());
  int64_t lead = static_cast<int64_t>(reinterpret_cast<uintptr_t>(values_in.const_data_ptr()) % 16) / size;
  int64_t before = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(values_in.get(), &before));
  Tensor values = values_in;
  if (lead > before) {
    values = torch::stable::clone(values_in);
    lead = 0;
  }
  const auto* const mask = static_cast<const uint8_t*>(bitmask.const_data_ptr());
  const int64_t width = bitmask.size(1);
  const Weight weight{static_cast<const uint8_t*>(values.const_data_ptr()) - lead * size,
                      lead,
                      lead + total,
                      row_offsets.has_value() ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr,
                      total / out,
                      static_cast<int>(per_byte),
                      mask,
                      width,
                      out,
                      static_cast<int>(columns),
                      width % 4 == 0 && reinterpret_cast<uintptr_t>(mask) % 4 == 0};
  const Task task{weight,
                  rows.const_data_ptr(),
                  (columns + 7) / 8 * 8,
                  static_cast<int>(batch),
                  bias.has_value() ? bias->const_data_ptr() : nullptr,
                  bias.has_value() ? float_type(*bias, "bias") : FloatType::kFloat,
                  y.mutable_data_ptr(),
                  1,
                  0};
  const auto launch = x_value == FloatType::kFloat
      ? (value == FloatType::kFloat           ? launch_decode<false, FloatType::kFloat>
             : value == FloatType::kBFloat16 ? launch_decode<false, FloatType::kBFloat16>
                                             : launch_decode<false, FloatType::kHalf>)
      : value == FloatType::kBFloat16 ? launch_decode<true, FloatType::kBFloat16>
                                      : launch_decode<true, FloatType::kHalf>;
  launch(task, {0, window_lot(), multiprocessors()}, stream);
  return y;
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& bitmask,
                     const std::optional<Tensor>& row_offsets, const std::optional<Tensor>& bias) {
  return decode(x, values, bitmask, row_offsets, bias, 0);
}

Tensor sparse_linear_nm(const Tensor& x, const Tensor& values, const Tensor& bitmask, int64_t per_byte,
                        const std::optional<Tensor>& bias) {
  packing::check_per_byte(x, values, bitmask, per_byte);
  return decode(x, values, bitmask, std::nullopt, bias, per_byte);
}

}  // namespace
}  // namespace losa::sparse_linear

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("sparse_linear", TORCH_BOX(&losa::sparse_linear::sparse_linear));
  library.impl("sparse_linear_nm", TORCH_BOX(&losa::sparse_linear::sparse_linear_nm));
}

#endif
