// Rows of packed values. Elements of 1 and 8 bytes are packed one after another on every CPU.
#include "cpu/packing/kernels.h"

#include "cpu/packing/rows_scalar.h"
#if defined(__AVX512VBMI2__)
#include "cpu/packing/rows_avx512.h"
#elif defined(__AVX2__)
#include "cpu/packing/rows_avx2.h"
#endif

namespace losa::packing {

const Kernels LOSA_ISA::kKernels = {
    .pack_row8 = pack_row_scalar<uint8_t>,
#if defined(__AVX2__)
    .pack_row16 = pack_row<Bits16>,
    .pack_row32 = pack_row<Bits32>,
#else
    .pack_row16 = pack_row_scalar<uint16_t>,
    .pack_row32 = pack_row_scalar<uint32_t>,
#endif
    .pack_row64 = pack_row_scalar<uint64_t>,
    .unpack_row8 = unpack_row_scalar<uint8_t>,
#if defined(__AVX2__)
    .unpack_row16 = unpack_row<Bits16>,
    .unpack_row32 = unpack_row<Bits32>,
#else
    .unpack_row16 = unpack_row_scalar<uint16_t>,
    .unpack_row32 = unpack_row_scalar<uint32_t>,
#endif
    .unpack_row64 = unpack_row_scalar<uint64_t>,
};

}  // namespace losa::packing
