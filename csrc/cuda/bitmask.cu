// pack_mask and unpack_mask on CUDA: one thread per packed byte. With aligned rows the 8 columns of a byte are one
// 64-bit access, so a warp moves 256 contiguous bytes; the limit is memory bandwidth (9 bytes per packed byte).
#include "common/bits.h"
#include "common/launch.h"

namespace losa::bitmask {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* bools, int64_t row_stride, int64_t rows, int64_t columns, uint8_t* packed) {
  const int64_t width = packed_width(columns), total = rows * width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < total; index += step) {
    const int64_t row = index / width, column = (index - row * width) * 8;
    const uint8_t* from = bools + row * row_stride + column;
    uint64_t eight = 0;
    if (kAligned) {
      eight = *reinterpret_cast<const uint64_t*>(from);
    } else {
      const int64_t left = columns - column;
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        if (bit < left) eight |= static_cast<uint64_t>(from[bit]) << (8 * bit);
      }
    }
    packed[index] = pack_byte(eight);
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* packed, int64_t row_stride, int64_t rows, int64_t columns, uint8_t* bools) {
  const int64_t width = packed_width(columns), total = rows * width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < total; index += step) {
    const int64_t row = index / width, byte = index - row * width;
    const uint64_t eight = unpack_byte(packed[row * row_stride + byte]);
    uint8_t* to = bools + row * columns + byte * 8;
    if (kAligned) {
      *reinterpret_cast<uint64_t*>(to) = eight;
    } else {
      const int64_t left = columns - byte * 8;
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        if (bit < left) to[bit] = static_cast<uint8_t>(eight >> (8 * bit));
      }
    }
  }
}

inline unsigned grid_size(int64_t rows, int64_t columns) {
  const int64_t blocks = (rows * packed_width(columns) + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// bools: rows x columns bytes, row_stride bytes apart; packed: rows x packed_width(columns), dense.
void launch_pack(const uint8_t* bools, int64_t row_stride, int64_t rows, int64_t columns, uint8_t* packed,
                 cudaStream_t stream) {
  if (rows * columns == 0) return;
  const unsigned grid = grid_size(rows, columns);
  const bool aligned = columns % 8 == 0 && row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(bools) % 8 == 0;
  if (aligned) {
    LOSA_LAUNCH(pack_kernel<true>, grid, kThreads, 0, stream, bools, row_stride, rows, columns, packed);
  } else {
    LOSA_LAUNCH(pack_kernel<false>, grid, kThreads, 0, stream, bools, row_stride, rows, columns, packed);
  }
}

// packed: rows x packed_width(columns) bytes, row_stride bytes apart; bools: rows x columns bytes, dense.
void launch_unpack(const uint8_t* packed, int64_t row_stride, int64_t rows, int64_t columns, uint8_t* bools,
                   cudaStream_t stream) {
  if (rows * columns == 0) return;
  const unsigned grid = grid_size(rows, columns);
  const bool aligned = columns % 8 == 0 && reinterpret_cast<uintptr_t>(bools) % 8 == 0;
  if (aligned) {
    LOSA_LAUNCH(unpack_kernel<true>, grid, kThreads, 0, stream, packed, row_stride, rows, columns, bools);
  } else {
    LOSA_LAUNCH(unpack_kernel<false>, grid, kThreads, 0, stream, packed, row_stride, rows, columns, bools);
  }
}

}  // namespace losa::bitmask

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/tensor_checks.h"

namespace losa::bitmask {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Tensor pack_mask(const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 2 && mask.scalar_type() == ScalarType::Bool, "mask: expected a bool tensor (out, in)");
  const DeviceGuard guard(mask.get_device_index());
  const Tensor source = with_dense_rows(mask);
  const int64_t rows = mask.size(0), columns = mask.size(1);
  Tensor packed = torch::stable::new_empty(source, {rows, packed_width(columns)}, ScalarType::Byte);
  launch_pack(static_cast<const uint8_t*>(source.const_data_ptr()), source.stride(0), rows, columns,
              static_cast<uint8_t*>(packed.mutable_data_ptr()), current_stream(mask));
  return packed;
}

Tensor unpack_mask(const Tensor& packed, int64_t in_features) {
  STD_TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == ScalarType::Byte,
                  "packed: expected a uint8 tensor (out, ceil(in / 8))");
  STD_TORCH_CHECK(in_features >= 0 && packed.size(1) == packed_width(in_features), "in_features: ", in_features,
                  " columns do not fit packed rows of ", packed.size(1), " bytes");
  const DeviceGuard guard(packed.get_device_index());
  const Tensor source = with_dense_rows(packed);
  const int64_t rows = packed.size(0);
  Tensor mask = torch::stable::new_empty(source, {rows, in_features}, ScalarType::Bool);
  launch_unpack(static_cast<const uint8_t*>(source.const_data_ptr()), source.stride(0), rows, in_features,
                static_cast<uint8_t*>(mask.mutable_data_ptr()), current_stream(packed));
  return mask;
}

}  // namespace
}  // namespace losa::bitmask

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("pack_mask", TORCH_BOX(&losa::bitmask::pack_mask));
  library.impl("unpack_mask", TORCH_BOX(&losa::bitmask::unpack_mask));
}

#endif
