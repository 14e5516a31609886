// Wanda's masks on CUDA: a block of threads finds the smallest of a row by radix select, or a thread those of a group.
#include "common/bits.h"
#include "common/launch.h"
#include "cuda/radix_select.h"
#include "cuda/scores.h"

namespace losa::selection {

// Keys that fit into shared memory on every architecture; longer rows compute them anew in each pass.
constexpr int kMaxStoredKeys = 22 << 10;

enum class WeightType { kFloat, kHalf, kBFloat16 };

template <WeightType kType>
__device__ __forceinline__ float magnitude(const void* weight, int64_t index) {
  if (kType == WeightType::kFloat) {
    return __int_as_float(__float_as_int(static_cast<const float*>(weight)[index]) & 0x7fffffff);
  }
  const unsigned bits = static_cast<const uint16_t*>(weight)[index] & 0x7fffu;
  if (kType == WeightType::kBFloat16) return __uint_as_float(bits << 16);
  // A subnormal's bits on top of 2^-14, less 2^-14.
  if (bits < 0x400u) return __uint_as_float((bits << 13) + 0x38800000u) - 0x1p-14f;
  return __uint_as_float((bits << 13) + 0x38000000u);
}

struct Wanda {
  const void* weight;
  const float* norms;
  const uint8_t* mask;  // packed, dense rows; may be null
  int64_t rows, columns;
  int count;
  uint8_t* packed;
};

template <WeightType kType>
__device__ __forceinline__ int wanda_key(const Wanda& job, int64_t row, int64_t column) {
  if (job.mask != nullptr && !is_kept(job.mask + row * packed_width(job.columns), column)) return -1;
  return score_key(__fmul_rn(magnitude<kType>(job.weight, row * job.columns + column), job.norms[column]));
}

// A block of threads per row.
template <WeightType kType, bool kStored>
__global__ void __launch_bounds__(kThreads, 4) wanda_rows_kernel(Wanda job) {
  __shared__ int histogram[kBins];
  __shared__ int warp_sums[kWarps];
  __shared__ int lost;
  __shared__ Bin found;
  LOSA_DYNAMIC_SHARED(int, keys);
  const int columns = static_cast<int>(job.columns), width = static_cast<int>(packed_width(columns));
  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
    const auto key_of = [&](int column) { return kStored ? keys[column] : wanda_key<kType>(job, row, column); };
    if (threadIdx.x == 0) lost = 0;
    __syncthreads();
    int own_lost = 0;
    for (int column = threadIdx.x; column < columns; column += kThreads) {
      const int key = wanda_key<kType>(job, row, column);
      if (kStored) keys[column] = key;
      if (key < 0) {
        ++own_lost;
      } else {
        atomicAdd(&histogram[digit_of(key, 0)], 1);
      }
    }
    if (own_lost != 0) atomicAdd(&lost, own_lost);
    __syncthreads();
    int room = job.count - lost, prefix = 0;
    Bin bin{0, 0, 0};
    if (room > 0) {
      for (int pass = 0; pass < 3; ++pass) {
        if (pass > 0) {
          for (int column = threadIdx.x; column < columns; column += kThreads) {
            const int key = key_of(column);
            if (takes_part(key, pass, prefix)) atomicAdd(&histogram[digit_of(key, pass)], 1);
          }
          __syncthreads();
        }
        bin = find_bin(histogram, digit_bins(pass), room, warp_sums, &found);
        prefix = pass == 0 ? bin.index : prefix << 10 | bin.index;
        room -= bin.before;
        __syncthreads();
      }
    } else {
      prefix = -1;
      room = 0;
      for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
    }
    uint8_t* packed = job.packed + row * width;
    if (room == bin.inside) {  // all ties go: a warp takes 32 columns at a time
      const int lane = threadIdx.x % 32;
      for (int first = threadIdx.x - lane; first < columns; first += kThreads) {
        const int column = first + lane;
        const unsigned kept = __ballot_sync(0xffffffffu, column < columns && key_of(column) > prefix);
        if (lane < 4 && first / 8 + lane < width) packed[first / 8 + lane] = static_cast<uint8_t>(kept >> (8 * lane));
      }
    } else {  // the first `room` ties go: a thread takes 8 columns, after those of the threads before it
      int passed = 0;
      for (int first = 0; first < width; first += kThreads) {
        const int byte = first + threadIdx.x;
        unsigned kept = 0, ties = 0;
        for (int bit = 0; bit < 8; ++bit) {
          const int column = 8 * byte + bit;
          if (column >= columns) break;
          const int key = key_of(column);
          if (key > prefix) kept |= 1u << bit;
          if (key == prefix) ties |= 1u << bit;
        }
        int here;
        int before = passed + exclusive_sum(__popc(ties), warp_sums, &here);
        passed += here;
        for (int bit = 0; bit < 8; ++bit) {
          if ((ties >> bit & 1u) != 0 && before++ >= room) kept |= 1u << bit;
        }
        if (byte < width) packed[byte] = static_cast<uint8_t>(kept);
      }
    }
    __syncthreads();
  }
}

