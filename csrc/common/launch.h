// How a .cu file starts a kernel, in three ways of compiling it:
// * for torch, LOSA_TORCH is defined here, and the part of the file that registers operators stands under it;
// * with LOSA_KERNELS_ONLY, nvcc compiles kernels and raw-pointer launchers without torch's headers;
// * with LOSA_EMULATOR, any C++ compiler does the same: emulator.h supplies the CUDA vocabulary and the macros below.
#pragma once

#if defined(LOSA_EMULATOR)

#include "emulator.h"

#else

#include <cuda_runtime.h>

#include <cstdint>

#if defined(LOSA_KERNELS_ONLY)

#define LOSA_CUDA_CHECK(call) static_cast<void>(call)

#else

#define LOSA_TORCH 1
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#define LOSA_CUDA_CHECK(call) STD_CUDA_CHECK(call)

#endif

// LOSA_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...)
#define LOSA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)       \
  do {                                                                    \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__); \
    LOSA_CUDA_CHECK(cudaGetLastError());                                  \
  } while (0)

// LOSA_DYNAMIC_SHARED(type, name): in a kernel, the shared memory whose size the launch gave, as a type*.
#define LOSA_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char losa_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(losa_dynamic_shared)

namespace losa {

// Before a launch with more dynamic shared memory than every kernel may have.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  if (bytes <= 32 << 10) return;
  LOSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

#if defined(LOSA_TORCH)
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace losa

#endif
