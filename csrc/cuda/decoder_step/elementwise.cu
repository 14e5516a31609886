// The small kernels of a decoder's step: residual sum + RMS norm, rotary positions + cache write, SiLU(gate) * up.
// Each lets the next kernel of the stream start at once, so that it asks for its weights while these run.
#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/elements.h"

namespace losa::decoder_step {

// x += update; out = x / sqrt(mean(x^2) + eps) * weight

struct AddRmsNorm {
  void* x;             // (rows, columns), written where there is an update
  const void* update;  // (rows, columns) or null
  const void* weight;  // (columns,)
  void* out;           // (rows, columns)
  int64_t rows;
  int columns;
  float eps;
};

constexpr int kNormThreads = 1024;
constexpr int kHeld = 2;  // loads of a thread that stay in registers; wider rows are read again

// A block for each row; kCount divides columns. Roundings are those of transformers: of the sum, of the normalised row,
// and of its product with the weight.
template <FloatType kType, int kCount>
__global__ void __launch_bounds__(kNormThreads) add_rms_norm_kernel(AddRmsNorm task) {
  using Part = Elements<kType, kCount>;
  __shared__ float sums[kNormThreads / 32];
  const int parts = task.columns / kCount, threads = static_cast<int>(blockDim.x), own = static_cast<int>(threadIdx.x);
  const int64_t row = int64_t{blockIdx.x} * task.columns;
  let_next_kernel_start();
  Part held[kHeld], scale[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int part = own + i * threads;
    if (part < parts) scale[i].load(task.weight, int64_t{part} * kCount);
  }
  wait_for_kernels_before();

  float squares = 0.0f;
  const auto take = [&](int part) {
    Part sum;
    const int64_t place = row + int64_t{part} * kCount;
    sum.load(task.x, place);
    if (task.update != nullptr) {
      Part update;
      update.load(task.update, place);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum.values[i] = rounded<kType>(sum.values[i] + update.values[i]);
      sum.store(task.x, place);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) squares += sum.values[i] * sum.values[i];
    return sum;
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int part = own + i * threads;
    if (part < parts) held[i] = take(part);
  }
  for (int part = own + kHeld * threads; part < parts; part += threads) take(part);

  squares = sum_over_warp(squares);
  const int lane = own % 32;
  if (lane == 0) sums[own / 32] = squares;
  __syncthreads();
  squares = sum_over_warp(lane < threads / 32 ? sums[lane] : 0.0f);
  const float factor = 1.0f / sqrtf(squares / static_cast<float>(task.columns) + task.eps);

  const auto give = [&](int part, Part values, const Part& weight) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values.values[i] = rounded<kType>(values.values[i] * factor) * weight.values[i];
    values.store(task.out, row + int64_t{part} * kCount);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int part = own + i * threads;
    if (part < parts) give(part, held[i], scale[i]);
  }
  for (int part = own + kHeld * threads; part < parts; part += threads) {
    Part sum, weight;
    sum.load(task.x, row + int64_t{part} * kCount);
    weight.load(task.weight, int64_t{part} * kCount);
    give(part, sum, weight);
  }
}

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

// out = silu(gate) * up

struct GatedSilu {
  const void* gate_up;  // (rows, 2 columns)
  void* out;            // (rows, columns)
  int64_t rows;
  int columns;
};

constexpr int kSiluThreads = 128, kMostRowBlocks = 65535;

