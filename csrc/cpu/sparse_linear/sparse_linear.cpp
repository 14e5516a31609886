// sparse_linear and dense_linear on the CPU for up to 16 rows of x: lays x out for the kernel, splits the output
// features over threads by the work that their weights make, adds the bias and rounds once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/packing_checks.h"
#include "common/tensor_checks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/simd/float_lanes.h"
#include "cpu/sparse_linear/input_layout.h"
#include "cpu/sparse_linear/kernels.h"

namespace losa::sparse_linear {
namespace {

using torch::stable::Tensor;

// Below this many (weight, row of x) pairs a second thread costs more than it saves.
constexpr int64_t kPairsPerTask = 1 << 15;

Plan plan_here(FloatType weight, FloatType x, int64_t batch, bool fixed) {
#if defined(__x86_64__)
  static const bool bfloat16_products = has_bfloat16_products();
  const bool pairs = bfloat16_products && weight == FloatType::kBFloat16 && x == FloatType::kBFloat16;
  if (pairs && selected_isa() == CpuIsa::kAvx512) return plan_bfloat16_pairs(batch, fixed);
#else
  static_cast<void>(x);
#endif
  return kernels().plan(weight, batch, fixed);
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

// y (batch, out) of a type: sums (batch, out) and bias for output features [begin, end), rounded once.
void finish(const float* sums, int64_t batch, int64_t out, int64_t begin, int64_t end,
            const std::optional<Tensor>& bias, FloatType type, void* y) {
  const auto with_bias = [&](auto bias_type) {
    using Bias = decltype(bias_type);
    const auto* add = bias.has_value() ? static_cast<const typename Bias::Stored*>(bias->const_data_ptr()) : nullptr;
    with_type(type, [&](auto y_type) {
      using Y = decltype(y_type);
      auto* const to = static_cast<typename Y::Stored*>(y);
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = b * out + begin, feature = begin; feature < end; ++i, ++feature) {
          to[i] = Y::narrow(add != nullptr ? sums[i] + Bias::widen(add[feature]) : sums[i]);
        }
      }
    });
  };
  with_type(bias.has_value() ? float_type(*bias, "bias") : FloatType::kFloat, with_bias);
}

// body(begin, end) for ranges of output features that are about equally much work, in parallel if there is enough.
template <class Body>
void share_out(const Weight& weight, int64_t out, int64_t values, int64_t value_size, int64_t batch, const Body& body) {
  const int64_t pairs = out * weight.columns * std::max<int64_t>(1, batch / 2);
  int64_t tasks = pairs / kPairsPerTask;
  if (tasks > 1) tasks = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (tasks <= 1) return body(0, out);
  const Shares shares(weight, out, values, value_size);
  torch::stable::parallel_for(
      0, tasks, 1, [&](int64_t begin, int64_t end) { body(shares.cut(begin, tasks), shares.cut(end, tasks)); });
}

// x (..., columns) as a matrix (batch, columns); `source` keeps its memory.
struct Rows {
  Tensor source;
  Input input;
};

Rows rows_of(const Tensor& x) {
  const int64_t dims = x.dim(), columns = x.size(dims - 1);
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) batch *= x.size(d);
  STD_TORCH_CHECK(columns > 0, "x: expected at least one column");
  STD_TORCH_CHECK(batch <= kMostBatch, "x: expected at most ", kMostBatch, " rows, got ", batch);
  const bool strided = dims == 2;
  const Tensor source = strided || x.is_contiguous() ? x : torch::stable::contiguous(x);
  return {source,
          {.data = source.const_data_ptr(),
           .type = float_type(x, "x"),
           .batch = batch,
           .columns = columns,
           .row_stride = strided ? source.stride(0) : columns,
           .column_stride = strided ? source.stride(1) : 1}};
}

