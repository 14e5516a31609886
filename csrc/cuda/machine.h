// Instructions that CUDA C++ has no plain word for. The emulator has its own version of each.
#pragma once

#include "cuda/launch.h"

#if defined(LOSA_EMULATOR)

#include "machine_emulator.h"

#else

namespace losa {

__device__ __forceinline__ float widen_half(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint16_t narrow_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ uint16_t narrow_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// An address in shared memory, in bytes. A number is computed once; compilers form a pointer anew at every access.
using Shared = unsigned;

__device__ __forceinline__ Shared shared_address(const void* pointer) {
  return static_cast<Shared>(__cvta_generic_to_shared(pointer));
}

// Keeps compilers from computing a number again wherever it is used, which may cost more than the register that it
// saves.
template <class Number>
__device__ __forceinline__ void keep_in_register(Number& number) {
  asm volatile("" : "+r"(number));
}

// Adds the number of the lane kDelta below, if there is such a lane. By all lanes.
template <int kDelta>
__device__ __forceinline__ void add_from_below(unsigned& number) {
  asm volatile("{.reg .u32 r; .reg .pred p; shfl.sync.up.b32 r|p, %0, %1, 0, -1; @p add.u32 %0, %0, r;}"
               : "+r"(number)
               : "n"(kDelta));
}

// sum + the products of the four bytes of a and b
__device__ __forceinline__ Shared add_bytes(Shared sum, unsigned a, unsigned b) {
  return __dp4a(a, b, sum);
}

// Two 16-bit values in one register.
__device__ __forceinline__ unsigned pair_of(unsigned low, unsigned high) {
  return __byte_perm(low, high, 0x5410);
}

// The four bytes of `low` and `high`, eight in all, that the last four hex digits of `order` number.
__device__ __forceinline__ unsigned bytes_of(unsigned low, unsigned high, unsigned order) {
  unsigned four;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(four) : "r"(low), "r"(high), "r"(order));
  return four;
}

// By `count` bits, to the left where it is negative.
__device__ __forceinline__ unsigned rotate_right(unsigned bits, int count) {
  return __funnelshift_r(bits, bits, static_cast<unsigned>(count));
}

// The element of kSize bytes (2 or 4) there.
template <int kSize>
__device__ __forceinline__ unsigned load_shared(Shared from) {
  unsigned value;
  if constexpr (kSize == 2) {
    asm volatile("{.reg .u16 v; ld.shared.u16 v, [%1]; cvt.u32.u16 %0, v;}" : "=r"(value) : "r"(from) : "memory");
  } else {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  }
  return value;
}

// The element of kSize bytes (2 or 4) there if `wanted` is not 0, else 0.
template <int kSize>
__device__ __forceinline__ unsigned load_if(unsigned wanted, Shared from) {
  unsigned value;
  if constexpr (kSize == 2) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; mov.u32 %0, 0; @p ld.shared.u16 %0, [%2];}"
                 : "=&r"(value)
                 : "r"(wanted), "r"(from)
                 : "memory");
  } else {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %1, 0; mov.u32 %0, 0; @p ld.shared.u32 %0, [%2];}"
                 : "=&r"(value)
                 : "r"(wanted), "r"(from)
                 : "memory");
  }
  return value;
}

// The element of kSize bytes (2 or 4) there if `unwanted` is 0, else 0.
template <int kSize>
__device__ __forceinline__ unsigned load_unless(unsigned unwanted, Shared from) {
  unsigned value;
  if constexpr (kSize == 2) {
    asm volatile("{.reg .pred p; setp.eq.u32 p, %1, 0; mov.u32 %0, 0; @p ld.shared.u16 %0, [%2];}"
                 : "=&r"(value)
                 : "r"(unwanted), "r"(from)
                 : "memory");
  } else {
    asm volatile("{.reg .pred p; setp.eq.u32 p, %1, 0; mov.u32 %0, 0; @p ld.shared.u32 %0, [%2];}"
                 : "=&r"(value)
                 : "r"(unwanted), "r"(from)
                 : "memory");
  }
  return value;
}

template <int kSize>
__device__ __forceinline__ void store_shared(Shared to, unsigned value) {
  if constexpr (kSize == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "r"(value) : "memory");
  } else {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
  }
}

// 16 bytes to a 16-byte boundary of shared memory.
__device__ __forceinline__ void store_shared_piece(Shared to, uint4 piece) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(piece.x), "r"(piece.y), "r"(piece.z),
               "r"(piece.w)
               : "memory");
}

// A word, or 16 bytes, at a multiple of its own size in global memory that nothing writes while the kernel runs. It is
// read once: L1 does not keep it, and L2 fetches the 256 bytes around it, which other warps want at about the same
// time.
__device__ __forceinline__ unsigned load_once_word(const void* from) {
  unsigned word;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.u32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}

__device__ __forceinline__ uint4 load_once_piece(const void* from) {
  uint4 piece;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "l"(from));
  return piece;
}

// 16 bytes from global to shared memory, both at multiples of 16 bytes; they are there after this thread's wait_copies.
__device__ __forceinline__ void copy_async(Shared to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Closes a group of copies: all copies since the last group.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all but the last kGroups groups.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8) of halves or bfloat16s, in the warp's fragment layout of mma.m16n8k16.
template <bool kHalf>
__device__ __forceinline__ void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// This thread's lane in its warp. It stays in a register, whereas threadIdx.x is read anew at every use.
__device__ __forceinline__ int lane_of_warp() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Bulk copies: one thread requests up to 1 MB from global to shared memory, and a barrier in shared memory (8 bytes,
// aligned) tells when the copy is complete. From compute capability 9.0 on; elsewhere none of these may be called.
__device__ __forceinline__ constexpr bool has_bulk_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

// Makes a barrier for one copy at a time. Before the barrier's first use.
__device__ __forceinline__ void init_barrier(Shared barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
#endif
}

// Between this thread's init_barrier and a copy: another unit of the GPU makes the copies, and has to see the barriers.
__device__ __forceinline__ void publish_barriers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// `bytes` from global to shared memory; both addresses and `bytes` are multiples of 16. Reads of what the shared memory
// held before must be complete: this thread's reads, and the reads of threads that it met at a barrier since.
__device__ __forceinline__ void copy_bulk(Shared to, const void* from, unsigned bytes, Shared barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
#endif
}

// Returns when the barrier's copy is complete: the first, third, ... with parity 0, the second, fourth, ... with parity
// 1.
__device__ __forceinline__ void wait_barrier(Shared barrier, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned done = 0;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (done == 0);
#endif
}

// In a kernel that LOSA_LAUNCH_DEPENDENT started: returns when all kernels before it on the stream are complete and
// what they wrote can be read. In other kernels they are complete from the start.
__device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start, if LOSA_LAUNCH_DEPENDENT starts it, when every block has come here: it may
// take the multiprocessors that this kernel leaves idle.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" :::);
#endif
}

// Returns when *counter is at least `goal`. What another block wrote before it added to *counter can then be read.
__device__ __forceinline__ void wait_for_count(const int* counter, int goal) {
  int found;
  for (;;) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    if (found >= goal) return;
    __nanosleep(32);
  }
}

}  // namespace losa

#endif
