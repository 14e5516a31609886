// The diagonal blocks of a blocked factorisation on CUDA: H = R R^T with R upper triangular, and R^-1. One block of
// threads has the whole matrix in registers, eight rows and eight columns a thread. It eliminates rows from the last to
// the first: a multiple of row j is subtracted from every row i < j of the matrix, and of an identity, which takes the
// columns that elimination leaves free.
#include "cuda/launch.h"
#include "cuda/machine.h"

namespace losa::factor {

constexpr int kSide = 128;  // the most rows and columns of a matrix
constexpr int kGrid = 16;   // threads along the rows, and along the columns
constexpr int kThreads = kGrid * kGrid;
constexpr int kOwn = kSide / kGrid;  // rows, and columns, of a thread

struct Panel {
  float* matrix;  // (width, width), rows `stride` apart: symmetric; an identity afterwards
  int64_t stride;
  int width;
  float* inverse;  // (width, width), dense: the upper triangular R^-1, zero below the diagonal
  int* failed;     // set to 1 where a pivot is not positive
};

// Row `ty + 16 r` and column `4 tx + 64 q + i` of the matrix are w[r][4 q + i].
__global__ void __launch_bounds__(kThreads) panel_kernel(Panel task) {
  __shared__ __align__(16) float rows[2][kSide];
  __shared__ float scales[kSide];
  const int tx = static_cast<int>(threadIdx.x) % kGrid, ty = static_cast<int>(threadIdx.x) / kGrid;
  float w[kOwn][kOwn];
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int row = ty + kGrid * r;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int column = 4 * tx + 64 * (c / 4) + c % 4;
      w[r][c] = row < task.width && column < task.width ? task.matrix[row * task.stride + column] : 0.0f;  // [8, 8]
    }
  }

  bool failed = false;
#pragma unroll 1
  for (int four = (task.width + 3) / 4 - 1; four >= 0; --four) {
#pragma unroll
    for (int i = 3; i >= 0; --i) {
      const int j = 4 * four + i;
      if (j >= task.width) continue;
      // Two buffers are enough: the threads that write row j - 1 have passed the barrier of row j, and so have the
      // threads that read row j + 1.
      float* pivot_row = rows[j % 2];
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        if (ty + kGrid * r != j) continue;
        *reinterpret_cast<float4*>(pivot_row + 4 * tx) = make_float4(w[r][0], w[r][1], w[r][2], w[r][3]);
        *reinterpret_cast<float4*>(pivot_row + 4 * tx + 64) = make_float4(w[r][4], w[r][5], w[r][6], w[r][7]);
      }
      __syncthreads();
      const float pivot = pivot_row[j];
      failed = failed || !(pivot > 0.0f);
      if (threadIdx.x == 0) scales[j] = __frcp_rn(sqrtf(pivot));
      const float inverse = __frcp_rn(pivot);
      const float4 left = *reinterpret_cast<const float4*>(pivot_row + 4 * tx);
      const float4 right = *reinterpret_cast<const float4*>(pivot_row + 4 * tx + 64);
      const float own[kOwn] = {left.x, left.y, left.z, left.w, right.x, right.y, right.z, right.w};
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
        const int row = ty + kGrid * r;
        if (row >= j) continue;
        // The matrix is symmetric: row j at column `row` is the entry to be eliminated.
        const float multiple = pivot_row[row] * inverse;
#pragma unroll
        for (int c = 0; c < kOwn; ++c) w[r][c] -= multiple * own[c];
        // Column j is free from now on and belongs to the identity, whose row j has a one there. Selects, because an
        // index into registers would send all of them to memory.
        w[r][i] = four == tx ? -multiple : w[r][i];
        w[r][4 + i] = four == tx + kGrid ? -multiple : w[r][4 + i];
      }
    }
  }
  // R^-1, with its rows scaled, and the identity.
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const int row = ty + kGrid * r;
    if (row >= task.width) continue;
    const float scale = scales[row];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const int column = 4 * tx + 64 * (c / 4) + c % 4;
      if (column >= task.width) continue;
      task.inverse[row * task.width + column] = column > row ? w[r][c] * scale : column == row ? scale : 0.0f;
      task.matrix[row * task.stride + column] = column == row ? 1.0f : 0.0f;
    }
  }
  if (failed && threadIdx.x == 0) *task.failed = 1;
}

// width: 1 to kSide
void launch_panel(const Panel& task, cudaStream_t stream) {
  LOSA_LAUNCH(panel_kernel, 1, kThreads, 0, stream, task);
}

}  // namespace losa::factor

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/pruning_checks.h"

namespace losa::factor {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void factor_panel(const Tensor& matrix, int64_t start, int64_t end, const Tensor& inverse, const Tensor& failed) {
  pruning::check_factor_panel(matrix, start, end, inverse, failed);
  const DeviceGuard guard(matrix.get_device_index());
  const int64_t stride = matrix.stride(0);
  launch_panel({.matrix = static_cast<float*>(matrix.mutable_data_ptr()) + start * (stride + 1),
                .stride = stride,
                .width = static_cast<int>(end - start),
                .inverse = static_cast<float*>(inverse.mutable_data_ptr()),
                .failed = static_cast<int*>(failed.mutable_data_ptr())},
               current_stream(matrix));
}

}  // namespace
}  // namespace losa::factor

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("factor_panel", TORCH_BOX(&losa::factor::factor_panel));
}

#endif