// y (..., out) in x's type, of a weight with `total` values of `type`.
Tensor multiply(const Tensor& x, const Weight& weight, int64_t out, int64_t total, FloatType type,
                const std::optional<Tensor>& bias) {
  const Rows rows = rows_of(x);
  const Input& input = rows.input;
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = out;
  Tensor y = torch::stable::new_empty(x, sizes);
  if (input.batch == 0 || out == 0) return y;

  // x as the kernel wants it, and fp32 sums: where they are of y's type, y itself.
  const Plan plan = plan_here(type, input.type, input.batch, weight.per_byte != 0);
  const bool as_it_is = is_laid_out(input, plan), sums_are_y = input.type == FloatType::kFloat;
  const Scratch<float> laid_out(as_it_is ? 0 : laid_out_size(input, plan));
  const Scratch<float> sums_of_y(sums_are_y ? 0 : input.batch * out);
  if (!as_it_is) lay_out(input, plan, laid_out.get());
  void* const result = y.mutable_data_ptr();
  float* const sums = sums_are_y ? static_cast<float*>(result) : sums_of_y.get();
  const Task task{
      .weight = weight, .x = as_it_is ? input.data : laid_out.get(), .batch = input.batch, .y = sums, .y_stride = out};

  const int64_t value_size = type == FloatType::kFloat ? 4 : 2;
  share_out(weight, out, total, value_size, input.batch, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    plan.kernel(task, begin, end);
    if (!sums_are_y || bias.has_value()) finish(sums, input.batch, out, begin, end, bias, input.type, result);
  });
  return y;
}

Tensor decode(const Tensor& x, const Tensor& values, const Tensor& bitmask, const std::optional<Tensor>& row_offsets,
              const std::optional<Tensor>& bias, int64_t per_byte) {
  packing::check_sparse_linear(x, values, bitmask, row_offsets, bias);
  const FloatType type = float_type(values, "values");
  const int64_t out = bitmask.size(0), total = values.numel();
  const auto* const data = static_cast<const uint8_t*>(values.const_data_ptr());
  const Weight weight{.values = data,
                      .end = data + total * static_cast<int64_t>(values.element_size()),
                      .mask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                      .mask_stride = bitmask.size(1),
                      .offsets = row_offsets ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr,
                      .row_length = out > 0 ? total / out : 0,
                      .per_byte = per_byte,
                      .columns = x.size(x.dim() - 1)};
  return multiply(x, weight, out, total, type, bias);
}

// A packed weight of which nothing is pruned: all its rows have one mask of ones.
Tensor dense_linear(const Tensor& x, const Tensor& matrix, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous(), "weight: expected a contiguous tensor (out, in)");
  const int64_t out = matrix.size(0), columns = matrix.size(1);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == columns, "x: expected (..., ", columns, ")");
  STD_TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == out && bias->is_contiguous()),
                  "bias: expected a contiguous tensor (", out, ",)");
  const FloatType type = float_type(matrix, "weight");
  const int64_t words = (columns + kBlock - 1) / kBlock * (kBlock / 8);
  const Scratch<uint8_t> ones(words);
  std::fill_n(ones.get(), words, uint8_t{0xff});
  const auto* const data = static_cast<const uint8_t*>(matrix.const_data_ptr());
  const Weight weight{.values = data,
                      .end = data + matrix.numel() * static_cast<int64_t>(matrix.element_size()),
                      .mask = ones.get(),
                      .mask_stride = 0,
                      .offsets = nullptr,
                      .row_length = columns,
                      .per_byte = 8,
                      .columns = columns};
  return multiply(x, weight, out, matrix.numel(), type, bias);
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
}  // namespace losa::sparse_linear

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("sparse_linear", TORCH_BOX(&losa::sparse_linear::sparse_linear));
  library.impl("sparse_linear_nm", TORCH_BOX(&losa::sparse_linear::sparse_linear_nm));
  library.impl("dense_linear", TORCH_BOX(&losa::sparse_linear::dense_linear));
}
