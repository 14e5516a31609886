// sparse_linear on the CPU for up to 16 rows of x: lays x out for the kernel, splits the output features over threads
// by the work that their weights make, adds the bias and rounds once.
#include "cpu/sparse_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include "common/bits.h"
#include "common/cpu_isa.h"
#include "common/packing_checks.h"
#include "common/tensor_checks.h"

namespace losa::sparse_linear {
namespace {

using torch::stable::Tensor;

// Below this many (weight, row of x) pairs a second thread costs more than it saves.
constexpr int64_t kPairsPerTask = 1 << 15;

struct FloatValue {
  using Stored = float;
  static float widen(float value) { return value; }
  static float narrow(float value) { return value; }
};

struct Bfloat16Value {
  using Stored = uint16_t;
  static float widen(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  static uint16_t narrow(float value) {  // without a branch, so that it becomes vector code
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
  }
};

struct HalfValue {
  using Stored = uint16_t;
  static float widen(uint16_t bits) { return static_cast<float>(c10::Half(bits, c10::Half::from_bits())); }
  static uint16_t narrow(float value) { return c10::Half(value).x; }
};

template <class Body>
void with_value(FloatType value, const Body& body) {
  if (value == FloatType::kFloat) {
    body(FloatValue{});
  } else if (value == FloatType::kBFloat16) {
    body(Bfloat16Value{});
  } else {
    body(HalfValue{});
  }
}

// Portable kernel: a product for each kept weight and row of x. Eight sums for a chunk of a row, then for all of it,
// are as precise as vector code.
template <class V, int kBatch>
void kept_products(const Task& task, int64_t begin, int64_t end) {
  const Weight& weight = task.weight;
  const auto* const values = reinterpret_cast<const typename V::Stored*>(weight.values);
  const auto* const values_end = reinterpret_cast<const typename V::Stored*>(weight.end);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = weight.offsets != nullptr ? weight.offsets[row] : row * weight.row_length;
    // Offsets from a damaged file must not lead out of the buffer.
    const auto* from = values + std::clamp<int64_t>(first, 0, values_end - values);
    const uint8_t* mask = weight.mask + row * weight.mask_stride;
    float totals[8][kBatch] = {}, sums[8][kBatch] = {};
    const auto add_chunk = [&] {
      for (int i = 0; i < 8; ++i) {
        for (int b = 0; b < kBatch; ++b) totals[i][b] += std::exchange(sums[i][b], 0.0f);
      }
    };
    for (int64_t column = 0; column < weight.columns; column += 8) {
      if (column % 4096 == 0) add_chunk();
      for (unsigned bits = *mask++ & column_bits(weight.columns - column); bits != 0 && from < values_end;
           bits &= bits - 1) {
        const int bit = std::countr_zero(bits);
        const float w = V::widen(*from++);
        const float* x = static_cast<const float*>(task.x) + (column + bit) * kBatch;
        for (int b = 0; b < kBatch; ++b) sums[bit][b] += w * x[b];
      }
    }
    add_chunk();
    for (int64_t b = 0; b < task.batch; ++b) {
      const float low = (totals[0][b] + totals[1][b]) + (totals[2][b] + totals[3][b]);
      const float high = (totals[4][b] + totals[5][b]) + (totals[6][b] + totals[7][b]);
      task.y[b * task.y_stride + row] = low + high;
    }
  }
}

template <class V>
Plan plan_kept_products(int64_t batch) {
  if (batch <= 1) return {kept_products<V, 1>, 1, 1, Layout::kFloat};
  if (batch <= 4) return {kept_products<V, 4>, 4, 1, Layout::kFloat};
  return {kept_products<V, 16>, 16, 1, Layout::kFloat};
}

Plan plan_here(FloatType weight, FloatType x, int64_t batch, bool fixed) {
  static const bool bfloat16_products = has_bfloat16_products();
  const CpuIsa isa = selected_isa();
  if (isa == CpuIsa::kScalar) return plan_scalar(weight, batch);
  if (isa == CpuIsa::kAvx2) return plan_avx2(weight, batch, fixed);
  const bool pairs = bfloat16_products && weight == FloatType::kBFloat16 && x == FloatType::kBFloat16;
  return pairs ? plan_avx512_bfloat16(batch, fixed) : plan_avx512(weight, batch, fixed);
}

// Memory of the calling thread that grows and stays: a call allocates nothing but its result.
float* scratch(int which, int64_t floats) {
  static thread_local std::vector<float> buffers[2];
  std::vector<float>& buffer = buffers[which];
  constexpr size_t kAlign = 64 / sizeof(float);
  if (buffer.size() < static_cast<size_t>(floats) + kAlign) buffer.resize(static_cast<size_t>(floats) + kAlign);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (64 - address % 64) % 64 / sizeof(float);
}

// A matrix of x: rows and columns with strides in elements.
struct Rows {
  const void* data;
  FloatType value;
  int64_t batch, columns, row_stride, column_stride;
};

struct Unchanged {
  template <class V>
  static auto from(typename V::Stored value) {
    return value;
  }
};

struct Widened {
  template <class V>
  static float from(typename V::Stored value) {
    return V::widen(value);
  }
};

// Columns of a row of x as `to` wants them: the first `count` of kColumns exist, the others are 0.
template <class V, class How, int kColumns, class Element>
void copy_columns(const typename V::Stored* row, int64_t stride, int64_t count, Element* to) {
  if (stride == 1 && count == kColumns) {
    for (int64_t c = 0; c < kColumns; ++c) to[c] = How::template from<V>(row[c]);
  } else {
    for (int64_t c = 0; c < kColumns; ++c) to[c] = c < count ? How::template from<V>(row[c * stride]) : Element{0};
  }
}

template <class V, class How, int kLanes, class Element>
void lay_out_lanes(const Rows& x, const Plan& plan, Element* to) {
  constexpr int64_t kColumns = 32;
  static_assert(kColumns % kLanes == 0 && kBlock % kColumns == 0);
  const int64_t padded = (x.columns + kBlock - 1) / kBlock * kBlock, stride = x.column_stride;
  const int64_t apart = plan.rows * kLanes;
  const bool even_odd = plan.layout == Layout::kEvenOdd;
  alignas(64) Element part[kColumns];
  for (int64_t first = 0; first < x.batch; first += plan.rows, to += plan.rows * padded) {
    const int64_t present = std::min(plan.rows, x.batch - first);
    if (present < plan.rows) std::fill_n(to, plan.rows * padded, Element{0});
    for (int64_t b = 0; b < present; ++b) {
      const auto* const row = static_cast<const typename V::Stored*>(x.data) + (first + b) * x.row_stride;
      for (int64_t column = 0; column < padded; column += kColumns) {
        const int64_t left = std::clamp<int64_t>(x.columns - column, 0, kColumns);
        copy_columns<V, How, kColumns>(row + std::min(column, x.columns) * stride, stride, left, part);
        Element* const lanes = to + column * plan.rows + b * kLanes;
        for (int64_t group = 0; group < kColumns / kLanes; ++group) {
          if (even_odd) {
            for (int64_t lane = 0; lane < kLanes; ++lane) {
              lanes[group * apart + lane] = part[(kColumns / kLanes * lane + group) % kColumns];
            }
          } else {
            std::copy_n(part + group * kLanes, kLanes, lanes + group * apart);
          }
        }
      }
    }
  }
}

// One column after another, in tiles that stay in cache both where they are read and where they are written.
template <class V>
void lay_out_columns(const Rows& x, const Plan& plan, float* to) {
  const auto* const data = static_cast<const typename V::Stored*>(x.data);
  const int64_t padded = (x.columns + kBlock - 1) / kBlock * kBlock;
  for (int64_t first = 0; first < x.batch; first += plan.rows, to += padded * plan.rows) {
    const int64_t present = std::min(plan.rows, x.batch - first);
    if (present < plan.rows) std::fill_n(to, padded * plan.rows, 0.0f);
    std::fill(to + x.columns * plan.rows, to + padded * plan.rows, 0.0f);
    for (int64_t tile = 0; tile < x.columns; tile += kBlock) {
      const int64_t columns = std::min(kBlock, x.columns - tile);
      for (int64_t b = 0; b < present; ++b) {
        const auto* const row = data + (first + b) * x.row_stride + tile * x.column_stride;
        float* const column = to + tile * plan.rows + b;
        for (int64_t c = 0; c < columns; ++c) column[c * plan.rows] = V::widen(row[c * x.column_stride]);
      }
    }
  }
}

template <class V>
void lay_out_floats(const Rows& x, const Plan& plan, float* to) {
  if (plan.lanes == 1) {
    lay_out_columns<V>(x, plan, to);
  } else if (plan.lanes == 8) {
    lay_out_lanes<V, Widened, 8>(x, plan, to);
  } else {
    lay_out_lanes<V, Widened, 16>(x, plan, to);
  }
}

const void* lay_out(const Rows& x, const Plan& plan) {
  const bool as_it_is = x.value == FloatType::kFloat && plan.rows == 1 && plan.layout == Layout::kFloat &&
      x.column_stride == 1 && x.columns % kBlock == 0 && x.batch == 1;
  if (as_it_is) return x.data;
  const int64_t passes = (x.batch + plan.rows - 1) / plan.rows;
  float* const to = scratch(0, passes * plan.rows * ((x.columns + kBlock - 1) / kBlock * kBlock));
  if (plan.layout == Layout::kBfloat16) {
    lay_out_lanes<Bfloat16Value, Unchanged, 32>(x, plan, reinterpret_cast<uint16_t*>(to));
  } else {
    with_value(x.value, [&](auto v) { lay_out_floats<decltype(v)>(x, plan, to); });
  }
  return to;
}

// Output features are cut where an equal share of the work ends. A row's work is its values' bytes and its columns:
// about as many columns are decoded in a second as bytes are read.
class Shares {
 public:
  Shares(const Weight& weight, int64_t rows, int64_t values, int64_t value_size)
      : weight_(weight), rows_(rows), values_(values), value_size_(value_size) {}

