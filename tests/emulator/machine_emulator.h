// csrc/cuda/machine.h for the emulator. An asynchronous copy happens as late as possible: when its thread waits for it.
#pragma once

#include <type_traits>

#include "emulator.h"

namespace losa {

inline float widen_half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction + 1024), std::max(exponent, 1) - 25);
  if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
  return bits >> 15 != 0 ? -value : value;
}

inline std::uint16_t narrow_half(float value) {
  const auto sign = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  // Quanta of 2^-24 up to the smallest normal number, then of 2^-10 of the leading power of two.
  int exponent = size == 0 ? -14 : std::max(std::ilogb(size), -14);
  const auto quanta = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<std::uint16_t>(sign | (((exponent + 14) << 10) + quanta));
}

inline std::uint16_t narrow_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

using Shared = std::uintptr_t;

inline Shared shared_address(const void* pointer) {
  return reinterpret_cast<Shared>(pointer);
}

inline Shared add_bytes(Shared sum, unsigned a, unsigned b) {
  for (int shift = 0; shift < 32; shift += 8) sum += (a >> shift & 255u) * (b >> shift & 255u);
  return sum;
}

inline unsigned pair_of(unsigned low, unsigned high) {
  return (low & 0xffffu) | high << 16;
}

inline unsigned bytes_of(unsigned low, unsigned high, unsigned order) {
  if ((order & 0x8888u) != 0) emulator::report("bytes_of has digits up to 7");
  const std::uint64_t eight = low | std::uint64_t{high} << 32;
  unsigned four = 0;
  for (int i = 0; i < 4; ++i) four |= static_cast<unsigned>(eight >> 8 * (order >> 4 * i & 7u) & 0xffu) << 8 * i;
  return four;
}

inline unsigned rotate_right(unsigned bits, int count) {
  return std::rotr(bits, count);
}

template <int kSize>
using Bits = std::conditional_t<kSize == 2, std::uint16_t, std::uint32_t>;

template <int kSize>
unsigned load_if(unsigned wanted, Shared from) {
  return wanted != 0 ? *reinterpret_cast<const Bits<kSize>*>(from) : 0;
}

template <int kSize>
unsigned load_unless(unsigned unwanted, Shared from) {
  return load_if<kSize>(unwanted == 0, from);
}

template <class Number>
void keep_in_register(Number&) {}

template <int kDelta>
void add_from_below(unsigned& number, LOSA_SITE) {
  const unsigned from = __shfl_up_sync(0xffffffffu, number, kDelta, 32, file, line);
  if (emulator::lane() >= kDelta) number += from;
}

inline unsigned load_once_word(const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 4 != 0) emulator::report("a load of a word is not aligned");
  return *static_cast<const unsigned*>(from);
}

inline uint4 load_once_piece(const void* from) {
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) emulator::report("a load of 16 bytes is not aligned");
  return *static_cast<const uint4*>(from);
}

template <int kSize>
void store_shared(Shared to, unsigned value) {
  *reinterpret_cast<Bits<kSize>*>(to) = static_cast<Bits<kSize>>(value);
}

template <int kSize>
unsigned load_shared(Shared from) {
  return *reinterpret_cast<const Bits<kSize>*>(from);
}

inline void store_shared_piece(Shared to, uint4 piece) {
  if (to % 16 != 0) emulator::report("a store of 16 bytes is not aligned");
  *reinterpret_cast<uint4*>(to) = piece;
}

inline void copy_async(Shared to, const void* from) {
  if ((to | reinterpret_cast<std::uintptr_t>(from)) % 16 != 0) emulator::report("an asynchronous copy is not aligned");
  emulator::machine.current->copies.back().push_back({reinterpret_cast<void*>(to), from});
}

inline void commit_copies() {
  emulator::machine.current->copies.emplace_back();
}

template <int kGroups>
void wait_copies() {
  auto& groups = emulator::machine.current->copies;
  while (groups.size() > kGroups + 1) {
    for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.pop_front();
  }
}

inline int lane_of_warp() {
  return emulator::lane();
}

inline bool has_bulk_copies() {
  return emulator::machine.has_bulk_copies;
}

inline emulator::CopyBarrier& barrier_at(Shared address) {
  const auto found = emulator::machine.copy_barriers.find(address);
  if (found == emulator::machine.copy_barriers.end()) emulator::report("a barrier for copies without init_barrier");
  return found->second;
}

