// A barrier of all blocks of a cooperative launch.
#pragma once

#include "cuda/launch.h"
#include "cuda/machine.h"

namespace losa {

// Whatever any thread of any block wrote before the barrier is there for all threads of all blocks behind it; __ldcg
// reads it past the first-level cache. *counter is zero before the kernel's first barrier, and each barrier adds the
// number of blocks to it. The block that ends last sets it to zero again (last_block).
__device__ __forceinline__ void grid_barrier(int* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const int blocks = static_cast<int>(gridDim.x);
    __threadfence();
    const int before = atomicAdd(counter, 1);
    wait_for_count(counter, (before / blocks + 1) * blocks);
    __threadfence();
  }
  __syncthreads();
}

// True in the block that comes here last, which sees what all other blocks wrote. *finished is zero before, and zero
// again after the last block.
__device__ __forceinline__ bool last_block(int* finished, bool* last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(finished, 1) == static_cast<int>(gridDim.x) - 1;
    if (*last) *finished = 0;
    __threadfence();
  }
  __syncthreads();
  return *last;
}

}  // namespace losa
