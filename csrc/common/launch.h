// How a .cu file starts a kernel. A CPU emulator that defines LOSA_EMULATOR supplies its own LOSA_LAUNCH,
// LOSA_DYNAMIC_SHARED and CUDA vocabulary in emulator.h; kernels and raw-pointer launchers then compile as plain C++,
// without the torch part.
#pragma once

#if defined(LOSA_EMULATOR)

#include "emulator.h"

#else

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

// LOSA_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...)
#define LOSA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)     \
  do {                                                                  \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    STD_CUDA_KERNEL_LAUNCH_CHECK();                                     \
  } while (0)

// LOSA_DYNAMIC_SHARED(type, name): in a kernel, the shared memory whose size the launch gave, as a type*.
#define LOSA_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char losa_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(losa_dynamic_shared)

namespace losa {

// Before a launch with more dynamic shared memory than every kernel may have.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  if (bytes <= 32 << 10) return;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace losa

#endif
