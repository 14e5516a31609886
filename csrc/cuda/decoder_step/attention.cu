// Attention of one token: which kernel runs, on how many blocks, and its operator.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/decoder_step/attention_kernel.h"
#include "cuda/launch.h"

namespace losa::decoder_step {

constexpr int kFewestPlaces = 32, kMostSplits = 64;

// Splits of the places of each of `heads` key heads (or sets of queries): two blocks for a multiprocessor, none of
// which has fewer places than a block reads at once.
inline int splits_for(int heads, int places, int multiprocessors) {
  const int wanted = (2 * multiprocessors + heads - 1) / heads, most = (places + kFewestPlaces - 1) / kFewestPlaces;
  return std::clamp(std::min(wanted, most), 1, kMostSplits);
}

// The most queries that share the reads of a key head.
inline int queries_of_set(int queries, int keys) {
  return queries == keys ? 1 : 4;
}

// How many sets the queries of a key head are divided into.
inline int sets_of(int queries, int keys) {
  const int group = queries / keys, together = queries_of_set(queries, keys);
  return (group + together - 1) / together;
}

template <FloatType kType, int kLanes>
void launch_attention(const Attention& task, int splits, cudaStream_t stream) {
  constexpr int kThreads = 32 * kAttendWarps;
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(task.keys * sets_of(task.queries, task.keys)));
  if (queries_of_set(task.queries, task.keys) == 1) {
    LOSA_LAUNCH_DEPENDENT((attend_kernel<kType, kLanes, 1>), grid, kThreads, 0, stream, task);
  } else {
    LOSA_LAUNCH_DEPENDENT((attend_kernel<kType, kLanes, 4>), grid, kThreads, 0, stream, task);
  }
}

template <FloatType kType>
void launch_attention(const Attention& task, int splits, cudaStream_t stream) {
  const int bytes = task.size * float_type_size(kType);
  if (bytes <= 128 && kType != FloatType::kFloat) {
    if constexpr (kType != FloatType::kFloat) launch_attention<kType, 8>(task, splits, stream);
  } else if (bytes <= 256) {
    launch_attention<kType, 16>(task, splits, stream);
  } else {
    launch_attention<kType, 32>(task, splits, stream);
  }
}

#if !defined(LOSA_EMULATOR)  // A kernel takes a second to compile for the emulator: its driver has fewer types.

// Rows of cache and q begin at multiples of 16 bytes and have at most 512 bytes, 16 for each lane of a warp.
void launch_attention(FloatType type, const Attention& task, int splits, cudaStream_t stream) {
  switch (type) {
    case FloatType::kFloat: return launch_attention<FloatType::kFloat>(task, splits, stream);
    case FloatType::kBFloat16: return launch_attention<FloatType::kBFloat16>(task, splits, stream);
    case FloatType::kHalf: return launch_attention<FloatType::kHalf>(task, splits, stream);
  }
}

#endif

}  // namespace losa::decoder_step

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/tensor_checks.h"
#include "cuda/per_device.h"

namespace losa::decoder_step {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMostRowBytes = 512;

bool beside(const Tensor& tensor, const Tensor& first) {
  return tensor.is_contiguous() && tensor.is_cuda() && tensor.get_device_index() == first.get_device_index();
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

Tensor attend_cache(const Tensor& q, const Tensor& cache, const Tensor& position, int64_t places, double scaling,
                    const Tensor& finished) {
  const FloatType type = float_type(q, "q");
  STD_TORCH_CHECK(q.dim() == 2 && q.is_contiguous() && is_aligned(q),
                  "q: expected an aligned, contiguous (heads, size)");
  STD_TORCH_CHECK(cache.dim() == 4 && cache.size(0) == 2 && cache.size(3) == q.size(1) && beside(cache, q) &&
                      cache.scalar_type() == q.scalar_type() && is_aligned(cache),
                  "cache: expected an aligned, contiguous (2, key heads, places, ", q.size(1),
                  ") of q's dtype and device");
  const int64_t queries = q.size(0), size = q.size(1), keys = cache.size(1), room = cache.size(2);
  const int64_t bytes = size * float_type_size(type);
  STD_TORCH_CHECK(bytes > 0 && bytes <= kMostRowBytes && bytes % 16 == 0, "q: expected heads of up to ", kMostRowBytes,
                  " bytes, whole 16, got ", bytes);
  STD_TORCH_CHECK(keys > 0 && queries > 0 && queries % keys == 0 && queries < (1 << 16),
                  "q: expected a multiple of the ", keys, " key heads, got ", queries);
  STD_TORCH_CHECK(places > 0 && places <= room && room < (int64_t{1} << 30), "places: expected 1 to ", room, ", got ",
                  places);
  STD_TORCH_CHECK(position.scalar_type() == ScalarType::Long && position.numel() == 1 && beside(position, q),
                  "position: expected an int64 of one element on the device of q");
  STD_TORCH_CHECK(finished.scalar_type() == ScalarType::Int && finished.numel() >= queries && beside(finished, q),
                  "finished: expected an int32 for each of ", queries, " heads on the device of q");
  const DeviceGuard guard(q.get_device_index());
  Tensor out = torch::stable::new_empty(q, {queries, size});
  const int heads = static_cast<int>(keys) * sets_of(static_cast<int>(queries), static_cast<int>(keys));
  const int splits = splits_for(heads, static_cast<int>(places), multiprocessors());
  Tensor parts = torch::stable::new_empty(q, {queries * splits * (size + 2)}, ScalarType::Float);
  auto* const first = static_cast<float*>(parts.mutable_data_ptr());
  const Attention task{.q = q.const_data_ptr(),
                       .cache = cache.const_data_ptr(),
                       .position = static_cast<const int64_t*>(position.const_data_ptr()),
                       .out = out.mutable_data_ptr(),
                       .parts = first,
                       .weights = first + queries * splits * size,
                       .finished = static_cast<int*>(finished.mutable_data_ptr()),
                       .queries = static_cast<int>(queries),
                       .keys = static_cast<int>(keys),
                       .size = static_cast<int>(size),
                       .room = room,
                       .places = static_cast<int>(places),
                       .scale = static_cast<float>(scaling * M_LOG2E)};
  launch_attention(type, task, splits, current_stream(q));
  return out;
}

}  // namespace
}  // namespace losa::decoder_step

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("attend_cache", TORCH_BOX(&losa::decoder_step::attend_cache));
}

#endif
