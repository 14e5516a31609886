// Which CPU instruction set to run. CMake compiles every kernels.cpp under csrc/cpu once per instruction set, with that
// set's flags and its name as LOSA_ISA; every other file is compiled for any CPU and chooses at run time.
#pragma once

// In an op's namespace: the op's table of kernels. kernels.cpp defines it as LOSA_ISA::kKernels, and has nothing else
// with external linkage: code with one instruction set's flags must not be linked into code for another.
// In files compiled for any CPU, kernels() is the table of the selected instruction set.
#if defined(LOSA_ISA)
#define LOSA_KERNELS(Table)    \
  namespace LOSA_ISA {         \
  extern const Table kKernels; \
  }
#else

#include "common/settings.h"

namespace losa {

enum class CpuIsa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

inline CpuIsa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2");
  return avx512 ? CpuIsa::kAvx512 : avx2 ? CpuIsa::kAvx2 : CpuIsa::kScalar;
#else
  return CpuIsa::kScalar;
#endif
}

// AVX-512's products of bfloat16 pairs, which not every CPU of level avx512 has.
inline bool has_bfloat16_products() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// The best set this CPU has, or less if the environment variable LOSA_CPU_ISA asks for less.
inline CpuIsa selected_isa() {
  static const CpuIsa best = detect_isa();
  const int wanted = setting("LOSA_CPU_ISA", {"auto", "scalar", "avx2", "avx512"});
  if (wanted == 0) return best;
  const auto isa = static_cast<CpuIsa>(wanted - 1);
  return isa < best ? isa : best;
}

}  // namespace losa

#if defined(__x86_64__)
#define LOSA_KERNELS(Table)                                                                                      \
  namespace scalar {                                                                                             \
  extern const Table kKernels;                                                                                   \
  }                                                                                                              \
  namespace avx2 {                                                                                               \
  extern const Table kKernels;                                                                                   \
  }                                                                                                              \
  namespace avx512 {                                                                                             \
  extern const Table kKernels;                                                                                   \
  }                                                                                                              \
  inline const Table& kernels() {                                                                                \
    const CpuIsa isa = selected_isa();                                                                           \
    return isa == CpuIsa::kAvx512 ? avx512::kKernels : isa == CpuIsa::kAvx2 ? avx2::kKernels : scalar::kKernels; \
  }
#else
#define LOSA_KERNELS(Table)       \
  namespace scalar {              \
  extern const Table kKernels;    \
  }                               \
  inline const Table& kernels() { \
    return scalar::kKernels;      \
  }
#endif

#endif
