// The portable set of kernels; the others are compiled with their instruction set's flags.
#include "cpu/masked_lora_impl.h"

namespace losa::masked_lora {

void compose_scalar(const Compose& panel) {
  compose(panel);
}

void project_scalar(const Project& panel) {
  project(panel);
}

}  // namespace losa::masked_lora
