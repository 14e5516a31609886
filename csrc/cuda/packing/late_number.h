// A number that kernels compute and the host waits for.
#pragma once

#include "cuda/launch.h"

namespace losa {

// Kernels of `stream` write it to memory of the host that the device sees. The memory's owner outlives this object. If
// nothing has waited for the number, the destructor waits for the stream: after an exception the memory could otherwise
// go to its next user while a kernel still writes to it.
class LateNumber {
 public:
  LateNumber(const int64_t* memory, cudaStream_t stream) : memory_(memory), stream_(stream) {
    LOSA_CUDA_CHECK(cudaEventCreateWithFlags(&written_, cudaEventDisableTiming));
  }
  ~LateNumber() {
    if (!known_) static_cast<void>(cudaStreamSynchronize(stream_));
    static_cast<void>(cudaEventDestroy(written_));
  }
  LateNumber(const LateNumber&) = delete;
  LateNumber& operator=(const LateNumber&) = delete;

  // To be called when all kernels that write the number have been launched.
  void launched() { LOSA_CUDA_CHECK(cudaEventRecord(written_, stream_)); }

  // Waits for the kernels launched until then, not for later kernels.
  int64_t wait() {
    LOSA_CUDA_CHECK(cudaEventSynchronize(written_));
    known_ = true;
    return *memory_;
  }

 private:
  const int64_t* memory_;
  cudaStream_t stream_;
  cudaEvent_t written_ = nullptr;
  bool known_ = false;
};

}  // namespace losa
