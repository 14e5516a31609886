// Questions and settings that the host gives to the driver once for each device: a kernel's attributes hold on one
// device only.
#pragma once

#include <atomic>

#include "cuda/launch.h"

namespace losa {

// kKeys numbers >= 0 for each device. Any thread may be the first to compute a number, and several threads may compute
// it.
template <int kKeys = 1>
class PerDevice {
 public:
  // Number `key` of the current device. compute: () -> int.
  template <class Compute>
  int get(int key, Compute&& compute) {
    int device = 0;
    LOSA_CUDA_CHECK(cudaGetDevice(&device));
    if (device >= kMostDevices) return compute();
    std::atomic<int>& known = known_[device][key];  // the number + 1
    const int before = known.load(std::memory_order_acquire);
    if (before > 0) return before - 1;
    const int number = compute();
    known.store(number + 1, std::memory_order_release);
    return number;
  }

 private:
  static constexpr int kMostDevices = 16;
  std::atomic<int> known_[kMostDevices][kKeys] = {};
};

// Before a kernel's first launch on a device: gives the kernel as much shared memory as there is. For kernels whose L1
// cache serves x only; kernels that follow each other can overlap only if they have the same setting. For
// PerDevice::get.
template <class Kernel>
int prefer_shared_memory(Kernel* kernel, int bytes) {
  allow_shared_memory(kernel, bytes);
  LOSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  return 0;
}

#if !defined(LOSA_EMULATOR)

// An attribute of the current device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static PerDevice<> known;
  return known.get(0, [] {
    int device = 0, value = 0;
    LOSA_CUDA_CHECK(cudaGetDevice(&device));
    LOSA_CUDA_CHECK(cudaDeviceGetAttribute(&value, kAttribute, device));
    return value;
  });
}

inline int multiprocessors() {
  return device_attribute<cudaDevAttrMultiProcessorCount>();
}

// How many blocks of a kernel the current device holds at a time.
template <class Kernel>
int resident_blocks(Kernel* kernel, int threads, size_t shared_bytes) {
  int blocks = 0;
  LOSA_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes));
  return multiprocessors() * blocks;
}

#endif

}  // namespace losa
