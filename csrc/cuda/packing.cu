// Packing and unpacking on CUDA: a warp per row, 256 columns at a time. Kept values meet in shared memory and leave it
// in 16-byte pieces, so that what is written is as coalesced as what is read. Elements are moved as integers of their
// size: every bit pattern survives.
#include "common/bits.h"
#include "common/launch.h"
#include "cuda/packed_rows.h"

namespace losa::packing {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kScanThreads = 1024;

// Elements by their size: the kernels' names in a profile and in ptxas's table then say it.
template <int kSize>
struct OfSize;
template <>
struct OfSize<1> { using Element = uint8_t; };
template <>
struct OfSize<2> { using Element = uint16_t; };
template <>
struct OfSize<4> { using Element = uint32_t; };
template <>
struct OfSize<8> { using Element = uint64_t; };

struct Mask {
  const uint8_t* bits;
  int64_t stride;
  int64_t rows, columns;

  // The bits of the 8 columns from `column`, a multiple of 8; none beyond the row.
  __device__ unsigned byte(int64_t row, int64_t column) const {
    return column < columns ? bits[row * stride + column / 8] & column_bits(columns - column) : 0u;
  }
};

// Rows of a weight where they are, and of its values where they go.
struct Packing {
  Mask mask;
  const void* weight;
  int64_t weight_stride;   // in elements
  bool aligned;            // eight elements from a multiple of 8 columns are one aligned Eight
  const int64_t* offsets;  // or null: rows of `length` values
  int64_t length;
  int keep_n;       // of kM
  uint8_t* stored;  // dense packed mask that N:M also writes
  void* values;
};

struct Unpacking {
  Mask mask;
  const void* values;
  int64_t total;
  const int64_t* offsets;  // or null: rows of `length` values
  int64_t length;
  void* dense;
  bool aligned;
};

// Of each group of kM bits the set ones, and its first others until there are keep_n; never more than keep_n.
template <int kM>
__device__ __forceinline__ unsigned stored_bits(unsigned kept, int keep_n) {
  constexpr int kWidth = kM < 8 ? 8 : kM;
  unsigned stored = 0;
#pragma unroll
  for (int begin = 0; begin < kWidth; begin += kM) {
    int spare = keep_n - __popc(kept >> begin & ((1u << kM) - 1)), room = keep_n;
#pragma unroll
    for (int bit = begin; bit < begin + kM; ++bit) {
      const bool is_kept = (kept >> bit & 1u) != 0;
      if ((is_kept || spare > 0) && room > 0) {
        stored |= 1u << bit;
        --room;
        if (!is_kept) --spare;
      }
    }
  }
  return stored;
}

// The stored bits of the byte at `column`; a group of 16 begins at an even byte.
template <int kM>
__device__ __forceinline__ unsigned stored_byte(const Mask& mask, int64_t row, int64_t column, int keep_n) {
  if (column >= mask.columns) return 0;
  if (kM == 16) {
    const int64_t begin = column / 16 * 16;
    const unsigned kept = mask.byte(row, begin) | mask.byte(row, begin + 8) << 8;
    return stored_bits<kM == 16 ? kM : 16>(kept, keep_n) >> (column - begin) & 0xffu;
  }
  constexpr int kGroup = kM == 4 ? 4 : 8;
  return stored_bits<kGroup>(mask.byte(row, column), keep_n) & column_bits(mask.columns - column);
}

// counts[row]: the row's kept columns.
__global__ void __launch_bounds__(kThreads) count_kernel(Mask mask, int64_t* counts) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= mask.rows) return;
  int count = 0;
  for (int64_t column = 8 * lane; column < mask.columns; column += kStepColumns) count += __popc(mask.byte(row, column));
  count = inclusive_sum(count);
  if (lane == 31) counts[row] = count;
}

// counts become their exclusive prefix sum, by one block; *total is their sum.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(int64_t* counts, int64_t rows, int64_t* total) {
  __shared__ int64_t warp_sums[kScanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;
  for (int64_t begin = 0; begin < rows; begin += kScanThreads) {
    const int64_t row = begin + threadIdx.x, own = row < rows ? counts[row] : 0;
    int64_t sum = own;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int64_t from = __shfl_up_sync(kAllLanes, sum, delta);
      if (lane >= delta) sum += from;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int64_t here = 0;
    for (int i = 0; i < kScanThreads / 32; ++i) {
      if (i < warp) sum += warp_sums[i];
      here += warp_sums[i];
    }
    if (row < rows) counts[row] = before + sum - own;
    before += here;
    __syncthreads();
  }
  if (threadIdx.x == 0) *total = before;
}

