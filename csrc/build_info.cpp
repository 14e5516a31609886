// The module losa_kernels._build_info: what this build contains. Plain values, no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  for (char c : text + ",") {
    if (c != ',') {
      part += c;
    } else if (!part.empty()) {
      parts.push_back(part);
      part.clear();
    }
  }
  return parts;
}

std::string torch_target() {
  const unsigned long long target = TORCH_TARGET_VERSION;
  return std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
}

}  // namespace

PYBIND11_MODULE(_build_info, module) {
  const std::string cuda = LOSA_CUDA_COMPILER;
  module.attr("version") = LOSA_VERSION;
  module.attr("schemas") = LOSA_SCHEMAS;
  module.attr("torch_headers") = TORCH_VERSION;
  module.attr("torch_target") = torch_target();
  module.attr("compiler") = LOSA_CXX_COMPILER;
  module.attr("cuda_built") = !cuda.empty();
  module.attr("cuda") = cuda.empty() ? std::nullopt : std::optional<std::string>(cuda);
  module.attr("cuda_archs") = split(LOSA_CUDA_ARCHS);
  module.attr("cpu_isa_compiled") = split(LOSA_CPU_ISAS);
  // What this CPU and LOSA_CPU_ISA allow, of what is compiled in (listed from the least to the best).
  module.def("cpu_isa_selected", [compiled = split(LOSA_CPU_ISAS)] {
    const auto allowed = static_cast<std::size_t>(losa::selected_isa());
    return compiled[std::min(allowed, compiled.size() - 1)];
  });
}
