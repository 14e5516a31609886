// Launches of a decoder's small kernels, and their operators.
#include <algorithm>
#include <cstdint>

#include "cuda/decoder_step/elementwise_kernels.h"
#include "cuda/launch.h"

namespace losa::decoder_step {

template <FloatType kType>
void launch_add_rms_norm(const AddRmsNorm& task, bool vectors, cudaStream_t stream) {
  if (task.rows == 0 || task.columns == 0) return;
  const int parts = vectors ? task.columns / kPerVector<kType> : task.columns;
  const int threads = std::min(kNormThreads, (parts + 31) / 32 * 32);
  const auto grid = static_cast<unsigned>(task.rows);
  if (vectors) {
    LOSA_LAUNCH_DEPENDENT((add_rms_norm_kernel<kType, kPerVector<kType>>), grid, threads, 0, stream, task);
  } else {
    LOSA_LAUNCH_DEPENDENT((add_rms_norm_kernel<kType, 1>), grid, threads, 0, stream, task);
  }
}

template <FloatType kType>
void launch_gated_silu(const GatedSilu& task, bool vectors, cudaStream_t stream) {
  if (task.rows == 0 || task.columns == 0) return;
  const int parts = vectors ? task.columns / kPerVector<kType> : task.columns;
  const dim3 grid(static_cast<unsigned>((parts + kSiluThreads - 1) / kSiluThreads),
                  static_cast<unsigned>(std::min<int64_t>(task.rows, kMostRowBlocks)));
  if (vectors) {
    LOSA_LAUNCH_DEPENDENT((gated_silu_kernel<kType, kPerVector<kType>>), grid, kSiluThreads, 0, stream, task);
  } else {
    LOSA_LAUNCH_DEPENDENT((gated_silu_kernel<kType, 1>), grid, kSiluThreads, 0, stream, task);
  }
}

template <FloatType kType>
void launch_rotate_and_store(const Rotation& task, cudaStream_t stream) {
  const int heads = task.queries + 2 * task.keys;
  const auto grid = static_cast<unsigned>((heads + kHeadsOfBlock - 1) / kHeadsOfBlock);
  LOSA_LAUNCH_DEPENDENT(rotate_and_store_kernel<kType>, grid, 32 * kHeadsOfBlock, 0, stream, task);
}

// launch(kType) for the type.
template <class Launch>
void by_type(FloatType type, Launch launch) {
  switch (type) {
    case FloatType::kFloat: launch(std::integral_constant<FloatType, FloatType::kFloat>()); break;
    case FloatType::kBFloat16: launch(std::integral_constant<FloatType, FloatType::kBFloat16>()); break;
    case FloatType::kHalf: launch(std::integral_constant<FloatType, FloatType::kHalf>()); break;
  }
}

void launch_add_rms_norm(FloatType type, const AddRmsNorm& task, bool vectors, cudaStream_t stream) {
  by_type(type, [&](auto kind) { launch_add_rms_norm<decltype(kind)::value>(task, vectors, stream); });
}

void launch_gated_silu(FloatType type, const GatedSilu& task, bool vectors, cudaStream_t stream) {
  by_type(type, [&](auto kind) { launch_gated_silu<decltype(kind)::value>(task, vectors, stream); });
}

void launch_rotate_and_store(FloatType type, const Rotation& task, cudaStream_t stream) {
  by_type(type, [&](auto kind) { launch_rotate_and_store<decltype(kind)::value>(task, stream); });
}

}  // namespace losa::decoder_step

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "common/tensor_checks.h"

namespace losa::decoder_step {
namespace {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Checks for the dtype and device of the first argument, and for dense memory.
void check_like(const Tensor& tensor, const Tensor& first, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type() && tensor.is_contiguous() && tensor.is_cuda() &&
                      tensor.get_device_index() == first.get_device_index(),
                  name, ": expected a contiguous tensor of the first argument's dtype and device");
}

bool aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

Tensor add_rms_norm(const Tensor& x, const std::optional<Tensor>& update, const Tensor& weight, double eps) {
  const FloatType type = float_type(x, "x");
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(), "x: expected a contiguous (..., columns)");
  const int64_t columns = x.size(x.dim() - 1), rows = columns == 0 ? 0 : x.numel() / columns;
  STD_TORCH_CHECK(columns < (1 << 30) && rows < (int64_t{1} << 31), "x: expected fewer than 2^30 columns, 2^31 rows");
  check_like(weight, x, "weight");
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == columns, "weight: expected (", columns, ",)");
  if (update) {
    check_like(*update, x, "update");
    STD_TORCH_CHECK(update->numel() == x.numel() && update->size(update->dim() - 1) == columns,
                    "update: expected the shape of x");
  }
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, sizes_of(x));
  const AddRmsNorm task{.x = x.mutable_data_ptr(),
                        .update = update ? update->const_data_ptr() : nullptr,
                        .weight = weight.const_data_ptr(),
                        .out = out.mutable_data_ptr(),
                        .rows = rows,
                        .columns = static_cast<int>(columns),
                        .eps = static_cast<float>(eps)};
  const bool vectors =
      columns * float_type_size(type) % 16 == 0 && aligned({task.x, task.update, task.weight, task.out});
  launch_add_rms_norm(type, task, vectors, current_stream(x));
  return out;
}