// A thread per 8 columns, or per 16 for M = 16.
template <WeightType kType, int kM>
__global__ void __launch_bounds__(kThreads, 2) wanda_groups_kernel(Wanda job) {
  constexpr int kColumns = kM > 8 ? kM : 8;
  const int64_t width = packed_width(job.columns), units = (job.columns + kColumns - 1) / kColumns;
  const int64_t total = job.rows * units, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < total; index += step) {
    const int64_t row = index / units, first = (index - row * units) * kColumns;
    unsigned kept = 0;
#pragma unroll
    for (int group = 0; group < kColumns; group += kM) {
      if (first + group >= job.columns) break;
      int keys[kM];
      unsigned lost = 0;
#pragma unroll
      for (int j = 0; j < kM; ++j) {
        keys[j] = wanda_key<kType>(job, row, first + group + j);
        if (keys[j] < 0) lost |= 1u << j;
      }
      const unsigned pruned = smallest_of<kM>(keys, job.count) | lost;
      kept |= (~pruned & ((1u << kM) - 1)) << group;
    }
#pragma unroll
    for (int byte = 0; byte < kColumns / 8; ++byte) {
      job.packed[row * width + first / 8 + byte] = static_cast<uint8_t>(kept >> (8 * byte));
    }
  }
}

inline unsigned limited(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxRowBlocks ? blocks : kMaxRowBlocks);
}

// m = 0: `count` go of each row; m = 4, 8 or 16: of each group.
template <WeightType kType>
void launch_wanda(const Wanda& job, int64_t m, cudaStream_t stream) {
  if (job.rows * job.columns == 0) return;
  const int64_t per_thread = m > 8 ? m : 8;
  const int64_t units = job.rows * ((job.columns + per_thread - 1) / per_thread);
  const unsigned grid = limited(m == 0 ? job.rows : (units + kThreads - 1) / kThreads);
  if (m == 4) {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 4>), grid, kThreads, 0, stream, job);
  } else if (m == 8) {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 8>), grid, kThreads, 0, stream, job);
  } else if (m == 16) {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 16>), grid, kThreads, 0, stream, job);
  } else if (job.columns <= kMaxStoredKeys) {
    const int bytes = static_cast<int>(job.columns) * 4;
    allow_shared_memory(wanda_rows_kernel<kType, true>, bytes);
    LOSA_LAUNCH((wanda_rows_kernel<kType, true>), grid, kThreads, bytes, stream, job);
  } else {
    LOSA_LAUNCH((wanda_rows_kernel<kType, false>), grid, kThreads, 0, stream, job);
  }
}

template void launch_wanda<WeightType::kFloat>(const Wanda&, int64_t, cudaStream_t);
template void launch_wanda<WeightType::kHalf>(const Wanda&, int64_t, cudaStream_t);
template void launch_wanda<WeightType::kBFloat16>(const Wanda&, int64_t, cudaStream_t);

}  // namespace losa::selection

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/pruning_checks.h"

namespace losa::selection {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Tensor wanda_select(const Tensor& weight, const Tensor& input_norms, int64_t count, int64_t m,
                    const std::optional<Tensor>& mask) {
  pruning::check_wanda_select(weight, input_norms, count, m, mask);
  const ScalarType dtype = weight.scalar_type();
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK((m == 0 || m == 4 || m == 8 || m == 16) && columns < (1 << 30),
                  "m: expected 0, 4, 8 or 16, a divisor of ", columns, ", got ", m);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor source = torch::stable::contiguous(weight), norms = torch::stable::contiguous(input_norms);
  std::optional<Tensor> before;
  if (mask) before = torch::stable::contiguous(*mask);
  Tensor packed = torch::stable::new_empty(source, {rows, packed_width(columns)}, ScalarType::Byte);
  const Wanda job{source.const_data_ptr(),
                  static_cast<const float*>(norms.const_data_ptr()),
                  before ? static_cast<const uint8_t*>(before->const_data_ptr()) : nullptr,
                  rows,
                  columns,
                  static_cast<int>(count),
                  static_cast<uint8_t*>(packed.mutable_data_ptr())};
  const auto launch = dtype == ScalarType::Float  ? launch_wanda<WeightType::kFloat>
                      : dtype == ScalarType::Half ? launch_wanda<WeightType::kHalf>
                                                  : launch_wanda<WeightType::kBFloat16>;
  launch(job, m, current_stream(weight));
  return packed;
}

}  // namespace
}  // namespace losa::selection

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("wanda_select", TORCH_BOX(&losa::selection::wanda_select));
}

#endif
