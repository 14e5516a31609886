// How a launch asks the CUDA runtime to start it early, with a runtime of this file's own.
//   dependent_launch CAPTURING PTX_VERSION -> how many attributes the launch has
#include <cstdio>

#include "cuda/launch.h"

int capturing = 0, ptx_version = 0;

extern "C" {
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* code, const void*) {
  code->ptxVersion = ptx_version;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void** arguments) {
  std::printf("%u\n", config->numAttrs);
  return *static_cast<int*>(arguments[0]) == 7 ? cudaSuccess : cudaErrorInvalidValue;
}
}

void kernel(int) {}

int main(int, char** argv) {
  capturing = std::atoi(argv[1]);
  ptx_version = std::atoi(argv[2]);
  return losa::launch_dependent(kernel, dim3(1), dim3(32), 0, nullptr, 7) == cudaSuccess ? 0 : 1;
}
