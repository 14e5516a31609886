// Kernels with planted faults, each of which the emulator must find, and one without.
#include "cuda/grid_barrier.h"
#include "driver.h"
#include "emulator.h"
#include "machine_emulator.h"

__global__ void reverse(const int* from, int* to, bool with_barrier) {
  __shared__ int values[64];
  values[threadIdx.x] = from[threadIdx.x];
  if (with_barrier) __syncthreads();
  to[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

__global__ void barrier_in_a_branch() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_after_return() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void beyond_global_memory(int* to) {
  to[threadIdx.x] = 1;
}

__global__ void beyond_shared_memory(int* to) {
  __shared__ int values[63];
  values[threadIdx.x] = 1;
  to[threadIdx.x] = values[0];
}

__global__ void beyond_dynamic_shared_memory() {
  LOSA_DYNAMIC_SHARED(int, values);
  values[threadIdx.x] = 1;
}

__global__ void lanes_that_never_come(int* to) {
  if (threadIdx.x % 2 == 0) to[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 2);
  __syncthreads();
}

__global__ void shuffle_from_outside_the_mask(int* to) {
  if (threadIdx.x < 16) to[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 20);
}

__global__ void does_not_wait(int* to) {
  if (threadIdx.x != 5) losa::wait_for_kernels_before();
  to[threadIdx.x] = 1;
}

__global__ void waits(const int* from, int* to, bool early) {
  int value = early ? from[threadIdx.x] : 0;
  losa::wait_for_kernels_before();
  if (!early) value = from[threadIdx.x];
  to[threadIdx.x] = value;
}

__global__ void writes_early(const int* from, int* to) {
  to[threadIdx.x] = from[threadIdx.x];
  losa::wait_for_kernels_before();
}

// Two bulk copies of 128 bytes, one after the other, by thread 0; all threads read both.
enum class Copying { kRight, kNoFence, kUnaligned, kNoWait, kSameParity, kNeverRequested, kTooEarly };

__global__ void bulk_copies(const int* from, int* to, Copying fault) {
  LOSA_DYNAMIC_SHARED(unsigned char, memory);
  const losa::Shared barrier = losa::shared_address(memory), values = barrier + 16;
  if (threadIdx.x == 0) {
    losa::init_barrier(barrier);
    if (fault != Copying::kNoFence) losa::publish_barriers();
  }
  __syncwarp();
  for (unsigned half = 0; half < 2; ++half) {
    if (threadIdx.x == 0 && fault != Copying::kNeverRequested) {
      losa::copy_bulk(values + (fault == Copying::kUnaligned ? 8 : 0), from + 32 * half, 128, barrier);
    }
    if (fault != Copying::kNoWait) losa::wait_barrier(barrier, fault == Copying::kSameParity ? 0 : half);
    to[32 * half + threadIdx.x] = static_cast<int>(losa::load_shared<4>(values + 4 * threadIdx.x));
    if (fault != Copying::kTooEarly) __syncwarp();
  }
}

// Each block gives its part to the one before it, through global memory and through shared memory of its own.
__global__ void pass_on(const int* from, int* between, int* to, int* counter, bool with_barrier, int missing) {
  LOSA_DYNAMIC_SHARED(int, own);
  const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
  own[threadIdx.x] = from[place];
  between[place] = from[place];
  if (static_cast<int>(blockIdx.x) == missing) return;
  if (with_barrier) losa::grid_barrier(counter);
  const unsigned next = (blockIdx.x + 1) % gridDim.x * blockDim.x + threadIdx.x;
  to[place] = between[next] + 100 * own[threadIdx.x];
  if (with_barrier) losa::grid_barrier(counter);
}

// Sum of the block by shuffles, votes and matches, in the shapes that kernels use them.
__global__ void collectives(const int* from, int* to) {
  const int lane = threadIdx.x % 32;
  int sum = from[threadIdx.x];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, delta);
  int* own = to + 8 * threadIdx.x;
  own[0] = sum;
  own[1] = static_cast<int>(__ballot_sync(0xffffffffu, from[threadIdx.x] % 2));
  own[2] = static_cast<int>(__match_any_sync(0xffffffffu, from[threadIdx.x] % 5));
  own[3] = __shfl_up_sync(0xffffffffu, lane, 3);
  own[4] = __shfl_down_sync(0xffffffffu, lane, 3, 16);
  own[5] = __any_sync(0xffffffffu, from[threadIdx.x] == 0) * 2 + __all_sync(0xffffffffu, from[threadIdx.x] >= 0);
  own[6] = __syncthreads_count(from[threadIdx.x] % 3 == 0);
  own[7] = lane < 8 ? __shfl_sync(0x000000ffu, lane, lane + 1, 8) : -1;
}

int main(int argc, char** argv) {
  const Driver driver(argc, argv);
  const auto& fault = driver.command;
  auto from = driver.read<int>("from");
  std::vector<int> to(fault == "beyond_global_memory" ? 63 : 64 * 8, -1);
  const int* in = from.data();
  int* out = to.data();
  if (fault == "without_barrier") LOSA_LAUNCH(reverse, 1, 64, 0, nullptr, in, out, false);
  if (fault == "with_barrier") LOSA_LAUNCH(reverse, 1, 64, 0, nullptr, in, out, true);
  if (fault == "barrier_in_a_branch") LOSA_LAUNCH(barrier_in_a_branch, 1, 64, 0, nullptr);
  if (fault == "barrier_after_return") LOSA_LAUNCH(barrier_after_return, 1, 64, 0, nullptr);
  if (fault == "beyond_global_memory") LOSA_LAUNCH(beyond_global_memory, 1, 64, 0, nullptr, out);
  if (fault == "beyond_shared_memory") LOSA_LAUNCH(beyond_shared_memory, 1, 64, 0, nullptr, out);
  if (fault == "beyond_dynamic_shared_memory") LOSA_LAUNCH(beyond_dynamic_shared_memory, 1, 64, 63 * 4, nullptr);
  if (fault == "lanes_that_never_come") LOSA_LAUNCH(lanes_that_never_come, 1, 64, 0, nullptr, out);
  if (fault == "shuffle_from_outside_the_mask") LOSA_LAUNCH(shuffle_from_outside_the_mask, 1, 64, 0, nullptr, out);
  if (fault == "does_not_wait") LOSA_LAUNCH_DEPENDENT(does_not_wait, 1, 64, 0, nullptr, out);
  if (fault == "waits" || fault == "reads_early" || fault == "writes_early") {
    emulator::write_late(fault == "writes_early" ? to : from);
    if (fault == "writes_early") LOSA_LAUNCH_DEPENDENT(writes_early, 1, 64, 0, nullptr, in, out);
    if (fault != "writes_early") LOSA_LAUNCH_DEPENDENT(waits, 1, 64, 0, nullptr, in, out, fault == "reads_early");
  }
  const char* const copying[] = {"bulk_copies",          "bulk_copy_without_fence",  "bulk_copy_unaligned",
                                 "bulk_copy_not_waited", "bulk_copy_of_same_parity", "bulk_copy_never_requested",
                                 "bulk_copy_too_early"};
  for (int i = 0; i < 7; ++i) {
    if (fault == copying[i]) LOSA_LAUNCH(bulk_copies, 1, 32, 144, nullptr, in, out, static_cast<Copying>(i));
  }
  if (fault == "blocks_together" || fault == "no_grid_barrier" || fault == "a_block_that_never_comes") {
    std::vector<int> between(64, -1), counter(1, 0);
    int *middle = between.data(), *count = counter.data();
    const bool with = fault != "no_grid_barrier";
    const int missing = fault == "a_block_that_never_comes" ? 1 : -1;
    LOSA_LAUNCH_COOPERATIVE(pass_on, 2, 32, 32 * sizeof(int), nullptr, in, middle, out, count, with, missing);
  }
  if (fault == "too_many_blocks_together") {
    LOSA_LAUNCH_COOPERATIVE(pass_on, 7, 32, 32 * sizeof(int), nullptr, in, out, out, out, false, -1);
  }
  if (fault == "collectives") LOSA_LAUNCH(collectives, 1, 64, 0, nullptr, in, out);
  driver.write("to", to);
}
