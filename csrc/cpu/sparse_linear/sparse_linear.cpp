// sparse_linear on the CPU for up to 16 rows of x: lays x out for the kernel, splits the output features over threads
// by the work that their weights make, adds the bias and rounds once.
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

Tensor decode(const Tensor& x, const Tensor& values, const Tensor& bitmask, const std::optional<Tensor>& row_offsets,
              const std::optional<Tensor>& bias, int64_t per_byte) {
  const int64_t dims = x.dim();
  packing::check_sparse_linear(x, values, bitmask, row_offsets, bias);
  const FloatType weight_type = float_type(values, "values"), x_type = float_type(x, "x");
  const int64_t out = bitmask.size(0), columns = x.size(dims - 1), total = values.numel();

  // x (..., columns) is a matrix (batch, columns); y (..., out) is of its type.
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = out;
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < dims; ++d) batch *= x.size(d);
  STD_TORCH_CHECK(columns > 0, "x: expected at least one column");
  STD_TORCH_CHECK(batch <= kMostBatch, "x: expected at most ", kMostBatch, " rows, got ", batch);
  Tensor y = torch::stable::new_empty(x, sizes);
  if (batch == 0 || out == 0) return y;

  const bool strided = dims == 2;
  const Tensor source = strided || x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Input input{.data = source.const_data_ptr(),
                    .type = x_type,
                    .batch = batch,
                    .columns = columns,
                    .row_stride = strided ? source.stride(0) : columns,
                    .column_stride = strided ? source.stride(1) : 1};
  const auto* const data = static_cast<const uint8_t*>(values.const_data_ptr());
  const auto value_size = static_cast<int64_t>(values.element_size());
  const Weight weight{.values = data,
                      .end = data + total * value_size,
                      .mask = static_cast<const uint8_t*>(bitmask.const_data_ptr()),
                      .mask_stride = bitmask.size(1),
                      .offsets = row_offsets ? static_cast<const int64_t*>(row_offsets->const_data_ptr()) : nullptr,
                      .row_length = total / out,
                      .per_byte = per_byte,
                      .columns = columns};

  // x as the kernel wants it, and fp32 sums: where they are of y's type, y itself.
  const Plan plan = plan_here(weight_type, x_type, batch, per_byte != 0);
  const bool as_it_is = is_laid_out(input, plan), sums_are_y = x_type == FloatType::kFloat;
  const Scratch<float> laid_out(as_it_is ? 0 : laid_out_size(input, plan));
  const Scratch<float> sums_of_y(sums_are_y ? 0 : batch * out);
  if (!as_it_is) lay_out(input, plan, laid_out.get());
  void* const result = y.mutable_data_ptr();
  float* const sums = sums_are_y ? static_cast<float*>(result) : sums_of_y.get();
  const Task task{
      .weight = weight, .x = as_it_is ? input.data : laid_out.get(), .batch = batch, .y = sums, .y_stride = out};

  share_out(weight, out, total, value_size, batch, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    plan.kernel(task, begin, end);
    if (!sums_are_y || bias.has_value()) finish(sums, batch, out, begin, end, bias, x_type, result);
  });
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
}  // namespace losa::sparse_linear

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("sparse_linear", TORCH_BOX(&losa::sparse_linear::sparse_linear));
  library.impl("sparse_linear_nm", TORCH_BOX(&losa::sparse_linear::sparse_linear_nm));
}
