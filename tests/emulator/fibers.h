// The threads of the emulator's blocks: fibers on one OS thread, each with a stack of its own and a state that says
// what it waits for.
#pragma once

#if !defined(__x86_64__)
#error "The emulator switches stacks in x86-64 assembly."
#endif

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

namespace emulator {

constexpr std::size_t kStackBytes = 256 << 10;
constexpr int kExitStatus = 3;

constexpr std::size_t kMostTogether = 6;  // blocks of a cooperative launch

enum class State { kReady, kBarrier, kWarp, kOtherBlocks, kCopy, kDone };

struct Copy {
  void* to;
  const void* from;
};

// A barrier in shared memory that tells when a bulk copy is there.
struct CopyBarrier {
  bool published = false;
  bool requested = false;  // a copy that has not happened
  Copy copy{};
  std::size_t bytes = 0;
  unsigned phase = 0, waited = 0;        // copies that are complete, and of these the copies that were waited for
  std::map<const void*, unsigned> seen;  // by each fiber
};

struct Fiber {
  dim3 index, block;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  State state = State::kReady;
  // What it waits for.
  const char* operation = "";
  const char* file = "";
  int line = 0;
  unsigned mask = 0;
  std::uint64_t value = 0;
  std::function<bool()> condition;  // of a wait for other blocks
  // The result of a finished operation: the values of the lanes that took part, or the block's count.
  std::array<std::uint64_t, 32> seen{};
  unsigned members = 0;
  int count = 0;
  bool waited = false;  // for the kernels before
  // Groups of asynchronous copies that have not happened; the last group is still open.
  std::deque<std::vector<Copy>> copies;
};

struct Machine {
  std::mt19937 random{0};
  std::vector<Fiber> fibers;
  std::vector<std::vector<std::size_t>> ready;  // of each warp
  std::function<void()> body;
  std::size_t threads = 0;                                 // of a block
  std::vector<std::vector<unsigned char>> dynamic_shared;  // of each block that runs
  Fiber* current = nullptr;
  unsigned patience = 64;
  bool dependent = false;  // the launch is one of LOSA_LAUNCH_DEPENDENT
  // What the kernels before do, as late as possible: when a thread waits for them.
  std::vector<std::function<void()>> kernels_before;
  bool has_bulk_copies = true;                          // as from compute capability 9.0 on
  std::map<std::uintptr_t, CopyBarrier> copy_barriers;  // of the block, by address
  int device = 0;
  int attributes_set = 0;
  std::map<std::pair<int, const void*>, int> allowed;  // dynamic shared memory of a kernel on a device, in bytes
  void* scheduler_stack_pointer = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
};

inline Machine machine;

inline void seed(unsigned value) {
  machine.random.seed(value);
}

inline void make_ready(Fiber& fiber) {
  const std::size_t index = &fiber - machine.fibers.data();
  fiber.state = State::kReady;
  machine.ready[index / 32].push_back(index);
}

inline void* dynamic_shared() {
  return machine.dynamic_shared[(machine.current - machine.fibers.data()) / machine.threads].data();
}

extern "C" void losa_emulator_switch(void** save, void* to);
asm(R"(
.text
.globl losa_emulator_switch
.type losa_emulator_switch, @function
losa_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size losa_emulator_switch, .-losa_emulator_switch
)");

inline void report(const char* what) {
  std::fprintf(stderr, "emulator: %s in block (%u, %u, %u) of (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
               gridDim.x, gridDim.y, gridDim.z);
  int shown = 0;
  for (const Fiber& fiber : machine.fibers) {
    if (++shown > 64) break;
    std::fprintf(stderr, "  thread (%u, %u, %u) ", fiber.index.x, fiber.index.y, fiber.index.z);
    if (machine.fibers.size() > machine.threads) std::fprintf(stderr, "of block %u ", fiber.block.x);
    if (fiber.state == State::kDone) {
      std::fprintf(stderr, "has returned\n");
    } else if (fiber.state == State::kReady) {
      std::fprintf(stderr, "runs\n");
    } else {
      std::fprintf(stderr, "waits in %s at %s:%d, mask %08x\n", fiber.operation, fiber.file, fiber.line, fiber.mask);
    }
  }
  std::fflush(nullptr);
  std::_Exit(kExitStatus);
}

// From a fiber back to the scheduler; returns when the scheduler runs the fiber again.
inline void yield() {
  Fiber& self = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(self.state == State::kDone ? nullptr : &self.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  losa_emulator_switch(&self.stack_pointer, machine.scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
#endif
  machine.body();
  if (machine.dependent && !machine.current->waited)
    report("a dependent kernel returns without wait_for_kernels_before");
  machine.current->state = State::kDone;
  yield();
  std::abort();  // a finished fiber is not run again
}

inline void run(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = fiber.index;
  blockIdx = fiber.block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
  losa_emulator_switch(&machine.scheduler_stack_pointer, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void prepare(Fiber& fiber, dim3 index, dim3 block) {
  fiber.index = index;
  fiber.block = block;
  fiber.copies.assign(1, {});
  fiber.waited = false;
  make_ready(fiber);
  fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  // The switch pops six registers and returns into fiber_main, whose stack must look as after a call.
  auto* top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

}  // namespace emulator
