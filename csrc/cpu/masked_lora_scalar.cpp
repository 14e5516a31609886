// The portable set of kernels; the others are compiled with their instruction set's flags.
#include "cpu/masked_lora_sparse_impl.h"

namespace losa::masked_lora {

void compose_scalar(const Compose& panel) {
  compose(panel);
}

void project_scalar(const Project& panel) {
  project(panel);
}

void sample_scalar(const Sample& panel) {
  sample(panel);
}

void multiply_scalar(const Multiply& product) {
  multiply(product);
}

void split_scalar(const Split& part) {
  split(part);
}

}  // namespace losa::masked_lora
