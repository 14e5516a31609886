// Expand and compress of AVX-512 VBMI2 in registers. In their zero-masked form they wait for what the destination held
// before on AMD's CPUs (Zen 4: 5 cycles one after another, else 1.5), which no compiler knows; with source and
// destination in one register there is nothing else to wait for.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace losa {
namespace {

inline __attribute__((always_inline)) __m512i expand16(__mmask32 mask, __m512i values) {
  asm("vpexpandw %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
  return values;
}

inline __attribute__((always_inline)) __m512i expand32(__mmask16 mask, __m512i values) {
  asm("vpexpandd %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
  return values;
}

inline __attribute__((always_inline)) __m512i compress16(__mmask32 mask, __m512i values) {
  asm("vpcompressw %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
  return values;
}

inline __attribute__((always_inline)) __m512i compress8(__mmask64 mask, __m512i values) {
  asm("vpcompressb %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
  return values;
}

inline __attribute__((always_inline)) __m512i compress32(__mmask16 mask, __m512i values) {
  asm("vpcompressd %0, %0 %{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
  return values;
}

}  // namespace
}  // namespace losa
