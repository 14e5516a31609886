// Compiled with its instruction set's flags.
#include "cpu/masked_lora_sparse_impl.h"

namespace losa::masked_lora {

void compose_avx2(const Compose& panel) {
  compose(panel);
}

void project_avx2(const Project& panel) {
  project(panel);
}

void sample_avx2(const Sample& panel) {
  sample(panel);
}

void multiply_avx2(const Multiply& product) {
  multiply(product);
}

void split_avx2(const Split& part) {
  split(part);
}

}  // namespace losa::masked_lora
