// Packing and unpacking on CUDA: which kernel runs, on how many blocks, and when the host has to wait.
#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/packing/kernels.h"
#include "cuda/packing/late_number.h"
#include "cuda/packing/mask_kernels.h"

namespace losa::packing {

inline unsigned grid_size(int64_t warps) {
  return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
}

// Warps that a large GPU has room for. Where there are fewer rows, up to 8 warps share a row.
constexpr int64_t kWarpsWanted = 8192;

template <int kSize>
Slices slices_of(int64_t rows, int columns, int shares) {
  constexpr int kIteration = Columns<kSize>::kIteration;
  const int iterations = (columns + kIteration - 1) / kIteration;
  if (shares < 0) {
    shares = 0;
    while (shares < 3 && rows << shares < kWarpsWanted && 2 << shares <= iterations) ++shares;
  }
  return {.shares = shares, .slice = ((iterations - 1) >> shares) * kIteration + kIteration};
}

inline unsigned grid_of(int64_t rows, const Slices& slices) {
  return static_cast<unsigned>((rows + (kWarps >> slices.shares) - 1) / (kWarps >> slices.shares));
}

// offsets: (rows,); total: one number, in memory of the device or in pinned memory.
void launch_offsets(const Mask& mask, int64_t* offsets, int64_t* total, cudaStream_t stream) {
  const bool pieces =
      mask.columns % 128 == 0 && mask.stride % 16 == 0 && reinterpret_cast<uintptr_t>(mask.bits) % 16 == 0;
  if (mask.rows > 0) LOSA_LAUNCH(count_kernel, grid_size(mask.rows), kThreads, 0, stream, mask, pieces, offsets);
  LOSA_LAUNCH(scan_kernel, 1, kScanThreads, 0, stream, offsets, mask.rows, total);
}

// Brings `bytes` to the L2 cache, except for a few of the last bytes. Does nothing if `from` is not aligned.
void launch_prefetch(const void* from, int64_t bytes, cudaStream_t stream) {
  const int64_t pieces = bytes / 16, block = kThreads * kPrefetched;
  if (pieces == 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) return;
  const auto blocks = static_cast<unsigned>((pieces + block - 1) / block);
  LOSA_LAUNCH(prefetch_kernel, blocks, kThreads, 0, stream, static_cast<const uint4*>(from), pieces);
}

// m = 0, 4, 8 or 16; in-features are a multiple of it. shares: see Slices, -1 to choose.
template <int kSize>
void launch_pack(const Packing& task, int64_t m, cudaStream_t stream, int shares = -1) {
  if (task.mask.rows * task.mask.columns == 0) return;
  const Slices slices = slices_of<kSize>(task.mask.rows, task.mask.columns, shares);
  const unsigned grid = grid_of(task.mask.rows, slices);
  if (m == 0) {
    LOSA_LAUNCH((pack_kernel<kSize, 0>), grid, kThreads, 0, stream, task, slices);
  } else if (m == 4) {
    LOSA_LAUNCH((pack_kernel<kSize, 4>), grid, kThreads, 0, stream, task, slices);
  } else if (m == 8) {
    LOSA_LAUNCH((pack_kernel<kSize, 8>), grid, kThreads, 0, stream, task, slices);
  } else {
    LOSA_LAUNCH((pack_kernel<kSize, 16>), grid, kThreads, 0, stream, task, slices);
  }
}

template <int kSize>
void launch_unpack(const Unpacking& task, cudaStream_t stream, int shares = -1) {
  if (task.mask.rows * task.mask.columns == 0) return;
  const Slices slices = slices_of<kSize>(task.mask.rows, task.mask.columns, shares);
  LOSA_LAUNCH((unpack_kernel<kSize>), grid_of(task.mask.rows, slices), kThreads, 0, stream, task, slices);
}

template void launch_pack<1>(const Packing&, int64_t, cudaStream_t, int);
template void launch_pack<2>(const Packing&, int64_t, cudaStream_t, int);
template void launch_pack<4>(const Packing&, int64_t, cudaStream_t, int);
template void launch_pack<8>(const Packing&, int64_t, cudaStream_t, int);
template void launch_unpack<1>(const Unpacking&, cudaStream_t, int);
template void launch_unpack<2>(const Unpacking&, cudaStream_t, int);
template void launch_unpack<4>(const Unpacking&, cudaStream_t, int);
template void launch_unpack<8>(const Unpacking&, cudaStream_t, int);

// m = 4, 8 or 16.
void launch_largest(const Mask& mask, int64_t m, unsigned long long* largest, cudaStream_t stream) {
  LOSA_CUDA_CHECK(cudaMemsetAsync(largest, 0, sizeof(*largest), stream));
  if (mask.rows * mask.columns == 0) return;
  const unsigned grid = grid_size(mask.rows);
  if (m == 4) {
    LOSA_LAUNCH(largest_kernel<4>, grid, kThreads, 0, stream, mask, largest);
  } else if (m == 8) {
    LOSA_LAUNCH(largest_kernel<8>, grid, kThreads, 0, stream, mask, largest);
  } else {
    LOSA_LAUNCH(largest_kernel<16>, grid, kThreads, 0, stream, mask, largest);
  }
}

}  // namespace losa::packing

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common/packing_checks.h"