  int64_t cut(int64_t task, int64_t tasks) const {
    if (task == 0 || task == tasks) return task == 0 ? 0 : rows_;
    const double target = static_cast<double>(before(rows_)) * static_cast<double>(task) / static_cast<double>(tasks);
    int64_t low = 0, high = rows_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (static_cast<double>(before(middle)) < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  int64_t before(int64_t row) const {
    int64_t values = row * weight_.row_length;
    if (weight_.offsets != nullptr) values = row == rows_ ? values_ : weight_.offsets[row];
    return values * value_size_ + row * weight_.columns;
  }

  const Weight& weight_;
  int64_t rows_, values_, value_size_;
};

void finish(const float* sums, int64_t batch, int64_t out, int64_t begin, int64_t end,
            const std::optional<Tensor>& bias, FloatType value, void* y) {
  const auto with_bias = [&](auto b) {
    using B = decltype(b);
    const auto* add = bias.has_value() ? static_cast<const typename B::Stored*>(bias->const_data_ptr()) : nullptr;
    with_value(value, [&](auto v) {
      using V = decltype(v);
      auto* const to = static_cast<typename V::Stored*>(y);
      for (int64_t row = 0; row < batch; ++row) {
        for (int64_t i = row * out + begin, o = begin; o < end; ++i, ++o) {
          to[i] = V::narrow(add != nullptr ? sums[i] + B::widen(add[o]) : sums[i]);
        }
      }
    });
  };
  with_value(bias.has_value() ? float_type(*bias, "bias") : FloatType::kFloat, with_bias);
}

Tensor decode(const Tensor& x, const Tensor& values, const Tensor& bitmask, const std::optional<Tensor>& row_offsets,
              const std::optional<Tensor>& bias, int64_t per_byte) {
  const int64_t dims = x.dim();
  packing::check_sparse_linear(x, values, bitmask, row_offsets, bias);
  const FloatType weight_value = float_type(values, "values"), x_value = float_type(x, "x");
  const int64_t out = bitmask.size(0), columns = x.size(dims - 1), total = values.numel();

  std::vector<int64_t> sizes(static_cast<size_t>(dims));
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) batch *= sizes[static_cast<size_t>(d)] = x.size(d);
  sizes.back() = out;
  STD_TORCH_CHECK(columns > 0, "x: expected at least one column");
  STD_TORCH_CHECK(batch <= kMostRows, "x: expected at most ", kMostRows, " rows, got ", batch);
  Tensor y = torch::stable::new_empty(x, sizes);
  if (batch == 0 || out == 0) return y;

  const bool strided = dims == 2;
  const Tensor source = strided || x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Plan plan = plan_here(weight_value, x_value, batch, per_byte != 0);
  const Rows rows{source.const_data_ptr(),       x_value, batch, columns, strided ? source.stride(0) : columns,
                  strided ? source.stride(1) : 1};
  const auto* const data = static_cast<const uint8_t*>(values.const_data_ptr());
  const auto value_size = static_cast<int64_t>(values.element_size());
  const Weight weight{data,
                      data + total * value_size,
                      static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                      bitmask.size(1),
                      row_offsets.has_value() ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr,
                      total / out,
                      per_byte,
                      columns};
  void* const result = y.mutable_data_ptr();
  float* const sums = x_value == FloatType::kFloat ? static_cast<float*>(result) : scratch(1, batch * out);
  const Task task{weight, lay_out(rows, plan), batch, sums, out};
  const auto run = [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    plan.kernel(task, begin, end);
    if (x_value != FloatType::kFloat || bias.has_value()) finish(sums, batch, out, begin, end, bias, x_value, result);
  };

  const int64_t pairs = out * columns * std::max<int64_t>(1, batch / 2);
  int64_t tasks = pairs / kPairsPerTask;
  if (tasks > 1) tasks = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (tasks <= 1) {
    run(0, out);
    return y;
  }
  const Shares shares(weight, out, total, value_size);
  torch::stable::parallel_for(
      0, tasks, 1, [&](int64_t begin, int64_t end) { run(shares.cut(begin, tasks), shares.cut(end, tasks)); });
  return y;
}

Tensor sparse_linear(const Tensor& x, const Tensor& values, const Tensor& bitmask,
                     const std::optional<Tensor>& row_offsets, const std::optional<Tensor>& bias) {
  return decode(x, values, bitmask, row_offsets, bias, 0);
}

Tensor sparse_linear_nm(const Tensor& x, const Tensor& values, const Tensor& bitmask, int64_t per_byte,
                        const std::optional<Tensor>& bias) {
  packing::check_per_byte(x, values, bitmask, per_byte);
  return decode(x, values, bitmask, std::nullopt, bias, per_byte);
}

}  // namespace

Plan plan_scalar(FloatType value, int64_t batch) {
  Plan plan{};
  with_value(value, [&](auto v) { plan = plan_kept_products<decltype(v)>(batch); });
  return plan;
}

}  // namespace losa::sparse_linear

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("sparse_linear", TORCH_BOX(&losa::sparse_linear::sparse_linear));
  library.impl("sparse_linear_nm", TORCH_BOX(&losa::sparse_linear::sparse_linear_nm));
}
