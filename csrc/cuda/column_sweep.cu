// SparseGPT's sweep of one column block on CUDA. A block of threads has 32 rows: a warp per 32 columns of the block, a
// thread per row of them, with its weights in registers. Warp after warp sweeps its columns without a barrier, U being
// broadcast from shared memory; then the warps to the right take the 32 errors off their columns.
#include "common/bits.h"
#include "common/launch.h"
#include "cuda/scores.h"

namespace losa::column_sweep {

constexpr int kSub = 32;  // rows of a block of threads, and columns of a warp
constexpr int kMaxWidth = 128;
constexpr int kMaxSubs = kMaxWidth / kSub;

// Pointers are at the first row and column of the block, those of packed masks at the byte of the first column.
struct Sweep {
  float* weight;
  int64_t stride;
  const float* factor;
  int64_t factor_stride;
  int width, prune;
  int64_t rows;
  const int* bound;     // key, column, row; unless kM > 0
  const uint8_t* mask;  // may be null
  uint8_t* kept;
  int64_t packed_stride;
  float* errors;  // rows x width, dense
  float* loss;
  bool aligned;  // rows of the weight may be read 16 bytes at a time
};

__device__ __forceinline__ float component(const float4& four, int index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

// row[0..32) of U, for a column: w[c] -= error * row[c] for c in [first, 32).
__device__ __forceinline__ void subtract(float (&w)[kSub], float error, const float* row, int first) {
  const auto* fours = reinterpret_cast<const float4*>(row);
#pragma unroll
  for (int q = 0; q < kSub / 4; ++q) {
    if (4 * q + 3 < first) continue;
    const float4 u = fours[q];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (4 * q + t >= first) w[4 * q + t] -= error * component(u, t);
    }
  }
}

__device__ __forceinline__ unsigned load_bits(const uint8_t* bytes, int count) {
  unsigned bits = 0;
  for (int byte = 0; byte < count; ++byte) bits |= static_cast<unsigned>(bytes[byte]) << (8 * byte);
  return bits;
}

// Rows [first, first + 32) of U, columns [first, width), zero beyond; by `loaders` warps, of which this is one.
__device__ __forceinline__ void load_strip(const Sweep& job, float (*strip)[kMaxWidth], int first, int warp, int loaders) {
  const int columns = (job.width + kSub - 1) / kSub * kSub;
  for (int i = warp; i < kSub; i += loaders) {
    for (int c = first + static_cast<int>(threadIdx.x); c < columns; c += kSub) {
      const bool inside = first + i < job.width && c < job.width;
      strip[i][c] = inside ? job.factor[(first + i) * job.factor_stride + c] : 0.0f;
    }
  }
}

// kM = 0: the entries before `bound` go; else `prune` of each group of kM, from updated weights.
template <int kM>
__global__ void __launch_bounds__(kSub* kMaxSubs) sweep_kernel(Sweep job) {
  __shared__ __align__(16) float strips[2][kSub][kMaxWidth];
  __shared__ float errors[kSub][kSub + 1];
  __shared__ float diagonal[kMaxWidth];
  __shared__ float losses[kMaxSubs][kSub];
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int first = warp * kSub, own = job.width - first < kSub ? job.width - first : kSub, bytes = (own + 7) / 8;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kSub, row = first_row + lane;
  const bool real = row < job.rows;
  float* weight = job.weight + row * job.stride + first;
  const int64_t packed = row * job.packed_stride + first / 8;

  // Rows and columns beyond the matrix are zeros that stay.
  float w[kSub];
  if (real && own == kSub && job.aligned) {
#pragma unroll
    for (int q = 0; q < kSub / 4; ++q) {
      const float4 four = reinterpret_cast<const float4*>(weight)[q];
      w[4 * q] = four.x;
      w[4 * q + 1] = four.y;
      w[4 * q + 2] = four.z;
      w[4 * q + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSub; ++j) w[j] = real && j < own ? weight[j] : 0.0f;
  }
  {
    const int column = first + lane;
    diagonal[column] = column < job.width ? job.factor[column * (job.factor_stride + 1)] : 1.0f;
  }
  load_strip(job, strips[0], 0, warp, warps);
  __syncthreads();

  const unsigned inside = own == kSub ? ~0u : (1u << own) - 1;
  unsigned gone = 0;
  if (job.mask != nullptr && real) gone = ~load_bits(job.mask + packed, bytes) & inside;
  unsigned chosen = gone;
  if (kM == 0) {
    const int key = job.bound[0], column = job.bound[1];
    const bool row_tied = row < job.bound[2];
#pragma unroll
    for (int j = 0; j < kSub; ++j) {
      const int own_key = sweep_key(w[j], diagonal[first + j]);
      const bool tied = first + j < column || (first + j == column && row_tied);
      if (own_key < key || (own_key == key && tied)) chosen |= 1u << j;
    }
    chosen &= inside;
  }

  float loss = 0.0f;
  for (int turn = 0; turn < warps; ++turn) {
    float(*strip)[kMaxWidth] = strips[turn % 2];
    if (warp == turn) {
#pragma unroll
      for (int j = 0; j < kSub; ++j) {
        if (kM > 0 && j % (kM > 0 ? kM : 1) == 0) {
          constexpr int kGroup = kM > 0 ? kM : 1;
          int keys[kGroup];
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            keys[i] = (gone >> (j + i) & 1u) != 0 ? -1 : sweep_key(w[(j + i) % kSub], diagonal[first + (j + i) % kSub]);
          }
          chosen |= (smallest_of<kGroup>(keys, job.prune) << j) & inside;
        }
        const bool goes = (chosen >> j & 1u) != 0;
        const float error = goes ? __fdiv_rn(w[j], diagonal[first + j]) : 0.0f;
        if (goes) w[j] = 0.0f;
        errors[j][lane] = error;
        loss += error * error;
        subtract(w, error, &strip[j][first], j + 1);
      }
    } else if (turn + 1 < warps) {
      load_strip(job, strips[(turn + 1) % 2], (turn + 1) * kSub, warp < turn ? warp : warp - 1, warps - 1);
    }
    __syncthreads();
    const int column = turn * kSub + lane;
    for (int r = warp; r < kSub; r += warps) {
      if (first_row + r < job.rows && column < job.width) {
        job.errors[(first_row + r) * job.width + column] = errors[lane][r];
      }
    }
    if (warp > turn) {
      for (int i = 0; i < kSub; ++i) subtract(w, errors[i][lane], &strip[i][first], 0);
    }
    __syncthreads();
  }

  losses[warp][lane] = loss;
  __syncthreads();
  if (!real) return;
  if (warp == 0) {
    float sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum += losses[i][lane];
    job.loss[row] += sum / 2;
  }
  if (own == kSub && job.aligned) {
#pragma unroll
    for (int q = 0; q < kSub / 4; ++q) {
      reinterpret_cast<float4*>(weight)[q] = make_float4(w[4 * q], w[4 * q + 1], w[4 * q + 2], w[4 * q + 3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSub; ++j) {
      if (j < own) weight[j] = w[j];
    }
  }
  const unsigned kept = ~chosen & inside;
  for (int byte = 0; byte < bytes; ++byte) job.kept[packed + byte] = static_cast<uint8_t>(kept >> (8 * byte));
}

// m = 0, 4, 8 or 16; width <= kMaxWidth; the block begins at a whole byte of the masks.
void launch_sweep_block(const Sweep& job, int64_t m, cudaStream_t stream) {
  if (job.rows == 0) return;
  const dim3 block(kSub, static_cast<unsigned>((job.width + kSub - 1) / kSub));
  const auto grid = static_cast<unsigned>((job.rows + kSub - 1) / kSub);
  if (m == 0) {
    LOSA_LAUNCH(sweep_kernel<0>, grid, block, 0, stream, job);
  } else if (m == 4) {
    LOSA_LAUNCH(sweep_kernel<4>, grid, block, 0, stream, job);
  } else if (m == 8) {
    LOSA_LAUNCH(sweep_kernel<8>, grid, block, 0, stream, job);
  } else {
    LOSA_LAUNCH(sweep_kernel<16>, grid, block, 0, stream, job);
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
  const Sweep job{weights,
                  columns,
                  static_cast<const float*>(factor.const_data_ptr()) + start * (columns + 1),
                  columns,
                  static_cast<int>(width),
                  static_cast<int>(prune),
                  rows,
                  state ? static_cast<const int*>(state->const_data_ptr()) : nullptr,
                  mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) + start / 8 : nullptr,
                  static_cast<uint8_t*>(kept.mutable_data_ptr()) + start / 8,
                  packed_width(columns),
                  static_cast<float*>(errors.mutable_data_ptr()),
                  static_cast<float*>(loss.mutable_data_ptr()),
                  columns % 4 == 0 && reinterpret_cast<uintptr_t>(weights) % 16 == 0};
  launch_sweep_block(job, m, current_stream(weight));
}

}  // namespace
}  // namespace losa::column_sweep

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("sweep_block", TORCH_BOX(&losa::column_sweep::sweep_block));
}

#endif
