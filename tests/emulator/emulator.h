// Runs CUDA kernels on the host, so that their logic is tested without a GPU and under sanitizers.
//
// csrc/cuda/launch.h includes this file where LOSA_EMULATOR is defined. Blocks run one after another; the blocks of a
// cooperative launch run together. A block's threads are fibers on one OS thread, each with a stack of its own. A fiber
// runs until it reaches a barrier, a warp operation or a wait for other blocks. Which fiber runs next is drawn from a
// seed, and one warp gets far ahead of the other warps, so that a result that depends on the order (a missing barrier)
// changes with the seed.
//
// The emulator reports, with exit status 3: a barrier that not all threads of the block reach, or reach at different
// lines; a warp operation that waits for lanes which never come; a wait for something that no block will do; a shuffle
// from a lane that takes no part; a bulk copy that nothing waits for, or a second wait for the same copy.
//
// Shared memory is a static array. For LOSA_DYNAMIC_SHARED it is a heap block of the exact size, filled with junk. The
// address sanitizer sees accesses beyond either.
//
// Not modelled: several threads between barriers at once, memory ordering, textures.
#pragma once

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static
#define __align__(bytes) __attribute__((aligned(bytes)))

#define LOSA_CUDA_CHECK(call) static_cast<void>(call)
#define LOSA_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::emulator::dynamic_shared())
#define LOSA_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                      \
  do {                                                                                   \
    static_cast<void>(stream); /* launches run to their end, one after another */        \
    ::emulator::check_shared(reinterpret_cast<const void*>(kernel), (shared_bytes));     \
    ::emulator::launch((grid), (block), (shared_bytes), [=] { (kernel)(__VA_ARGS__); }); \
  } while (0)

#define LOSA_LAUNCH_DEPENDENT(kernel, grid, block, shared_bytes, stream, ...)            \
  do {                                                                                   \
    static_cast<void>(stream);                                                           \
    ::emulator::check_shared(reinterpret_cast<const void*>(kernel), (shared_bytes));     \
    ::emulator::machine.dependent = true;                                                \
    ::emulator::launch((grid), (block), (shared_bytes), [=] { (kernel)(__VA_ARGS__); }); \
    ::emulator::machine.dependent = false;                                               \
  } while (0)

#define LOSA_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...)                                \
  do {                                                                                                         \
    static_cast<void>(stream);                                                                                 \
    ::emulator::launch((grid), (block), (shared_bytes), [=] { (kernel)(__VA_ARGS__); }, /*cooperative=*/true); \
  } while (0)

namespace emulator {

inline bool release_barrier(Fiber* all) {
  int count = 0;
  for (std::size_t i = 0; i < machine.threads; ++i) {
    const Fiber& fiber = all[i];
    if (fiber.state != State::kBarrier || fiber.line != all[0].line || std::strcmp(fiber.file, all[0].file) != 0 ||
        std::strcmp(fiber.operation, all[0].operation) != 0) {
      return false;
    }
    count += fiber.value != 0;
  }
  for (std::size_t i = 0; i < machine.threads; ++i) {
    all[i].count = count;
    make_ready(all[i]);
  }
  return true;
}

// Releases the barrier of every block whose threads have all come to one.
inline bool release_barriers() {
  bool released = false;
  for (std::size_t i = 0; i < machine.fibers.size(); i += machine.threads) {
    released = release_barrier(&machine.fibers[i]) || released;
  }
  return released;
}

// Releases the threads whose wait for other blocks is over.
inline bool release_waits() {
  bool released = false;
  for (Fiber& fiber : machine.fibers) {
    if (fiber.state != State::kOtherBlocks || !fiber.condition()) continue;
    make_ready(fiber);
    released = true;
  }
  return released;
}

// A random thread of the favoured warp while it has threads to run, for about `patience` turns; then of any warp.
inline bool pick(std::size_t* warp, std::size_t* fiber) {
  auto& ready = machine.ready;
  if (machine.random() % machine.patience == 0 || ready[*warp].empty()) {
    std::vector<std::size_t> candidates;
    for (std::size_t i = 0; i < ready.size(); ++i) {
      if (!ready[i].empty()) candidates.push_back(i);
    }
    if (candidates.empty()) return false;
    *warp = candidates[machine.random() % candidates.size()];
  }
  auto& own = ready[*warp];
  std::swap(own[machine.random() % own.size()], own.back());
  *fiber = own.back();
  own.pop_back();
  return true;
}

// Runs the blocks whose fibers are prepared to their end.
inline void run_blocks() {
  const auto is_done = [](const Fiber& fiber) { return fiber.state == State::kDone; };
  const bool several = machine.fibers.size() > machine.threads;
  std::size_t warp = 0, fiber = 0;
  for (;;) {
    while (pick(&warp, &fiber)) {
      run(machine.fibers[fiber]);
      // Some blocks go on while others have not come to their barrier yet.
      if (several && machine.random() % 64 == 0) {
        release_waits();
        release_barriers();
      }
    }
    if (std::all_of(machine.fibers.begin(), machine.fibers.end(), is_done)) break;
    const bool waits = release_waits(), barriers = release_barriers();
    if (!waits && !barriers) report("threads wait for each other (a divergent barrier or warp operation)");
  }
  for (const auto& [address, barrier] : machine.copy_barriers) {
    if (barrier.requested || barrier.waited != barrier.phase) report("a bulk copy that nothing waits for");
  }
}

// A kernel that has not requested more gets at most 48 KB. It must request it on every device.
inline void check_shared(const void* kernel, std::size_t bytes) {
  const auto found = machine.allowed.find({machine.device, kernel});
  const std::size_t allowed = found == machine.allowed.end() ? 48 << 10 : static_cast<std::size_t>(found->second);
  if (bytes <= allowed) return;
  std::fprintf(stderr, "emulator: %zu bytes of shared memory, %zu are allowed on this device\n", bytes, allowed);
  std::_Exit(kExitStatus);
}

inline void resize(std::size_t fibers) {
  while (machine.fibers.size() > fibers) {
    munmap(machine.fibers.back().stack, kStackBytes);
    machine.fibers.pop_back();
  }
  while (machine.fibers.size() < fibers) {
    Fiber fiber;
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) std::abort();
    fiber.stack = static_cast<char*>(stack);
    machine.fibers.push_back(fiber);
  }
  machine.ready.resize((fibers + 31) / 32);
}

