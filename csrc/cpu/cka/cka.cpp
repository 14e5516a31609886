// Centred Grams on the CPU: slices of the features in parallel, partial Grams in fp64, their sum in a fixed order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/tensor_checks.h"
#include "cpu/cka/kernels.h"
#include "cpu/scratch.h"

namespace losa::cka {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostSamples = 256;
constexpr int64_t kPanelsPerSlice = 4;
// Multiply-adds below which a second thread costs more than it saves.
constexpr int64_t kWorkPerTask = 1 << 19;
constexpr int64_t kMostSlices = 32;  // of one layer
// Partial Grams of as many layers are kept at a time.
constexpr int64_t kPartialBytes = 4 << 20;

// A slice and a Gram depend on the layer's own shape only: neither on the number of threads nor on the other layers.
Tensor gram(const Tensor& features) {
  const FloatType type = float_type(features, "features");
  STD_TORCH_CHECK(features.dim() == 3 && 1 <= features.size(1) && features.size(1) <= kMostSamples,
                  "features: expected (layers, 1..", kMostSamples, " samples, columns)");
  const int64_t layers = features.size(0), samples = features.size(1), columns = features.size(2);
  STD_TORCH_CHECK(features.stride(2) == 1 || columns <= 1, "features: expected dense rows");
  Tensor grams = torch::stable::new_zeros(features, {layers, samples, samples}, ScalarType::Double);

  const auto add_slice = kernels().add_slice;
  const int64_t panel = panel_columns(samples), panels = (columns + panel - 1) / panel;
  const int64_t width = panel * std::max(kPanelsPerSlice, (panels + kMostSlices - 1) / kMostSlices);
  const int64_t slices = (columns + width - 1) / width, size = samples * samples;
  if (layers == 0 || slices == 0) return grams;
  const int64_t together = std::min(layers, std::max<int64_t>(1, kPartialBytes / (8 * slices * size)));
  const Scratch<double> partial(together * slices * size);
  const int64_t grain = std::max<int64_t>(1, kWorkPerTask / (size * std::min(width, columns)));

  const auto* from = static_cast<const uint8_t*>(features.const_data_ptr());
  const int64_t bytes = float_type_size(type);
  auto* to = static_cast<double*>(grams.mutable_data_ptr());
  for (int64_t first = 0; first < layers; first += together, to += together * size) {
    const int64_t count = std::min(together, layers - first);
    torch::stable::parallel_for(0, count * slices, grain, [&](int64_t begin, int64_t end) {
      const Scratch<float> scratch(slice_scratch(samples));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t layer = first + task / slices, start = task % slices * width;
        double* sums = partial.get() + task * size;
        std::fill_n(sums, size, 0.0);
        add_slice({.features = from + bytes * (layer * features.stride(0) + start),
                   .type = type,
                   .stride = features.stride(1),
                   .samples = samples,
                   .columns = std::min(width, columns - start),
                   .gram = sums,
                   .scratch = scratch.get()});
      }
    });
    for (int64_t layer = 0; layer < count; ++layer) {
      double* gram = to + layer * size;
      for (int64_t slice = 0; slice < slices; ++slice) {
        const double* sums = partial.get() + (layer * slices + slice) * size;
        for (int64_t i = 0; i < samples; ++i) {
          for (int64_t j = i; j < samples; ++j) gram[i * samples + j] += sums[i * samples + j];
        }
      }
      for (int64_t i = 0; i < samples; ++i) {
        for (int64_t j = 0; j < i; ++j) gram[i * samples + j] = gram[j * samples + i];
      }
    }
  }
  return grams;
}

}  // namespace
}  // namespace losa::cka

STABLE_TORCH_LIBRARY_IMPL(losa, CPU, library) {
  library.impl("gram", TORCH_BOX(&losa::cka::gram));
}
