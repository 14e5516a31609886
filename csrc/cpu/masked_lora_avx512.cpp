// Compiled with its instruction set's flags.
#include "cpu/masked_lora_sparse_impl.h"

namespace losa::masked_lora {

void compose_avx512(const Compose& panel) {
  compose(panel);
}

void project_avx512(const Project& panel) {
  project(panel);
}

void sample_avx512(const Sample& panel) {
  sample(panel);
}

void multiply_avx512(const Multiply& product) {
  multiply(product);
}

void split_avx512(const Split& part) {
  split(part);
}

}  // namespace losa::masked_lora