namespace losa::packing {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Memory of the host for a number that kernels write.
class Pinned {
 public:
  const int64_t* on_host() const { return static_cast<const int64_t*>(tensor_.const_data_ptr()); }
  int64_t* on_device() const {
    void* address = nullptr;
    LOSA_CUDA_CHECK(cudaHostGetDevicePointer(&address, tensor_.mutable_data_ptr(), 0));
    return static_cast<int64_t*>(address);
  }

 private:
  Tensor tensor_ = torch::stable::empty({1}, ScalarType::Long, std::nullopt,
                                        torch::stable::Device(torch::headeronly::DeviceType::CPU), true);
};

int64_t cache_bytes(int device) {
  int bytes = 0;
  LOSA_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return bytes;
}

Mask mask_of(const Tensor& mask, int64_t columns) {
  constexpr int64_t kMost = int64_t{1} << 30;
  STD_TORCH_CHECK(columns <= kMost, "in_features: expected at most ", kMost, ", got ", columns);
  return {.bits = static_cast<const uint8_t*>(mask.const_data_ptr()),
          .stride = mask.stride(0),
          .rows = mask.size(0),
          .columns = static_cast<int>(columns)};
}

bool has_aligned_rows(const void* data, int64_t stride, int64_t element_size) {
  const int64_t bytes = element_size == 1 ? 8 : 16;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * element_size % bytes == 0;
}

template <int kSize>
using Size = std::integral_constant<int, kSize>;

template <class Body>
void with_size(int64_t size, const Body& body) {
  STD_TORCH_CHECK(size == 1 || size == 2 || size == 4 || size == 8, "expected elements of 1, 2, 4 or 8 bytes, got ",
                  size);
  if (size == 1) body(Size<1>{});
  if (size == 2) body(Size<2>{});
  if (size == 4) body(Size<4>{});
  if (size == 8) body(Size<8>{});
}

void check_group(int64_t m) {
  STD_TORCH_CHECK(m == 4 || m == 8 || m == 16, "m: expected 4, 8 or 16 on CUDA, got ", m);
}

std::tuple<Tensor, Tensor> pack_bitmask(const Tensor& weight, const Tensor& mask) {
  check_pack(weight, mask);
  const DeviceGuard guard(weight.get_device_index());
  const auto stream = current_stream(weight);
  const Tensor source = with_dense_rows(weight), bits = with_dense_rows(mask);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const auto size = static_cast<int64_t>(weight.element_size());
  Tensor offsets = torch::stable::new_empty(weight, {rows}, ScalarType::Long);
  auto* const starts = static_cast<int64_t*>(offsets.mutable_data_ptr());
  const Mask kept = mask_of(bits, columns);
  const void* const from = source.const_data_ptr();
  // The result's size depends on the mask, so that the host waits for it. Meanwhile the device reads the weight.
  const Pinned memory;
  LateNumber total(memory.on_host(), stream);
  launch_offsets(kept, starts, memory.on_device(), stream);
  total.launched();
  const int64_t bytes = rows * columns > 0 ? ((rows - 1) * source.stride(0) + columns) * size : 0;
  launch_prefetch(from, std::min(bytes, cache_bytes(weight.get_device_index()) / 2), stream);
  Tensor values = torch::stable::new_empty(weight, {total.wait()});
  const Packing task{.mask = kept,
                     .weight = from,
                     .weight_stride = source.stride(0),
                     .aligned = has_aligned_rows(from, source.stride(0), size),
                     .offsets = starts,
                     .length = 0,
                     .keep_n = 0,
                     .stored = nullptr,
                     .values = values.mutable_data_ptr()};
  with_size(size, [&](auto bytes_of) { launch_pack<bytes_of.value>(task, 0, stream); });
  return {values, offsets};
}

std::tuple<Tensor, Tensor> pack_nm(const Tensor& weight, const Tensor& mask, int64_t keep_n, int64_t m) {
  check_pack(weight, mask);
  check_pattern(weight.size(1), keep_n, m);
  check_group(m);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor source = with_dense_rows(weight), bits = with_dense_rows(mask);
  const int64_t rows = weight.size(0), columns = weight.size(1), length = columns / m * keep_n;
  const auto size = static_cast<int64_t>(weight.element_size());
  Tensor stored = torch::stable::new_empty(mask, {rows, packed_width(columns)});
  Tensor values = torch::stable::new_empty(weight, {rows, length});
  const void* const from = source.const_data_ptr();
  const Packing task{.mask = mask_of(bits, columns),
                     .weight = from,
                     .weight_stride = source.stride(0),
                     .aligned = has_aligned_rows(from, source.stride(0), size),
                     .offsets = nullptr,
                     .length = length,
                     .keep_n = static_cast<int>(keep_n),
                     .stored = static_cast<uint8_t*>(stored.mutable_data_ptr()),
                     .values = values.mutable_data_ptr()};
  with_size(size, [&](auto bytes) { launch_pack<bytes.value>(task, m, current_stream(weight)); });
  return {values, stored};
}

Tensor largest_group(const Tensor& mask, int64_t in_features, int64_t m) {
  check_groups(mask, in_features, m);
  check_group(m);
  const DeviceGuard guard(mask.get_device_index());
  const Tensor bits = with_dense_rows(mask);
  Tensor largest = torch::stable::new_empty(mask, {}, ScalarType::Long);
  launch_largest(mask_of(bits, in_features), m, static_cast<unsigned long long*>(largest.mutable_data_ptr()),
                 current_stream(mask));
  return largest;
}

void unpack_bitmask(const Tensor& dense, const Tensor& values, const Tensor& bitmask,
                    const std::optional<Tensor>& row_offsets) {
  check_unpack(dense, values, bitmask, row_offsets);
  const DeviceGuard guard(dense.get_device_index());
  const Tensor bits = with_dense_rows(bitmask);
  const int64_t rows = dense.size(0), columns = dense.size(1), total = values.numel();
  const auto size = static_cast<int64_t>(dense.element_size());
  void* const to = dense.mutable_data_ptr();
  const Unpacking task{.mask = mask_of(bits, columns),
                       .values = values.const_data_ptr(),
                       .total = total,
                       .offsets = row_offsets ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr,
                       .length = rows > 0 ? total / rows : 0,
                       .dense = to,
                       .aligned = has_aligned_rows(to, columns, size)};
  with_size(size, [&](auto bytes) { launch_unpack<bytes.value>(task, current_stream(dense)); });
}

}  // namespace
}  // namespace losa::packing

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("pack_bitmask", TORCH_BOX(&losa::packing::pack_bitmask));
  library.impl("pack_nm", TORCH_BOX(&losa::packing::pack_nm));
  library.impl("largest_group", TORCH_BOX(&losa::packing::largest_group));
  library.impl("unpack_bitmask", TORCH_BOX(&losa::packing::unpack_bitmask));
}

#endif
