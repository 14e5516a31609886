// SparseGPT's sweep of one column block on CUDA. Four lanes share a row: each has four neighbours of every 16 columns,
// in registers. A column's error goes from the lane that has the column to the other three lanes. U, the upper
// triangular factor, is in shared memory. There is no barrier after U is loaded, and 4096 rows are a warp for nearly
// every scheduler of an H100.
#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/machine.h"
#include "cuda/scores.h"

namespace losa::column_sweep {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kLanes = 4;                 // that share a row
constexpr int kRows = kThreads / kLanes;  // of a block of threads
constexpr int kStrip = 4 * kLanes;        // columns of a strip, of which each lane has four neighbours
constexpr int kMaxWidth = 128, kStrips = kMaxWidth / kStrip;

// Pointers are at the first row and column of the block; pointers to packed masks are at the byte of the first column.
struct Sweep {
  float* weight;  // (rows, stride), of which `width` columns are swept
  int64_t stride;
  const float* factor;  // (width, factor_stride): rows of U
  int64_t factor_stride;
  int width;
  int prune;  // of each group of kM columns; unless kM is 0
  int64_t rows;
  const int* bound;     // (3,): key, column and row of select_block; if kM is 0
  const uint8_t* mask;  // (rows, packed_stride): what is not pruned yet; or null
  uint8_t* kept;        // (rows, packed_stride): what stays
  int64_t packed_stride;
  float* errors;  // (rows, width); if split, (rows, 3 * width): the high part twice, then the low part
  int64_t errors_stride;
  bool split;
  float* loss;   // (rows,), added to
  bool aligned;  // rows of weight, factor and errors are whole fours and may be accessed 16 bytes at a time
};

__device__ __forceinline__ float component(const float4& four, int index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

// Four columns of which `left` exist; the others are zero.
template <bool kAligned>
__device__ __forceinline__ float4 load_four(const float* place, int left) {
  if constexpr (kAligned) {
    return left > 0 ? *reinterpret_cast<const float4*>(place) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  return make_float4(left > 0 ? place[0] : 0.0f, left > 1 ? place[1] : 0.0f, left > 2 ? place[2] : 0.0f,
                     left > 3 ? place[3] : 0.0f);
}

template <bool kAligned>
__device__ __forceinline__ void store_four(float* place, int left, const float4& four) {
  if constexpr (kAligned) {
    if (left > 0) *reinterpret_cast<float4*>(place) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) place[i] = component(four, i);
    }
  }
}

// Rounded to TF32's 10 bits after the point, halves away from zero.
__device__ __forceinline__ float rounded_to_tf32(float value) {
  return __uint_as_float((__float_as_uint(value) + 0x1000u) & ~0x1fffu);
}

// Four errors; if split, as two TF32 numbers each, which loses at most 2^-22 of an error.
template <bool kAligned>
__device__ __forceinline__ void store_errors(const Sweep& task, float* place, int left, const float (&errors)[4]) {
  if (!task.split) {
    store_four<kAligned>(place, left, make_float4(errors[0], errors[1], errors[2], errors[3]));
    return;
  }
  float high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high[i] = rounded_to_tf32(errors[i]);
    low[i] = rounded_to_tf32(errors[i] - high[i]);
  }
  store_four<kAligned>(place, left, make_float4(high[0], high[1], high[2], high[3]));
  store_four<kAligned>(place + task.width, left, make_float4(high[0], high[1], high[2], high[3]));
  store_four<kAligned>(place + 2 * task.width, left, make_float4(low[0], low[1], low[2], low[3]));
}

// In shared memory a row of U begins at its strip's first column. The floats of a row, and the floats of all strips
// before one:
LOSA_HOST_DEVICE constexpr int row_floats(int strip) {
  return kMaxWidth - kStrip * strip;
}
LOSA_HOST_DEVICE constexpr int strip_start(int strip) {
  return kStrip * (kMaxWidth * strip - kStrip * (strip * (strip - 1) / 2));
}