// kM = 0: what the mask keeps; else exactly keep_n of each group of kM.
template <int kSize, int kM>
__global__ void __launch_bounds__(kThreads) pack_kernel(Packing job) {
  using Element = typename OfSize<kSize>::Element;
  constexpr int kPiece = 16 / sizeof(Element);
  __shared__ __align__(16) Element buffers[kWarps][kStepColumns + kPiece];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp, columns = job.mask.columns;
  if (row >= job.mask.rows) return;
  Element* const buffer = buffers[warp];
  const Element* const from = static_cast<const Element*>(job.weight) + row * job.weight_stride;
  // `to` is a 16-byte boundary that buffer[0] belongs to. The first piece of a row may hold the end of the row before.
  Element* to = static_cast<Element*>(job.values) + (job.offsets != nullptr ? job.offsets[row] : row * job.length);
  int begin = static_cast<int>(reinterpret_cast<uintptr_t>(to) % 16 / sizeof(Element)), filled = begin;
  to -= begin;

  for (int64_t first = 0; first < columns; first += kStepColumns) {
    const int64_t column = first + 8 * lane;
    const unsigned kept = job.mask.byte(row, column);
    unsigned stored = kept;
    if (kM > 0) {
      stored = stored_byte<kM>(job.mask, row, column, job.keep_n);
      if (column < columns) job.stored[row * packed_width(columns) + column / 8] = static_cast<uint8_t>(stored);
    }
    Eight<Element> eight{};
    if (kept == 0) {
    } else if (job.aligned && column + 8 <= columns) {
      eight = *reinterpret_cast<const Eight<Element>*>(from + column);
    } else {
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        if ((kept >> bit & 1u) != 0) eight.at[bit] = from[column + bit];
      }
    }
    const int count = __popc(stored), sum = inclusive_sum(count);
    int place = filled + sum - count;
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
      if ((stored >> bit & 1u) != 0) buffer[place++] = (kept >> bit & 1u) != 0 ? eight.at[bit] : Element{0};
    }
    filled += __shfl_sync(kAllLanes, sum, 31);
    __syncwarp();
    const int pieces = filled / kPiece;
    for (int piece = lane; piece < pieces; piece += 32) {
      if (piece == 0 && begin > 0) {
        for (int i = begin; i < kPiece; ++i) to[i] = buffer[i];
      } else {
        reinterpret_cast<uint4*>(to)[piece] = reinterpret_cast<const uint4*>(buffer)[piece];
      }
    }
    const int gone = pieces * kPiece;
    filled -= gone;
    const Element rest = lane < filled ? buffer[gone + lane] : Element{0};
    __syncwarp();
    if (lane < filled) buffer[lane] = rest;
    to += gone;
    if (pieces > 0) begin = 0;
  }
  __syncwarp();
  for (int i = begin + lane; i < filled; i += 32) to[i] = buffer[i];
}

template <int kSize>
__global__ void __launch_bounds__(kThreads) unpack_kernel(Unpacking job) {
  using Element = typename OfSize<kSize>::Element;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, columns = job.mask.columns;
  if (row >= job.mask.rows) return;
  const Element* const values = static_cast<const Element*>(job.values);
  Element* const to = static_cast<Element*>(job.dense) + row * columns;
  int64_t before = first_value(job.offsets, row, job.length, job.total);
  for (int64_t first = 0; first < columns; first += kStepColumns) {
    const int64_t column = first + 8 * lane;
    const unsigned kept = job.mask.byte(row, column);
    const int count = __popc(kept), sum = inclusive_sum(count);
    int64_t place = before + sum - count;
    Eight<Element> eight{};
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
      if ((kept >> bit & 1u) == 0) continue;
      if (place < job.total) eight.at[bit] = values[place];
      ++place;
    }
    if (job.aligned && column + 8 <= columns) {
      *reinterpret_cast<Eight<Element>*>(to + column) = eight;
    } else {
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        if (column + bit < columns) to[column + bit] = eight.at[bit];
      }
    }
    before += __shfl_sync(kAllLanes, sum, 31);
  }
}

// *largest: the most kept columns of a group of kM, where it was 0 before. A maximum is the same in any order.
template <int kM>
__global__ void __launch_bounds__(kThreads) largest_kernel(Mask mask, unsigned long long* largest) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= mask.rows) return;
  int most = 0;
  for (int64_t column = 8 * lane; column < mask.columns; column += kStepColumns) {
    const unsigned byte = mask.byte(row, column);
    if (kM == 4) {
      most = max(most, max(__popc(byte & 0xfu), __popc(byte >> 4)));
    } else if (kM == 8) {
      most = max(most, __popc(byte));
    } else {
      most = max(most, __popc(byte) + __popc(mask.byte(row, column ^ 8)));
    }
  }
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, delta));
  if (lane == 0) atomicMax(largest, static_cast<unsigned long long>(most));
}

inline unsigned grid_size(int64_t rows) {
  return static_cast<unsigned>((rows + kWarps - 1) / kWarps);
}

