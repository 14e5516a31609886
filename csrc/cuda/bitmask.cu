// pack_mask and unpack_mask on CUDA. Neighbouring threads have neighbouring packed bytes. If rows are aligned, the 8
// columns of a byte are one 64-bit access, so that a warp moves 256 contiguous bytes. The limit is memory bandwidth (9
// bytes for a packed byte), which leaves no time for a division by the row's width.
#include "common/bits.h"
#include "cuda/launch.h"

namespace losa::bitmask {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;
constexpr int kAtOnce = 4;  // packed bytes of a thread whose loads are on their way together

// From a packed byte of a thread to the thread's next packed byte: whole rows, and bytes within a row.
struct Step {
  int64_t rows, bytes;
};

// Where a packed byte is. One division finds a thread's first byte, and additions find the other bytes.
struct Place {
  int64_t row, byte;

  __device__ __forceinline__ explicit Place(int64_t width) {
    const unsigned index = blockIdx.x * kThreads + threadIdx.x;  // below kMaxBlocks * kThreads
    row = index < width ? 0 : index / static_cast<unsigned>(width);
    byte = index - row * width;
  }

  __device__ __forceinline__ void advance(const Step& step, int64_t width) {
    row += step.rows;
    byte += step.bytes;
    if (byte >= width) {
      byte -= width;
      ++row;
    }
  }
};

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* bools, int64_t row_stride, int64_t rows, int64_t columns, Step step, uint8_t* packed) {
  const int64_t width = packed_width(columns);
  Place place(width);
  while (place.row < rows) {
    uint64_t eights[kAtOnce];
    uint8_t* to[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, place.advance(step, width)) {
      eights[i] = 0;
      to[i] = nullptr;
      if (place.row >= rows) continue;
      to[i] = packed + (place.row * width + place.byte);
      const uint8_t* const from = bools + (place.row * row_stride + place.byte * 8);
      if (kAligned) {
        eights[i] = *reinterpret_cast<const uint64_t*>(from);  // [8 columns]
      } else {
        const int64_t left = columns - place.byte * 8;
#pragma unroll
        for (int bit = 0; bit < 8; ++bit) {
          if (bit < left) eights[i] |= static_cast<uint64_t>(from[bit]) << (8 * bit);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (to[i] != nullptr) *to[i] = pack_byte(eights[i]);
    }
  }
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* packed, int64_t row_stride, int64_t rows, int64_t columns, Step step, uint8_t* bools) {
  const int64_t width = packed_width(columns);
  Place place(width);
  while (place.row < rows) {
    Place ahead = place;
    uint8_t bytes[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, ahead.advance(step, width)) {
      bytes[i] = ahead.row < rows ? packed[ahead.row * row_stride + ahead.byte] : uint8_t{0};  // [8 columns]
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i, place.advance(step, width)) {
      if (place.row >= rows) continue;
      const uint64_t eight = unpack_byte(bytes[i]);
      uint8_t* const to = bools + (place.row * columns + place.byte * 8);
      if (kAligned) {
        *reinterpret_cast<uint64_t*>(to) = eight;
      } else {
        const int64_t left = columns - place.byte * 8;
#pragma unroll
        for (int bit = 0; bit < 8; ++bit) {
          if (bit < left) to[bit] = static_cast<uint8_t>(eight >> (8 * bit));
        }
      }
    }
  }
}

struct Grid {
  unsigned blocks;
  Step step;
};

// Rows and columns are not 0. At most `most` blocks.
inline Grid grid_of(int64_t rows, int64_t columns, int64_t most) {
  const int64_t width = packed_width(columns), blocks = (rows * width + kThreads - 1) / kThreads;
  const int64_t used = blocks < most ? blocks : most, bytes = used * kThreads;
  return {.blocks = static_cast<unsigned>(used), .step = {.rows = bytes / width, .bytes = bytes % width}};
}

// bools: (rows, columns) bytes, rows row_stride bytes apart; packed: (rows, packed_width(columns)), dense.
void launch_pack(const uint8_t* bools, int64_t row_stride, int64_t rows, int64_t columns, uint8_t* packed,
                 cudaStream_t stream, int64_t most_blocks = kMaxBlocks) {
  if (rows * columns == 0) return;
  const auto [blocks, step] = grid_of(rows, columns, most_blocks);
  const bool aligned = columns % 8 == 0 && row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(bools) % 8 == 0;
  if (aligned) {
    LOSA_LAUNCH(pack_kernel<true>, blocks, kThreads, 0, stream, bools, row_stride, rows, columns, step, packed);
  } else {
    LOSA_LAUNCH(pack_kernel<false>, blocks, kThreads, 0, stream, bools, row_stride, rows, columns, step, packed);
  }
}

// packed: (rows, packed_width(columns)), rows row_stride bytes apart; bools: (rows, columns) bytes, dense.
void launch_unpack(const uint8_t* packed, int64_t row_stride, int64_t rows, int64_t columns, uint8_t* bools,
                   cudaStream_t stream, int64_t most_blocks = kMaxBlocks) {
  if (rows * columns == 0) return;
  const auto [blocks, step] = grid_of(rows, columns, most_blocks);
  const bool aligned = columns % 8 == 0 && reinterpret_cast<uintptr_t>(bools) % 8 == 0;
  if (aligned) {
    LOSA_LAUNCH(unpack_kernel<true>, blocks, kThreads, 0, stream, packed, row_stride, rows, columns, step, bools);
  } else {
    LOSA_LAUNCH(unpack_kernel<false>, blocks, kThreads, 0, stream, packed, row_stride, rows, columns, step, bools);
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