// U to shared memory, by a warp for each row; zeros beyond the block's width. All of it is there after wait_copies and
// a barrier of the block.
template <bool kAligned>
__device__ __forceinline__ void load_upper(const Sweep& task, float* upper) {
  const int column = 4 * static_cast<int>(threadIdx.x % 32), rows = (task.width + kStrip - 1) / kStrip * kStrip;
  for (int row = threadIdx.x / 32; row < rows; row += kWarps) {
    const int strip = row / kStrip, first = strip * kStrip, left = row < task.width ? task.width - column : 0;
    if (column < first) continue;
    float* place = upper + strip_start(strip) + (row - first) * row_floats(strip) + column - first;
    const float* from = task.factor + row * task.factor_stride + column;
    if (kAligned && left > 0) {
      copy_async(shared_address(place), from);  // [32 lanes, 4] of row `row`
    } else {
      *reinterpret_cast<float4*>(place) = load_four<false>(from, left);
    }
  }
  commit_copies();
}

// The diagonal of U, one beyond the block's width, and its inverses to shared memory. By all threads.
__device__ __forceinline__ void load_diagonal(const Sweep& task, float* diagonal, float* inverse) {
  static_assert(kMaxWidth == kThreads);
  const int column = threadIdx.x;
  const float u = column < task.width ? task.factor[column * (task.factor_stride + 1)] : 1.0f;  // [128]
  diagonal[column] = u;
  inverse[column] = __frcp_rn(u);
}

// A bit for each of a lane's four columns that is among the `prune` smallest of its group. kM / 4 neighbouring lanes
// share a group; `own_lane` is the lane's number in the row.
template <int kM>
__device__ __forceinline__ unsigned smallest_columns(const float (&w)[4], unsigned pruned, const float4& diagonal,
                                                     const float4& inverse, int own_lane, int prune) {
  int keys[4], before[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keys[i] = (pruned >> i & 1u) != 0 ? -1 : sweep_key(w[i], component(diagonal, i), component(inverse, i));
    before[i] = 0;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j < i) before[i] += keys[j] <= keys[i];
      if (j > i) before[i] += keys[j] < keys[i];
    }
  }
#pragma unroll
  for (int other = 1; other < kM / 4; ++other) {
    const int earlier = (own_lane ^ other) < own_lane ? 1 : 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = __shfl_xor_sync(0xffffffffu, keys[j], other, kLanes);
#pragma unroll
      for (int i = 0; i < 4; ++i) before[i] += key < keys[i] + earlier;
    }
  }
  unsigned chosen = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (before[i] < prune) chosen |= 1u << i;
  }
  return chosen;
}

// Sets bit 4 k + i where w[k][i] comes before the bound, by its key, then by its column, then by its row.
__device__ __forceinline__ void choose_before_bound(const Sweep& task, const float (&w)[kStrips][4], int64_t row,
                                                    int first, const float* diagonal, const float* inverse,
                                                    unsigned* chosen) {
  const int key = task.bound[0], column = task.bound[1];
  const bool row_tied = row < task.bound[2];
#pragma unroll
  for (int k = 0; k < kStrips; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int here = kStrip * k + first + i, own = sweep_key(w[k][i], diagonal[here], inverse[here]);
      const bool tied = here < column || (here == column && row_tied);
      if (own < key || (own == key && tied)) *chosen |= 1u << (4 * k + i);
    }
  }
}

// The row's bytes of the mask from `packed` on: a byte is the four bits of an even lane and the four bits of the next
// lane.
__device__ __forceinline__ void store_mask(const Sweep& task, int64_t packed, int own_lane, int bytes, unsigned kept) {
  const unsigned next = __shfl_xor_sync(0xffffffffu, kept, 1, kLanes);
#pragma unroll
  for (int k = 0; k < kStrips; ++k) {
    const int byte = 2 * k + own_lane / 2;
    if (own_lane % 2 == 0 && byte < bytes) {
      task.kept[packed + byte] = static_cast<uint8_t>((kept >> 4 * k & 15u) | (next >> 4 * k & 15u) << 4);
    }
  }
}