inline void launch(dim3 grid, dim3 block, std::size_t shared_bytes, std::function<void()> body,
                   bool cooperative = false) {
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  const std::size_t all = std::size_t{grid.x} * grid.y * grid.z;
  constexpr std::size_t kMostShared = 163 << 10;  // of a block on sm_80
  if (threads == 0 || threads > 1024 || all == 0 || grid.y > 65535 || grid.z > 65535 || shared_bytes > kMostShared ||
      (cooperative && (all > kMostTogether || threads % 32 != 0))) {
    std::fprintf(stderr, "emulator: invalid launch\n");
    std::_Exit(kExitStatus);
  }
  gridDim = grid;
  machine.patience = 64u << machine.random() % 8;  // from a few lines of code to a whole loop ahead of other warps
  blockDim = block;
  machine.body = std::move(body);
  machine.threads = threads;
  const std::size_t together = cooperative ? all : 1;
  resize(threads * together);
  std::vector<std::size_t> blocks(all);
  std::iota(blocks.begin(), blocks.end(), std::size_t{0});
  std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (std::size_t first = 0; first < all; first += together) {
    machine.copy_barriers.clear();
    machine.dynamic_shared.assign(together, std::vector<unsigned char>(shared_bytes, 0xcb));
    for (std::size_t i = 0; i < threads * together; ++i) {
      const std::size_t thread = i % threads, index = blocks[first + i / threads];
      prepare(machine.fibers[i], dim3(thread % block.x, thread / block.x % block.y, thread / block.x / block.y),
              dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y));
    }
    run_blocks();
  }
}

// Waits until `condition` holds, which other blocks bring about.
inline void wait_for_other_blocks(std::function<bool()> condition, const char* operation, const char* file, int line) {
  if (condition()) return;
  Fiber& self = *machine.current;
  self.state = State::kOtherBlocks;
  self.operation = operation;
  self.file = file;
  self.line = line;
  self.mask = 0;
  self.condition = std::move(condition);
  yield();
}

inline int barrier(const char* operation, bool value, const char* file, int line) {
  Fiber& self = *machine.current;
  self.state = State::kBarrier;
  self.operation = operation;
  self.file = file;
  self.line = line;
  self.mask = 0;
  self.value = value;
  yield();
  return self.count;
}

// Waits for the lanes of `mask` in the same operation. Then self.seen holds the lanes' values.
inline Fiber& exchange(const char* operation, unsigned mask, std::uint64_t value, const char* file, int line) {
  Fiber& self = *machine.current;
  const std::size_t own = &self - machine.fibers.data(), first = own / 32 * 32;
  if ((mask >> (own - first) & 1) == 0) report("a thread is not in the mask of its own warp operation");
  self.state = State::kWarp;
  self.operation = operation;
  self.file = file;
  self.line = line;
  self.mask = mask;
  self.value = value;
  unsigned members = 0;
  bool complete = true;
  const std::size_t lanes = std::min<std::size_t>(32, machine.fibers.size() - first);
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    const Fiber& other = machine.fibers[first + lane];
    if ((mask >> lane & 1) == 0 || other.state == State::kDone) continue;
    members |= 1u << lane;
    complete = complete && other.state == State::kWarp && other.mask == mask &&
        std::strcmp(other.operation, operation) == 0 && other.line == line && std::strcmp(other.file, file) == 0;
  }
  if (complete) {
    std::array<std::uint64_t, 32> seen{};
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      if (members >> lane & 1) seen[lane] = machine.fibers[first + lane].value;
    }
    for (std::size_t lane = 0; lane < lanes; ++lane) {
      if ((members >> lane & 1) == 0) continue;
      Fiber& other = machine.fibers[first + lane];
      other.seen = seen;
      other.members = members;
      make_ready(other);
    }
  }
  yield();
  return self;
}

// The kernels before the next dependent launch write `memory`. It holds junk until the launch's first thread waits for
// these kernels.
template <class T>
void write_late(std::vector<T>& memory) {
  machine.kernels_before.push_back(
      [&memory, values = memory] { std::copy(values.begin(), values.end(), memory.begin()); });
  std::fill_n(reinterpret_cast<unsigned char*>(memory.data()), memory.size() * sizeof(T), 0xff);
}

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() {
  return static_cast<int>((machine.current - machine.fibers.data()) % 32);
}

template <class T>
T taken_from(const Fiber& self, int lane) {
  if ((self.members >> lane & 1) == 0) report("a shuffle reads a lane that takes no part");
  return from_bits<T>(self.seen[lane]);
}

}  // namespace emulator

#include "vocabulary.h"
