// One token of a decoder between its products: rows of one type, read once each.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "common/tensor_checks.h"
#include "cpu/decoder_step/kernels.h"
#include "cpu/parallel_rows.h"
#include "cpu/scratch.h"

namespace losa::decoder_step {
namespace {

using torch::stable::Tensor;

// Products of attention below which a second thread costs more than it saves.
constexpr int64_t kProductsPerTask = 1 << 17;

// The type of a contiguous tensor.
FloatType type_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
  return float_type(tensor, name);
}

void check_alike(const Tensor& tensor, FloatType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(type_of(tensor, name) == type && tensor.numel() == numel, name, ": expected ", numel,
                  " numbers of the type of the others");
}

const uint8_t* bytes_of(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const uint8_t*>(tensor->const_data_ptr()) : nullptr;
}

Tensor add_rms_norm(const Tensor& x, const std::optional<Tensor>& update, const Tensor& weight, double eps) {
  const FloatType type = type_of(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected (..., columns)");
  const int64_t columns = x.size(x.dim() - 1), bytes = columns * float_type_size(type);
  check_alike(weight, type, columns, "weight");
  if (update.has_value()) check_alike(*update, type, x.numel(), "update");
  Tensor out = torch::stable::new_empty(x, sizes_of(x));
  if (x.numel() == 0) return out;
  auto *const rows = static_cast<uint8_t*>(x.mutable_data_ptr()),
              *const to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const uint8_t *const added = bytes_of(update), *const scales = bytes_of(weight);
  for_each_row(x.numel() / columns, columns, [&](int64_t row) {
    kernels().add_rms_norm(type, rows + row * bytes, added == nullptr ? nullptr : added + row * bytes, scales,
                           to + row * bytes, columns, static_cast<float>(eps));
  });
  return out;
}

int64_t place_of(const Tensor& position) {
  STD_TORCH_CHECK(position.numel() == 1 && position.scalar_type() == torch::headeronly::ScalarType::Long,
                  "position: expected int64 (1,)");
  return *static_cast<const int64_t*>(position.const_data_ptr());
}

// Of a cache (2, key heads, room, size).
struct Cache {
  int64_t keys, room, size, row;  // row: bytes of one place of a head

  Cache(const Tensor& cache, FloatType type) {
    STD_TORCH_CHECK(cache.dim() == 4 && cache.size(0) == 2 && type_of(cache, "cache") == type,
                    "cache: expected (2, key heads, places, size) of the type of the others");
    keys = cache.size(1), room = cache.size(2), size = cache.size(3), row = size * float_type_size(type);
  }

  // Bytes in front of a place of keys (0) or values (1) of a head.
  int64_t at(int64_t part, int64_t head, int64_t place) const { return ((part * keys + head) * room + place) * row; }
};

Tensor rotate_and_store(const Tensor& heads, const Tensor& cos, const Tensor& sin, const Tensor& position,
                        const Tensor& cache, const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                        double eps) {
  const FloatType type = type_of(heads, "heads");
  const Cache of(cache, type);
  const int64_t size = of.size, keys = of.keys, place = place_of(position);
  STD_TORCH_CHECK(heads.dim() == 2 && heads.size(1) == size && size % 2 == 0 && heads.size(0) >= 2 * keys,
                  "heads: expected (queries + 2 key heads, size), size even");
  for (const auto& [table, name] : {std::pair(&cos, "cos"), std::pair(&sin, "sin")}) {
    STD_TORCH_CHECK(
        table->dim() == 2 && table->size(0) >= of.room && table->size(1) == size && type_of(*table, name) == type, name,
        ": expected (places or more, ", size, ") of the type of heads");
  }
  if (q_norm.has_value()) check_alike(*q_norm, type, size, "q_norm");
  if (k_norm.has_value()) check_alike(*k_norm, type, size, "k_norm");
  const int64_t queries = heads.size(0) - 2 * keys;
  Tensor rotated = torch::stable::new_empty(heads, {queries, size});
  // Beyond the cache nothing is stored, and the result is anything.
  if (size == 0 || place < 0 || place >= of.room) return rotated;
  const auto* const from = bytes_of(heads);
  const uint8_t *const c = bytes_of(cos) + place * of.row, *const s = bytes_of(sin) + place * of.row;
  auto *const to = static_cast<uint8_t*>(rotated.mutable_data_ptr()),
              *const stored = static_cast<uint8_t*>(cache.mutable_data_ptr());
  for (int64_t head = 0; head < queries + keys; ++head) {
    const bool is_query = head < queries;
    kernels().rotate(type, from + head * of.row, c, s, bytes_of(is_query ? q_norm : k_norm), static_cast<float>(eps),
                     is_query ? to + head * of.row : stored + of.at(0, head - queries, place), size);
  }
  for (int64_t head = 0; head < keys; ++head) {
    std::memcpy(stored + of.at(1, head, place), from + (queries + keys + head) * of.row, static_cast<size_t>(of.row));
  }
  return rotated;
}

Tensor attend_cache(const Tensor& q, const Tensor& cache, const Tensor& position, int64_t places, double scaling,
                    const Tensor& /*finished*/) {
  const FloatType type = type_of(q, "q");
  const Cache of(cache, type);
  const int64_t place = place_of(position);
  STD_TORCH_CHECK(q.dim() == 2 && q.size(1) == of.size && of.keys > 0 && q.size(0) % of.keys == 0,
                  "q: expected (a multiple of the key heads, size)");
  STD_TORCH_CHECK(0 <= place && place < places && places <= of.room,
                  "position: expected less than places, and at most ", of.room, " of these, got ", place, " of ",
                  places);
  Tensor out = torch::stable::new_empty(q, sizes_of(q));
  if (q.numel() == 0) return out;
  const int64_t count = place + 1, group = q.size(0) / of.keys, products = 2 * group * count * of.size;
  const uint8_t *const queries = bytes_of(q), *const held = bytes_of(cache);
  auto* const to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kProductsPerTask / products);
  torch::stable::parallel_for(0, of.keys, grain, [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch(kernels().attend_scratch(count, of.size));
    for (int64_t head = begin; head < end; ++head) {
      const int64_t first = head * group * of.row;
      kernels().attend({.type = type,
                        .q = queries + first,
                        .queries = group,
                        .keys = held + of.at(0, head, 0),
                        .values = held + of.at(1, head, 0),
                        .count = count,
                        .size = of.size,
                        .scaling = static_cast<float>(scaling),
                        .out = to + first,
                        .scratch = scratch.get()});
    }
  });
  return out;
}

Tensor gated_silu(const Tensor& gate_up) {
  const FloatType type = type_of(gate_up, "gate_up");
  STD_TORCH_CHECK(gate_up.dim() >= 1 && gate_up.size(gate_up.dim() - 1) % 2 == 0, "gate_up: expected (..., 2 n)");
  std::vector<int64_t> sizes = sizes_of(gate_up);
  const int64_t columns = sizes.back() / 2, bytes = columns * float_type_size(type);
  sizes.back() = columns;
  Tensor out = torch::stable::new_empty(gate_up, sizes);
  if (out.numel() == 0) return out;
  const auto* const from = bytes_of(gate_up);
  auto* const to = static_cast<uint8_t*>(out.mutable_data_ptr());
  for_each_row(out.numel() / columns, columns, [&](int64_t row) {
    kernels().gated_silu(type, from + 2 * row * bytes, from + (2 * row + 1) * bytes, to + row * bytes, columns);
  });
  return out;
}

}  // namespace
}  // namespace losa::decoder_step

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("add_rms_norm", TORCH_BOX(&losa::decoder_step::add_rms_norm));
  library.impl("rotate_and_store", TORCH_BOX(&losa::decoder_step::rotate_and_store));
  library.impl("attend_cache", TORCH_BOX(&losa::decoder_step::attend_cache));
  library.impl("gated_silu", TORCH_BOX(&losa::decoder_step::gated_silu));
}
