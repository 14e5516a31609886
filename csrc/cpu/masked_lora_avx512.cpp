// Compiled with its instruction set's flags.
#include "cpu/masked_lora_impl.h"

namespace losa::masked_lora {

void compose_avx512(const Compose& panel) {
  compose(panel);
}

void project_avx512(const Project& panel) {
  project(panel);
}

}  // namespace losa::masked_lora