// A thread for each kCount columns, which kCount divides. Roundings are torch's: of SiLU, and of the product.
template <FloatType kType, int kCount>
__global__ void __launch_bounds__(kSiluThreads) gated_silu_kernel(GatedSilu task) {
  let_next_kernel_start();
  wait_for_kernels_before();
  const int64_t column = (int64_t{blockIdx.x} * kSiluThreads + threadIdx.x) * kCount, columns = task.columns;
  if (column >= columns) return;
  for (int64_t row = blockIdx.y; row < task.rows; row += gridDim.y) {
    Elements<kType, kCount> gate, up;
    gate.load(task.gate_up, row * 2 * columns + column);
    up.load(task.gate_up, row * 2 * columns + columns + column);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = gate.values[i];
      up.values[i] *= rounded<kType>(value / (1.0f + expf(-value)));
    }
    up.store(task.out, row * columns + column);
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

// rotary positions of queries and keys; keys and values into the cache

struct Rotation {
  const void* heads;  // (queries + 2 keys, size): queries, keys, values
  const void* cos;    // (places, size)
  const void* sin;    // (places, size), its first half negated
  const int64_t* position;
  const void *q_norm, *k_norm;  // (size,), weights of RMS norms before the rotation; or null
  float eps;
  void* turned;  // (queries, size)
  void* cache;   // (2, keys, places, size)
  int queries, keys, size;
  int64_t places;
};

constexpr int kHeadsOfBlock = 4;
constexpr int kMostPairs = 4;  // of a lane: heads of up to 256

// A warp for each head; a lane has the pairs (i, i + size / 2) for every 32nd i.
template <FloatType kType>
__global__ void __launch_bounds__(32 * kHeadsOfBlock) rotate_and_store_kernel(Rotation task) {
  let_next_kernel_start();
  wait_for_kernels_before();
  const int head = static_cast<int>(blockIdx.x) * kHeadsOfBlock + static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, half = task.size / 2;
  if (head >= task.queries + 2 * task.keys) return;
  const int64_t position = __ldcg(task.position);
  // Nothing is written beyond the cache, wherever the position comes from.
  if (position < 0 || position >= task.places) return;

  float low[kMostPairs], high[kMostPairs];
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < kMostPairs; ++p) {
    const int i = lane + 32 * p;
    low[p] = high[p] = 0.0f;
    if (i < half) {
      low[p] = load_element<kType>(task.heads, int64_t{head} * task.size + i);
      high[p] = load_element<kType>(task.heads, int64_t{head} * task.size + half + i);
    }
    squares += low[p] * low[p] + high[p] * high[p];
  }

  const bool is_query = head < task.queries, is_value = head >= task.queries + task.keys;
  const void* const norm = is_value ? nullptr : is_query ? task.q_norm : task.k_norm;
  if (norm != nullptr) {
    const float factor = 1.0f / sqrtf(sum_over_warp(squares) / static_cast<float>(task.size) + task.eps);
#pragma unroll
    for (int p = 0; p < kMostPairs; ++p) {
      const int i = lane + 32 * p;
      if (i < half) {
        low[p] = rounded<kType>(rounded<kType>(low[p] * factor) * load_element<kType>(norm, i));
        high[p] = rounded<kType>(rounded<kType>(high[p] * factor) * load_element<kType>(norm, half + i));
      }
    }
  }

  // The cache holds all key heads, then the values of all.
  void* const to = is_query ? task.turned : task.cache;
  const int64_t row = is_query ? head : (head - task.queries) * task.places + position;
#pragma unroll
  for (int p = 0; p < kMostPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= half) continue;
    float first = low[p], second = high[p];
    if (!is_value) {
      const int64_t angle = position * task.size + i;
      first = low[p] * load_element<kType>(task.cos, angle) + high[p] * load_element<kType>(task.sin, angle);
      second = high[p] * load_element<kType>(task.cos, angle + half) + low[p] * load_element<kType>(task.sin, angle + half);
    }
    store_element<kType>(to, row * task.size + i, first);
    store_element<kType>(to, row * task.size + half + i, second);
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

// As the first argument's: dtype, device, no gaps.
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
  const AddRmsNorm task{x.mutable_data_ptr(),   update ? update->const_data_ptr() : nullptr,
                       weight.const_data_ptr(), out.mutable_data_ptr(),
                       rows,                    static_cast<int>(columns),
                       static_cast<float>(eps)};
  const bool vectors = columns * float_type_size(type) % 16 == 0 && aligned({task.x, task.update, task.weight, task.out});
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
  const GatedSilu task{gate_up.const_data_ptr(), out.mutable_data_ptr(), columns == 0 ? 0 : out.numel() / columns,
                      static_cast<int>(columns)};
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
  Tensor turned = torch::stable::new_empty(heads, {queries, size});
  const Rotation task{heads.const_data_ptr(),
                     cos.const_data_ptr(),
                     sin.const_data_ptr(),
                     static_cast<const int64_t*>(position.const_data_ptr()),
                     q_norm ? q_norm->const_data_ptr() : nullptr,
                     k_norm ? k_norm->const_data_ptr() : nullptr,
                     static_cast<float>(eps),
                     turned.mutable_data_ptr(),
                     cache.mutable_data_ptr(),
                     static_cast<int>(queries),
                     static_cast<int>(keys),
                     static_cast<int>(size),
                     places};
  launch_rotate_and_store(type, task, current_stream(heads));
  return turned;
}

}  // namespace
}  // namespace losa::decoder_step

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("add_rms_norm", TORCH_BOX(&losa::decoder_step::add_rms_norm));
  library.impl("gated_silu", TORCH_BOX(&losa::decoder_step::gated_silu));
  library.impl("rotate_and_store", TORCH_BOX(&losa::decoder_step::rotate_and_store));
}

#endif