// offsets: of rows; total: of one.
void launch_offsets(const Mask& mask, int64_t* offsets, int64_t* total, cudaStream_t stream) {
  if (mask.rows > 0) LOSA_LAUNCH(count_kernel, grid_size(mask.rows), kThreads, 0, stream, mask, offsets);
  LOSA_LAUNCH(scan_kernel, 1, kScanThreads, 0, stream, offsets, mask.rows, total);
}

// m = 0, 4, 8 or 16; in-features are a multiple of it.
template <int kSize>
void launch_pack(const Packing& job, int64_t m, cudaStream_t stream) {
  if (job.mask.rows * job.mask.columns == 0) return;
  const unsigned grid = grid_size(job.mask.rows);
  if (m == 0) {
    LOSA_LAUNCH((pack_kernel<kSize, 0>), grid, kThreads, 0, stream, job);
  } else if (m == 4) {
    LOSA_LAUNCH((pack_kernel<kSize, 4>), grid, kThreads, 0, stream, job);
  } else if (m == 8) {
    LOSA_LAUNCH((pack_kernel<kSize, 8>), grid, kThreads, 0, stream, job);
  } else {
    LOSA_LAUNCH((pack_kernel<kSize, 16>), grid, kThreads, 0, stream, job);
  }
}

template <int kSize>
void launch_unpack(const Unpacking& job, cudaStream_t stream) {
  if (job.mask.rows * job.mask.columns == 0) return;
  LOSA_LAUNCH((unpack_kernel<kSize>), grid_size(job.mask.rows), kThreads, 0, stream, job);
}

template void launch_pack<1>(const Packing&, int64_t, cudaStream_t);
template void launch_pack<2>(const Packing&, int64_t, cudaStream_t);
template void launch_pack<4>(const Packing&, int64_t, cudaStream_t);
template void launch_pack<8>(const Packing&, int64_t, cudaStream_t);
template void launch_unpack<1>(const Unpacking&, cudaStream_t);
template void launch_unpack<2>(const Unpacking&, cudaStream_t);
template void launch_unpack<4>(const Unpacking&, cudaStream_t);
template void launch_unpack<8>(const Unpacking&, cudaStream_t);

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

#include <optional>
#include <tuple>
#include <type_traits>

#include "common/packing_checks.h"

namespace losa::packing {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Mask mask_of(const Tensor& mask, int64_t columns) {
  return {static_cast<const uint8_t*>(mask.const_data_ptr()), mask.stride(0), mask.size(0), columns};
}

bool has_aligned_rows(const void* data, int64_t stride, int64_t element_size) {
  const int64_t bytes = element_size == 1 ? 8 : 16;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * element_size % bytes == 0;
}

template <int kSize>
using Size = std::integral_constant<int, kSize>;

template <class Body>
void with_size(int64_t size, const Body& body) {
  STD_TORCH_CHECK(size == 1 || size == 2 || size == 4 || size == 8, "expected elements of 1, 2, 4 or 8 bytes, got ", size);
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
  Tensor sum = torch::stable::new_empty(weight, {1}, ScalarType::Long);
  auto* const starts = static_cast<int64_t*>(offsets.mutable_data_ptr());
  const Mask kept = mask_of(bits, columns);
  launch_offsets(kept, starts, static_cast<int64_t*>(sum.mutable_data_ptr()), stream);
  // The result's size is data: the host has to wait for it.
  int64_t total = 0;
  LOSA_CUDA_CHECK(cudaMemcpyAsync(&total, sum.const_data_ptr(), sizeof(total), cudaMemcpyDeviceToHost, stream));
  LOSA_CUDA_CHECK(cudaStreamSynchronize(stream));
  Tensor values = torch::stable::new_empty(weight, {total});
  const void* const from = source.const_data_ptr();
  const Packing job{kept,    from, source.stride(0), has_aligned_rows(from, source.stride(0), size), starts, 0, 0,
                    nullptr, values.mutable_data_ptr()};
  with_size(size, [&](auto bytes) { launch_pack<bytes.value>(job, 0, stream); });
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
  const Packing job{mask_of(bits, columns),
                    from,
                    source.stride(0),
                    has_aligned_rows(from, source.stride(0), size),
                    nullptr,
                    length,
                    static_cast<int>(keep_n),
                    static_cast<uint8_t*>(stored.mutable_data_ptr()),
                    values.mutable_data_ptr()};
  with_size(size, [&](auto bytes) { launch_pack<bytes.value>(job, m, current_stream(weight)); });
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
  const Unpacking job{mask_of(bits, columns),
                      values.const_data_ptr(),
                      total,
                      row_offsets ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr,
                      rows > 0 ? total / rows : 0,
                      to,
                      has_aligned_rows(to, columns, size)};
  with_size(size, [&](auto bytes) { launch_unpack<bytes.value>(job, current_stream(dense)); });
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
