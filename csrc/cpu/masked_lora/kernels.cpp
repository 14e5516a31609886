// The kernels of a masked-LoRA linear: panels.h and products.h.
#include "cpu/masked_lora/kernels.h"

#include "cpu/masked_lora/panels.h"
#include "cpu/masked_lora/products.h"

namespace losa::masked_lora {

const Kernels LOSA_ISA::kKernels = {
    .compose = compose,
    .project = project,
    .split = split,
    .multiply = multiply,
    .sample = sample,
};

}  // namespace losa::masked_lora