inline void init_barrier(Shared barrier) {
  if (barrier % 8 != 0) emulator::report("a barrier for copies is not aligned");
  *reinterpret_cast<std::uint64_t*>(barrier) = 0;  // in shared memory, or the address sanitizer reports it
  if (!emulator::machine.copy_barriers.try_emplace(barrier).second) emulator::report("a barrier for copies twice");
}

inline void publish_barriers() {
  for (auto& [address, barrier] : emulator::machine.copy_barriers) barrier.published = true;
}

inline void complete(emulator::CopyBarrier& barrier) {
  std::memcpy(barrier.copy.to, barrier.copy.from, barrier.bytes);
  barrier.requested = false;
  ++barrier.phase;
}

// The copy happens at once, or when a thread waits for it: as early or as late as possible.
inline void copy_bulk(Shared to, const void* from, unsigned bytes, Shared address) {
  emulator::CopyBarrier& barrier = barrier_at(address);
  if ((to | reinterpret_cast<std::uintptr_t>(from) | bytes) % 16 != 0) emulator::report("a bulk copy is not aligned");
  if (bytes == 0 || bytes >= 1u << 20) emulator::report("a bulk copy of no bytes, or of 1 MB");
  if (!barrier.published) emulator::report("a bulk copy before publish_barriers");
  if (barrier.requested || barrier.waited != barrier.phase) emulator::report("a bulk copy that nothing waits for");
  barrier.requested = true;
  barrier.copy = {reinterpret_cast<void*>(to), from};
  barrier.bytes = bytes;
  if (emulator::machine.random() % 2 == 0) complete(barrier);
  for (emulator::Fiber& fiber : emulator::machine.fibers) {
    if (fiber.state == emulator::State::kCopy) emulator::make_ready(fiber);
  }
}

inline void wait_barrier(Shared address, unsigned parity, LOSA_SITE) {
  emulator::CopyBarrier& barrier = barrier_at(address);
  emulator::Fiber& self = *emulator::machine.current;
  // The wait is for the end of the phase with this parity, which is the current phase or the phase before it.
  while (barrier.phase % 2 == parity) {
    if (barrier.requested) {
      complete(barrier);
      break;
    }
    self.state = emulator::State::kCopy;
    self.operation = "wait_barrier";
    self.file = file;
    self.line = line;
    self.mask = 0;
    emulator::yield();
  }
  unsigned& seen = barrier.seen[&self];
  if (seen == barrier.phase) emulator::report("a wait for a bulk copy that this thread has waited for already");
  seen = barrier.waited = barrier.phase;
}

inline void wait_for_kernels_before() {
  for (const auto& write : std::exchange(emulator::machine.kernels_before, {})) write();
  emulator::machine.current->waited = true;
}

inline void let_next_kernel_start() {}

inline void wait_for_count(const int* counter, int goal, LOSA_SITE) {
  emulator::wait_for_other_blocks([=] { return *counter >= goal; }, "wait_for_count", file, line);
}

// Element `index` of the pairs that a warp operation brought from each lane.
template <bool kHalf>
float fragment(const std::array<std::uint64_t, 32>& seen, int lane, int index) {
  const auto bits = static_cast<std::uint16_t>(seen[lane] >> 16 * index);
  return kHalf ? widen_half(bits) : std::bit_cast<float>(std::uint32_t{bits} << 16);
}

template <bool kHalf>
void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], LOSA_SITE) {
  const auto both = [](unsigned low, unsigned high) { return low | std::uint64_t{high} << 32; };
  // Of each lane: columns 2t, 2t + 1, 2t + 8, 2t + 9 of rows g and g + 8, and the same rows of column g.
  const auto upper = emulator::exchange("multiply_tile", ~0u, both(a[0], a[2]), file, line).seen;
  const auto lower = emulator::exchange("multiply_tile", ~0u, both(a[1], a[3]), file, line).seen;
  const auto right = emulator::exchange("multiply_tile", ~0u, both(b[0], b[1]), file, line).seen;
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    for (int lane = 0; lane < 4; ++lane) {
      for (int k = 0; k < 4; ++k) {
        d[i] += fragment<kHalf>(i < 2 ? upper : lower, 4 * g + lane, k) * fragment<kHalf>(right, 4 * column + lane, k);
      }
    }
  }
}

}  // namespace losa