Tensor gated_silu(const Tensor& gate_up) {
  const FloatType type = float_type(gate_up, "gate_up");
  STD_TORCH_CHECK(gate_up.dim() > 0 && gate_up.is_contiguous() && gate_up.size(gate_up.dim() - 1) % 2 == 0,
                  "gate_up: expected a contiguous (..., 2 * columns)");
  std::vector<int64_t> sizes = sizes_of(gate_up);
  const int64_t columns = sizes.back() /= 2;
  STD_TORCH_CHECK(columns < (1 << 30), "gate_up: expected fewer than 2^31 columns");
  const DeviceGuard guard(gate_up.get_device_index());
  Tensor out = torch::stable::new_empty(gate_up, sizes);
  const GatedSilu task{.gate_up = gate_up.const_data_ptr(),
                       .out = out.mutable_data_ptr(),
                       .rows = columns == 0 ? 0 : out.numel() / columns,
                       .columns = static_cast<int>(columns)};
  const bool vectors = columns * float_type_size(type) % 16 == 0 && aligned({task.gate_up, task.out});
  launch_gated_silu(type, task, vectors, current_stream(gate_up));
  return out;
}

Tensor rotate_and_store(const Tensor& heads, const Tensor& cos, const Tensor& sin, const Tensor& position,
                        const Tensor& cache, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                        double eps) {
  const FloatType type = float_type(heads, "heads");
  STD_TORCH_CHECK(heads.dim() == 2 && heads.is_contiguous(), "heads: expected a contiguous (heads, size)");
  check_like(cache, heads, "cache");
  STD_TORCH_CHECK(cache.dim() == 4 && cache.size(0) == 2 && cache.size(3) == heads.size(1),
                  "cache: expected (2, key heads, places, ", heads.size(1), ")");
  const int64_t size = heads.size(1), keys = cache.size(1), places = cache.size(2), queries = heads.size(0) - 2 * keys;
  STD_TORCH_CHECK(size % 2 == 0 && size > 0 && size <= 64 * kMostPairs, "heads: expected an even size up to ",
                  64 * kMostPairs);
  STD_TORCH_CHECK(queries > 0 && keys > 0 && heads.size(0) < (1 << 24),
                  "heads: expected queries and two for each key head of the cache");
  for (const Tensor* table : {&cos, &sin}) {
    const char* const name = table == &cos ? "cos" : "sin";
    check_like(*table, heads, name);
    STD_TORCH_CHECK(table->dim() == 2 && table->size(0) >= places && table->size(1) == size, name, ": expected (",
                    places, " or more, ", size, ")");
  }
  STD_TORCH_CHECK(position.scalar_type() == torch::headeronly::ScalarType::Long && position.numel() == 1 &&
                      position.is_cuda() && position.get_device_index() == heads.get_device_index(),
                  "position: expected an int64 of one element on the device of heads");
  for (const auto* norm : {&q_norm, &k_norm}) {
    if (!*norm) continue;
    const char* const name = norm == &q_norm ? "q_norm" : "k_norm";
    check_like(**norm, heads, name);
    STD_TORCH_CHECK((*norm)->numel() == size, name, ": expected (", size, ",)");
  }
  const DeviceGuard guard(heads.get_device_index());
  Tensor rotated = torch::stable::new_empty(heads, {queries, size});
  const Rotation task{.heads = heads.const_data_ptr(),
                      .cos = cos.const_data_ptr(),
                      .sin = sin.const_data_ptr(),
                      .position = static_cast<const int64_t*>(position.const_data_ptr()),
                      .q_norm = q_norm ? q_norm->const_data_ptr() : nullptr,
                      .k_norm = k_norm ? k_norm->const_data_ptr() : nullptr,
                      .eps = static_cast<float>(eps),
                      .rotated = rotated.mutable_data_ptr(),
                      .cache = cache.mutable_data_ptr(),
                      .queries = static_cast<int>(queries),
                      .keys = static_cast<int>(keys),
                      .size = static_cast<int>(size),
                      .places = places};
  launch_rotate_and_store(type, task, current_stream(heads));
  return rotated;
}

}  // namespace
}  // namespace losa::decoder_step

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("add_rms_norm", TORCH_BOX(&losa::decoder_step::add_rms_norm));
  library.impl("gated_silu", TORCH_BOX(&losa::decoder_step::gated_silu));
  library.impl("rotate_and_store", TORCH_BOX(&losa::decoder_step::rotate_and_store));
}

#endif
