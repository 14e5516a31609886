// Compiled with its instruction set's flags.
#include "cpu/masked_lora_impl.h"

namespace losa::masked_lora {

void compose_avx2(const Compose& panel) {
  compose(panel);
}

void project_avx2(const Project& panel) {
  project(panel);
}

}  // namespace losa::masked_lora
