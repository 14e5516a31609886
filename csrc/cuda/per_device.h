// What the host asks the driver, or tells it, once for each device: attributes of a kernel hold on one device only.
#pragma once

#include <atomic>

#include "common/launch.h"

namespace losa {

// Numbers from 0 on, `kKeys` of them for each device. Any thread may be the first to compute one, and several may.
template <int kKeys = 1>
class PerDevice {
 public:
  // For the current device. compute: () -> int.
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

#if defined(LOSA_TORCH)
// Of the current device.
inline int multiprocessors() {
  static PerDevice<> counts;
  return counts.get(0, [] {
    int device = 0, count = 0;
    LOSA_CUDA_CHECK(cudaGetDevice(&device));
    LOSA_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
  });
}
#endif

}  // namespace losa