// kM = 0: the entries before `bound` are pruned; else `prune` of each group of kM columns, chosen by the updated
// weights.
template <int kM, bool kAligned>
__global__ void __launch_bounds__(kThreads) sweep_kernel(Sweep task) {
  __shared__ __align__(16) float upper[strip_start(kStrips)];
  __shared__ __align__(16) float diagonal[kMaxWidth];
  __shared__ __align__(16) float inverse[kMaxWidth];
  load_upper<kAligned>(task, upper);
  const int own_lane = threadIdx.x % kLanes, first = 4 * own_lane;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes;
  const bool real = row < task.rows;
  const int width = real ? task.width : 0, bytes = (width + 7) / 8;
  float* weight = task.weight + row * task.stride + first;
  const int64_t packed = row * task.packed_stride;

  // The row's weights and mask. Bit 4 k + i stands for w[k][i]. Rows and columns beyond the matrix are zeros that stay.
  float w[kStrips][4];
  unsigned inside = 0, pruned = 0;
#pragma unroll
  for (int k = 0; k < kStrips; ++k) {
    const int left = width - kStrip * k - first;
    const float4 four = load_four<kAligned>(weight + kStrip * k, left);  // [8 rows, 4 lanes, 4]
#pragma unroll
    for (int i = 0; i < 4; ++i) w[k][i] = component(four, i);
    inside |= (left >= 4 ? 15u : left > 0 ? (1u << left) - 1 : 0u) << 4 * k;
    const int byte = 2 * k + own_lane / 2;
    if (task.mask != nullptr && byte < bytes) {
      pruned |= (~task.mask[packed + byte] >> 4 * (own_lane % 2) & 15u) << 4 * k;
    }
  }
  pruned &= inside;
  load_diagonal(task, diagonal, inverse);
  wait_copies<0>();
  __syncthreads();

  unsigned chosen = pruned;
  if constexpr (kM == 0) {
    choose_before_bound(task, w, row, first, diagonal, inverse, &chosen);
    chosen &= inside;
  }

  // The sweep, column by column. The error of a column that is pruned takes the place of its weight.
  const auto* diagonals = reinterpret_cast<const float4*>(diagonal);
  const auto* inverses = reinterpret_cast<const float4*>(inverse);
#pragma unroll
  for (int k = 0; k < kStrips; ++k) {
    if (kStrip * k >= task.width) break;
    const float* strip = upper + strip_start(k) + first;
#pragma unroll 1
    for (int turn = 0; turn < kLanes; ++turn) {
      if constexpr (kM > 0) {
        constexpr int kShare = kM / 4;  // lanes of a group
        if (turn % kShare == 0) {
          const int own = kStrip / 4 * k + own_lane;
          const unsigned smallest =
              smallest_columns<kM>(w[k], pruned >> 4 * k, diagonals[own], inverses[own], own_lane, task.prune);
          if (own_lane / kShare == turn / kShare) chosen |= smallest << 4 * k & inside;
        }
      }
      const float4 diagonal_now = diagonals[kStrip / 4 * k + turn], inverse_now = inverses[kStrip / 4 * k + turn];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool is_pruned = (chosen >> (4 * k + i) & 1u) != 0;
        const float own = quotient(w[k][i], component(diagonal_now, i), component(inverse_now, i));
        const float error = __shfl_sync(0xffffffffu, is_pruned ? own : 0.0f, turn, kLanes);
        if (own_lane == turn && is_pruned) w[k][i] = error;
        const auto* fours = reinterpret_cast<const float4*>(strip + (4 * turn + i) * row_floats(k));
#pragma unroll
        for (int later = k; later < kStrips; ++later) {
          const float4 u = fours[(later - k) * kStrip / 4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (later > k || own_lane > turn || (own_lane == turn && j > i)) w[later][j] -= error * component(u, j);
          }
        }
      }
    }
  }

  // Weights, errors, loss and mask.
  float loss = 0.0f;
