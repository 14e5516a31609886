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

#include "common/settings.h"

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

// LOSA_LAUNCH_DEPENDENT: the same for a kernel that may start while the kernel before it on the stream still runs. Each
// of its threads calls wait_for_kernels_before before it reads anything that the kernel before wrote, and before it
// writes anything. It reads weights at once. The environment variable LOSA_DEPENDENT_LAUNCH says where this is done, by
// code for compute capability 9.0 or later: in CUDA graphs (auto, the default), where kernels before it write no
// weights; everywhere (always), which is for measuring; nowhere (0).
#define LOSA_LAUNCH_DEPENDENT(kernel, grid, block, shared_bytes, stream, ...)                                    \
  LOSA_CUDA_CHECK(::losa::launch_dependent((kernel), dim3(grid), dim3(block), static_cast<size_t>(shared_bytes), \
                                           (stream), __VA_ARGS__))

// LOSA_LAUNCH_COOPERATIVE: the same for a kernel whose blocks wait for each other (cuda/grid_barrier.h). There are at
// most resident_blocks() of them, so that all run at the same time.
#define LOSA_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...)                                    \
  LOSA_CUDA_CHECK(::losa::launch_cooperative((kernel), dim3(grid), dim3(block), static_cast<size_t>(shared_bytes), \
                                             (stream), __VA_ARGS__))

// LOSA_DYNAMIC_SHARED(type, name): in a kernel, the shared memory whose size the launch gave, as a type*.
#define LOSA_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char losa_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(losa_dynamic_shared)

namespace losa {

inline bool may_launch_dependent(const void* kernel, cudaStream_t stream) {
  static const int wanted = setting("LOSA_DEPENDENT_LAUNCH", {"auto", "0", "always"});
  const bool never = wanted == 1, always = wanted == 2;
  if (never) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (!always && (cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusActive)) {
    return false;
  }
  // The code's version decides, not the device's: PTX for 8.0 runs on later devices too, and has no wait in it.
  cudaFuncAttributes code{};
  return cudaFuncGetAttributes(&code, kernel) == cudaSuccess && code.ptxVersion >= 90;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_with(cudaLaunchAttribute* attribute, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute != nullptr ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const bool may = may_launch_dependent(reinterpret_cast<const void*>(kernel), stream);
  return launch_with(may ? &early : nullptr, kernel, grid, block, shared_bytes, stream, arguments...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                               cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  return launch_with(&together, kernel, grid, block, shared_bytes, stream, arguments...);
}

// Before a launch with more dynamic shared memory than a kernel may have without asking.
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
