// CUDA's functions for the emulator: barriers, warp operations, atomics, and other functions that kernels call.
#pragma once

#include "emulator.h"

#define LOSA_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LOSA_SITE) {
  emulator::barrier("__syncthreads", false, file, line);
}
inline int __syncthreads_count(int predicate, LOSA_SITE) {
  return emulator::barrier("__syncthreads_count", predicate != 0, file, line);
}
inline int __syncthreads_or(int predicate, LOSA_SITE) {
  return emulator::barrier("__syncthreads_or", predicate != 0, file, line) > 0;
}
inline int __syncthreads_and(int predicate, LOSA_SITE) {
  return emulator::barrier("__syncthreads_and", predicate == 0, file, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, LOSA_SITE) {
  emulator::exchange("__syncwarp", mask, 0, file, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, LOSA_SITE) {
  const auto& self = emulator::exchange("__shfl_sync", mask, emulator::to_bits(value), file, line);
  const int lane = emulator::lane();
  return emulator::taken_from<T>(self, lane / width * width + (from & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LOSA_SITE) {
  const auto& self = emulator::exchange("__shfl_up_sync", mask, emulator::to_bits(value), file, line);
  const int lane = emulator::lane(), from = lane - static_cast<int>(delta);
  return from < lane / width * width ? value : emulator::taken_from<T>(self, from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LOSA_SITE) {
  const auto& self = emulator::exchange("__shfl_down_sync", mask, emulator::to_bits(value), file, line);
  const int lane = emulator::lane(), from = lane + static_cast<int>(delta);
  return from >= lane / width * width + width ? value : emulator::taken_from<T>(self, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, LOSA_SITE) {
  const auto& self = emulator::exchange("__shfl_xor_sync", mask, emulator::to_bits(value), file, line);
  const int lane = emulator::lane(), from = lane ^ lane_mask;
  return from >= lane / width * width + width ? value : emulator::taken_from<T>(self, from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, LOSA_SITE) {
  const auto& self = emulator::exchange("__ballot_sync", mask, predicate != 0, file, line);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(self.seen[lane]) << lane;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, LOSA_SITE) {
  const auto& self = emulator::exchange("__any_sync", mask, predicate != 0, file, line);
  return std::any_of(self.seen.begin(), self.seen.end(), [](std::uint64_t value) { return value != 0; });
}
inline int __all_sync(unsigned mask, int predicate, LOSA_SITE) {
  const auto& self = emulator::exchange("__all_sync", mask, predicate == 0, file, line);
  return std::all_of(self.seen.begin(), self.seen.end(), [](std::uint64_t value) { return value == 0; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, LOSA_SITE) {
  const auto& self = emulator::exchange("__match_any_sync", mask, emulator::to_bits(value), file, line);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((self.members >> lane & 1) != 0 && self.seen[lane] == emulator::to_bits(value)) bits |= 1u << lane;
  }
  return bits;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, LOSA_SITE) {
  const auto& self = emulator::exchange("__reduce_add_sync", mask, emulator::to_bits(value), file, line);
  T sum = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((self.members >> lane & 1) != 0) sum += emulator::from_bits<T>(self.seen[lane]);
  }
  return sum;
}
// Also of 64-bit numbers, because here addresses in shared memory have 64 bits.
template <class T>
T __reduce_max_sync(unsigned mask, T value, LOSA_SITE) {
  const auto& self = emulator::exchange("__reduce_max_sync", mask, emulator::to_bits(value), file, line);
  for (int lane = 0; lane < 32; ++lane) {
    if ((self.members >> lane & 1) != 0) value = std::max(value, emulator::from_bits<T>(self.seen[lane]));
  }
  return value;
}

// Fibers are not interrupted, so that a read followed by a write is atomic.
template <class T, class Operation>
T losa_atomic(T* address, Operation operation) {
  const T before = *address;
  *address = operation(before);
  return before;
}
template <class T>
T atomicAdd(T* address, T value) {
  return losa_atomic(address, [=](T before) { return static_cast<T>(before + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return losa_atomic(address, [=](T before) { return std::max(before, value); });
}
template <class T>
T atomicMin(T* address, T value) {
  return losa_atomic(address, [=](T before) { return std::min(before, value); });
}
template <class T>
T atomicOr(T* address, T value) {
  return losa_atomic(address, [=](T before) { return before | value; });
}
template <class T>
T atomicAnd(T* address, T value) {
  return losa_atomic(address, [=](T before) { return before & value; });
}
template <class T>
T atomicExch(T* address, T value) {
  return losa_atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return losa_atomic(address, [=](T before) { return before == expected ? value : before; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
inline int __popc(unsigned value) {
  return std::popcount(value);
}
inline int __popcll(unsigned long long value) {
  return std::popcount(value);
}
inline int __clz(int value) {
  return std::countl_zero(static_cast<unsigned>(value));
}
inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}
inline int __float_as_int(float value) {
  return std::bit_cast<int>(value);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline float __int_as_float(int value) {
  return std::bit_cast<float>(value);
}
inline float __uint_as_float(unsigned value) {
  return std::bit_cast<float>(value);
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float a) {
  return 1.0f / a;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
using std::max;
using std::min;

inline cudaError_t cudaMemsetAsync(void* address, int value, std::size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::machine.device;
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  auto& machine = emulator::machine;
  ++machine.attributes_set;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    machine.allowed[{machine.device, reinterpret_cast<const void*>(kernel)}] = value;
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  *blocks = 2;
  return cudaSuccess;
}

namespace losa {

template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class Kernel>
int resident_blocks(Kernel*, int, std::size_t) {
  return emulator::kMostTogether;
}

}  // namespace losa