#pragma unroll
  for (int k = 0; k < kStrips; ++k) {
    float kept[4], errors[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_pruned = (chosen >> (4 * k + i) & 1u) != 0;
      kept[i] = is_pruned ? 0.0f : w[k][i];
      errors[i] = is_pruned ? w[k][i] : 0.0f;
      loss += errors[i] * errors[i];
    }
    const int left = width - kStrip * k - first;
    store_four<kAligned>(weight + kStrip * k, left, make_float4(kept[0], kept[1], kept[2], kept[3]));
    store_errors<kAligned>(task, task.errors + row * task.errors_stride + first + kStrip * k, left, errors);
  }
  loss += __shfl_xor_sync(0xffffffffu, loss, 1, kLanes);
  loss += __shfl_xor_sync(0xffffffffu, loss, 2, kLanes);
  if (own_lane == 0 && real) task.loss[row] += loss / 2;

  store_mask(task, packed, own_lane, bytes, ~chosen & inside);
}

template <int kM>
void launch_sweep(const Sweep& task, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>((task.rows + kRows - 1) / kRows);
  if (task.aligned) {
    LOSA_LAUNCH((sweep_kernel<kM, true>), grid, kThreads, 0, stream, task);
  } else {
    LOSA_LAUNCH((sweep_kernel<kM, false>), grid, kThreads, 0, stream, task);
  }
}

// m = 0, 4, 8 or 16; width <= kMaxWidth; the block begins at a whole byte of the masks.
void launch_sweep_block(const Sweep& task, int64_t m, cudaStream_t stream) {
  if (task.rows == 0) return;
  if (m == 0) {
    launch_sweep<0>(task, stream);
  } else if (m == 4) {
    launch_sweep<4>(task, stream);
  } else if (m == 8) {
    launch_sweep<8>(task, stream);
  } else {
    launch_sweep<16>(task, stream);
  }
}

}  // namespace losa::column_sweep

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/pruning_checks.h"

namespace losa::column_sweep {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void sweep_block(const Tensor& weight, const Tensor& factor, int64_t start, int64_t end, int64_t m, int64_t prune,
                 const std::optional<Tensor>& state, const std::optional<Tensor>& mask, const Tensor& kept,
                 const Tensor& errors, const Tensor& loss) {
  pruning::check_sweep_block(weight, factor, start, end, m, prune, state, mask, kept, errors, loss);
  const int64_t rows = weight.size(0), columns = weight.size(1), width = end - start;
  STD_TORCH_CHECK(width <= kMaxWidth && start % 8 == 0 && (end % 8 == 0 || end == columns),
                  "start, end: expected whole bytes of the mask and up to ", kMaxWidth, " columns, got ", start, ", ",
                  end);
  STD_TORCH_CHECK(factor.is_contiguous(), "factor: expected a contiguous tensor");
  STD_TORCH_CHECK(m == 0 || m == 4 || m == 8 || m == 16, "m: expected 0, 4, 8 or 16, got ", m);
  const DeviceGuard guard(weight.get_device_index());
  auto* weights = static_cast<float*>(weight.mutable_data_ptr()) + start;
  const auto* upper = static_cast<const float*>(factor.const_data_ptr()) + start * (columns + 1);
  auto* errors_out = static_cast<float*>(errors.mutable_data_ptr());
  const int64_t errors_stride = errors.stride(0);
  const bool split = errors.size(1) != width;
  const uintptr_t places = reinterpret_cast<uintptr_t>(weights) | reinterpret_cast<uintptr_t>(upper) |
      reinterpret_cast<uintptr_t>(errors_out);
  const Sweep task{
      .weight = weights,
      .stride = columns,
      .factor = upper,
      .factor_stride = columns,
      .width = static_cast<int>(width),
      .prune = static_cast<int>(prune),
      .rows = rows,
      .bound = state ? static_cast<const int*>(state->const_data_ptr()) : nullptr,
      .mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) + start / 8 : nullptr,
      .kept = static_cast<uint8_t*>(kept.mutable_data_ptr()) + start / 8,
      .packed_stride = packed_width(columns),
      .errors = errors_out,
      .errors_stride = errors_stride,
      .split = split,
      .loss = static_cast<float*>(loss.mutable_data_ptr()),
      .aligned = columns % 4 == 0 && errors_stride % 4 == 0 && (!split || width % 4 == 0) && places % 16 == 0};
  launch_sweep_block(task, m, current_stream(weight));
}

}  // namespace
}  // namespace losa::column_sweep

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("sweep_block", TORCH_BOX(&losa::column_sweep::sweep_block));
}

#endif
