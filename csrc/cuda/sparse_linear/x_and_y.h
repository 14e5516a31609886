// x and y of the sparse_linear operators, as torch gives and takes them. For files that register operators.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/tensor_checks.h"
#include "cuda/launch.h"

namespace losa::sparse_linear {

constexpr int64_t kMostBatch = 16;
constexpr int64_t kMostColumns = int64_t{1} << 30;

// The number of rows of x (..., in).
inline int64_t batch_of(const torch::stable::Tensor& x) {
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) batch *= x.size(d);
  STD_TORCH_CHECK(batch <= kMostBatch, "x: expected at most ", kMostBatch, " rows, got ", batch);
  return batch;
}

// Memory for y (..., out).
inline torch::stable::Tensor result_of(const torch::stable::Tensor& x, int64_t out) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = out;
  return torch::stable::new_empty(x, sizes);
}

inline bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// x as the kernels read it, with every row at a multiple of 16 bytes: x itself, or a copy (batch, columns rounded up to
// `multiple`) with zeros in the new columns.
inline torch::stable::Tensor padded_x(const torch::stable::Tensor& x, int64_t batch, int64_t columns, int64_t multiple,
                                      cudaStream_t stream) {
  const torch::stable::Tensor source = torch::stable::contiguous(x);
  if (columns % multiple == 0 && is_aligned(source.const_data_ptr())) return source;
  const int64_t padded_columns = (columns + multiple - 1) / multiple * multiple;
  const auto size = static_cast<size_t>(x.element_size()), count = static_cast<size_t>(batch);
  const size_t bytes = static_cast<size_t>(columns) * size, pitch = static_cast<size_t>(padded_columns) * size;
  torch::stable::Tensor padded = torch::stable::new_empty(x, {batch, padded_columns});
  void* const to = padded.mutable_data_ptr();
  LOSA_CUDA_CHECK(cudaMemsetAsync(to, 0, count * pitch, stream));
  LOSA_CUDA_CHECK(
      cudaMemcpy2DAsync(to, pitch, source.const_data_ptr(), bytes, bytes, count, cudaMemcpyDeviceToDevice, stream));
  return padded;
}

}  // namespace losa::sparse_linear
