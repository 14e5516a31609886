// The kernels of products.cpp. Tokens lie side by side in a register, so that an entry of the weight multiplies many of
// them, whatever its neighbours are. With tokens in registers and a block of features in cache, a multiply-add costs
// one load, as much as in a dense product at its best.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <type_traits>

#include "cpu/masked_lora/kernels.h"
#include "cpu/masked_lora/panels.h"
#include "cpu/simd/transpose.h"

#if defined(__AVX512F__)
#include "cpu/simd/expand_avx512.h"
#endif

namespace losa::masked_lora {
namespace {

constexpr int64_t kPassRegisters = 8, kPassTokens = kPassRegisters * kLanes;
constexpr int64_t kGroup = 4;  // entries that sample_row sums side by side
static_assert(kTokens % kLanes == 0 && kBlock == 64 && kOutFeatures % 8 == 0, "a word of the mask, or whole bytes");

inline const float* piece(const Passes& matrix, int64_t token, int64_t width, int64_t feature) {
  return matrix.data + token * matrix.features + (matrix.first + feature) * width;
}

// body(the number of registers that the tokens of a pass take, as a constant)
template <class Body>
inline void with_registers(int64_t width, const Body& body) {
  switch (width / kLanes) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    default: return body(std::integral_constant<int, static_cast<int>(kPassRegisters)>{});
  }
}

// The mask of up to kBlock columns.
inline uint64_t block_bits(const uint8_t* from, int64_t count) {
  uint64_t bits = 0;
  std::memcpy(&bits, from, static_cast<size_t>((count + 7) / 8));
  return count < kBlock ? bits & ((uint64_t{1} << count) - 1) : bits;
}

// The numbers of a block's kept columns, in order. Returns how many there are.
inline int64_t list_columns(uint64_t bits, uint8_t* columns) {
#if defined(__AVX512F__)
  alignas(64) static constexpr auto kNumbers = [] {
    std::array<uint8_t, kBlock> numbers{};
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<uint8_t>(i);
    return numbers;
  }();
  _mm512_storeu_si512(columns, compress8(bits, _mm512_load_si512(kNumbers.data())));
#else
  for (uint64_t left = bits; left != 0; left &= left - 1) *columns++ = static_cast<uint8_t>(std::countr_zero(left));
#endif
  return std::popcount(bits);
}

// compact: the kept ones of kBlock numbers, side by side; columns and count are of list_columns.
inline void gather([[maybe_unused]] uint64_t bits, [[maybe_unused]] const uint8_t* columns,
                   [[maybe_unused]] int64_t count, const float* numbers, float* compact) {
#if defined(__AVX512F__)
  for (int part = 0; part < kBlock; part += kLanes) {
    const auto mask = static_cast<__mmask16>(bits >> part);
    _mm512_storeu_si512(compact, compress32(mask, _mm512_loadu_si512(numbers + part)));
    compact += std::popcount(static_cast<uint16_t>(mask));
  }
#else
  for (int64_t e = 0; e < count; ++e) compact[e] = numbers[columns[e]];
#endif
}

// The other way: numbers has zeros where no column is kept.
inline void scatter([[maybe_unused]] uint64_t bits, [[maybe_unused]] const uint8_t* columns,
                    [[maybe_unused]] int64_t count, const float* compact, float* numbers) {
#if defined(__AVX512F__)
  for (int part = 0; part < kBlock; part += kLanes) {
    const auto mask = static_cast<__mmask16>(bits >> part);
    _mm512_storeu_si512(numbers + part, expand32(mask, _mm512_loadu_si512(compact)));
    compact += std::popcount(static_cast<uint16_t>(mask));
  }
#else
  std::memset(numbers, 0, kBlock * sizeof(float));
  for (int64_t e = 0; e < count; ++e) numbers[columns[e]] = compact[e];
#endif
}

// compact[e] += the dot product of dy and column chosen[e], over kRegisters of tokens.
template <int kRegisters>
inline void sample_row(const float* dy, const float* columns, int64_t stride, const uint8_t* chosen, int64_t count,
                       float* compact) {
  Floats d[kRegisters];
#pragma GCC unroll 8
  for (int r = 0; r < kRegisters; ++r) d[r] = load<FloatLanes>(dy + r * kLanes);
  for (int64_t e = 0; e < count; e += kGroup) {
    const float *a = columns + chosen[e] * stride, *b = columns + chosen[e + 1] * stride,
                *c = columns + chosen[e + 2] * stride, *f = columns + chosen[e + 3] * stride;
    Floats sum_a = {}, sum_b = {}, sum_c = {}, sum_f = {};
#pragma GCC unroll 8
    for (int r = 0; r < kRegisters; ++r) {
      sum_a += d[r] * load<FloatLanes>(a + r * kLanes);
      sum_b += d[r] * load<FloatLanes>(b + r * kLanes);
      sum_c += d[r] * load<FloatLanes>(c + r * kLanes);
      sum_f += d[r] * load<FloatLanes>(f + r * kLanes);
    }
    add_sums(sum_a, sum_b, sum_c, sum_f, compact + e);
  }
}

// M * G in kBlock columns from `first` on, of which `count` exist, for up to kSampleRows rows: to gradient, of
// `stride`.
inline void sample_block(const Sample& panel, int64_t row, int64_t rows, int64_t first, int64_t count, float* gradient,
                         int64_t stride) {
  alignas(64) float compact[kSampleRows][kBlock];
  uint8_t chosen[kSampleRows][kBlock];
  int64_t counts[kSampleRows];
  uint64_t kept[kSampleRows];
  for (int64_t i = 0; i < rows; ++i) {
    kept[i] = block_bits(panel.bits + (row + i) * panel.bits_stride + first / 8, count);
    counts[i] = list_columns(kept[i], chosen[i]);
    // The last group is filled up with a column that exists; the sums are not used.
    int64_t found = counts[i];
    while (found % kGroup != 0) chosen[i][found++] = 0;
    std::memset(compact[i], 0, static_cast<size_t>(found) * sizeof(float));
  }
  for (int64_t token = 0; token < panel.tokens; token += kPassTokens) {
    const int64_t width = std::min(panel.tokens - token, kPassTokens);
    const float* columns = piece(panel.x, token, width, first);
    with_registers(width, [&](auto registers) {
      for (int64_t i = 0; i < rows; ++i) {
        const float* dy = piece(panel.dy, token, width, row + i);
        sample_row<registers()>(dy, columns, width, chosen[i], counts[i], compact[i]);
      }
    });
  }
  for (int64_t i = 0; i < rows; ++i) {
    scatter(kept[i], chosen[i], counts[i], compact[i], gradient + i * stride);
  }
}

void sample(const Sample& panel) {
  const int64_t rank = panel.rank, chunk = sample_columns(rank), stride = padded(panel.columns);
  float* lora_A = panel.scratch;
  float* gradient = lora_A + rank * chunk;
  for (int64_t first = 0; first < panel.columns; first += chunk) {
    const int64_t count = std::min(panel.columns - first, chunk);
    copy_lora_A(panel.lora_A, panel.lora_A_stride, rank, first, count, lora_A, chunk);
    for (int64_t row = 0; row < panel.rows; row += kSampleRows) {
      const int64_t rows = std::min(panel.rows - row, kSampleRows);
      for (int64_t j = 0; j < count; j += kBlock) {
        sample_block(panel, row, rows, first + j, std::min(count - j, kBlock), gradient + j, chunk);
      }
      const Tile tile{gradient, lora_A, panel.lora_B + row * rank, chunk, chunk, rank, rows, count};
      project_tile(tile, panel.dA == nullptr ? nullptr : panel.dA + first, stride,
                   panel.dB == nullptr ? nullptr : panel.dB + row * rank);
    }
  }
}

// The kept entries of a block of W_eff by the feature of out that they add to: which feature of the block of `in`, and
// the weight.
struct Entries {
  uint8_t feature[kOutFeatures][kBlock];
  float weight[kOutFeatures][kBlock];
  int64_t count[kOutFeatures];
};

// Bit i of word j becomes bit j of word i: squares of half the side change places, then of a quarter, and so on.
inline void transpose_bits(uint64_t (&words)[kBlock]) {
  uint64_t low = ~uint64_t{0} >> kBlock / 2;
  for (int64_t side = kBlock / 2; side != 0; side /= 2, low ^= low << side) {
    for (int64_t i = 0; i < kBlock; i = (i + side + 1) & ~side) {
      const uint64_t change = ((words[i] >> side) ^ words[i + side]) & low;
      words[i] ^= change << side;
      words[i + side] ^= change;
    }
  }
}

// The block of features [begin, begin + outs) of out and [first, first + ins) of in.
inline void list_entries(const Multiply& product, int64_t begin, int64_t outs, int64_t first, int64_t ins,
                         float* scratch, Entries& entries) {
  alignas(64) float block[kOutFeatures * kBlock];
  const int64_t row = product.transposed ? first : begin, rows = product.transposed ? ins : outs;
  const int64_t column = product.transposed ? begin : first, columns = product.transposed ? outs : ins;
  const int64_t stride = product.transposed ? kOutFeatures : kBlock;
  Kept kept = product.kept;
  kept.bits += row * kept.bits_stride + column / 8;
  kept.weight = static_cast<const float*>(kept.weight) + row * kept.weight_stride + column;
  compose({.kept = kept,
           .base = true,
           .lora_A = product.lora_A + column,
           .lora_B = product.lora_B + row * product.rank,
           .lora_A_stride = product.lora_A_stride,
           .rank = product.rank,
           .out = block,
           .out_stride = stride,
           .out_type = FloatType::kFloat,
           .rows = rows,
           .columns = columns,
           .scratch = scratch});
  const auto bits = [&](int64_t i, int64_t j) {
    return block_bits(kept.bits + i * kept.bits_stride + j / 8, std::min(columns - j, kBlock));
  };
  const auto list = [&](int64_t out, uint64_t chosen, const float* weights) {
    entries.count[out] = list_columns(chosen, entries.feature[out]);
    gather(chosen, entries.feature[out], entries.count[out], weights, entries.weight[out]);
  };
  if (!product.transposed) {
    for (int64_t i = 0; i < rows; ++i) list(i, bits(i, 0), block + i * stride);
    return;
  }
  alignas(64) float turned[kBlock * kBlock];
  for (int64_t j = 0; j < columns; j += kBlock) {
    const int64_t count = std::min(columns - j, kBlock);
    uint64_t words[kBlock] = {};
    for (int64_t i = 0; i < rows; ++i) words[i] = bits(i, j);
    transpose_bits(words);
    transpose(block + j, stride, rows, count, turned, kBlock);
    for (int64_t out = 0; out < count; ++out) list(j + out, words[out], turned + out * kBlock);
  }
}

// sums (kRegisters of tokens) += entries' weights times their features of in. The block's sum is formed apart: one long
// chain of additions over all blocks would round off several times as much as a dense product does. Few registers are
// summed in several chains, because an addition waits for the one before it.
template <int kRegisters>
inline void multiply_row(const float* in, int64_t stride, const uint8_t* feature, const float* weight, int64_t count,
                         float* sums) {
  constexpr int kChains = std::clamp<int>(kPassRegisters / kRegisters, 1, 4);
  Floats s[kChains][kRegisters] = {};
  const auto add = [&](int chain, int64_t e) __attribute__((always_inline)) {
    const float* from = in + feature[e] * stride;
    const float w = weight[e];
#pragma GCC unroll 8
    for (int r = 0; r < kRegisters; ++r) s[chain][r] += load<FloatLanes>(from + r * kLanes) * w;
  };
  int64_t e = 0;
  for (; e + kChains <= count; e += kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) add(chain, e + chain);
  }
  for (; e < count; ++e) add(0, e);
#pragma GCC unroll 8
  for (int r = 0; r < kRegisters; ++r) {
#pragma GCC unroll 4
    for (int chain = 1; chain < kChains; ++chain) s[0][r] += s[chain][r];
    store<FloatLanes>(sums + r * kLanes, load<FloatLanes>(sums + r * kLanes) + s[0][r]);
  }
}

void multiply(const Multiply& product) {
  float* sums = product.scratch;  // as passes of kOutFeatures
  float* compose_memory = sums + kOutFeatures * product.padded_tokens;
  const int64_t ins = product.transposed ? product.rows : product.columns;
  Entries entries;
  for (int64_t begin = product.begin; begin < product.end; begin += kOutFeatures) {
    const int64_t outs = std::min(product.end - begin, kOutFeatures);
    const Passes out{sums, kOutFeatures, 0};
    for (int64_t token = 0; token < product.padded_tokens; token += kPassTokens) {
      const int64_t width = std::min(product.padded_tokens - token, kPassTokens);
      float* to = sums + token * kOutFeatures;
      for (int64_t i = 0; i < outs; ++i) {
        std::fill_n(to + i * width, width, product.bias == nullptr ? 0.0f : product.bias[begin + i]);
      }
    }
    for (int64_t first = 0; first < ins; first += kBlock) {
      list_entries(product, begin, outs, first, std::min(ins - first, kBlock), compose_memory, entries);
      for (int64_t token = 0; token < product.padded_tokens; token += kPassTokens) {
        const int64_t width = std::min(product.padded_tokens - token, kPassTokens);
        const float* in = piece(product.in, token, width, first);
        float* to = sums + token * kOutFeatures;
        with_registers(width, [&](auto registers) {
          for (int64_t i = 0; i < outs; ++i) {
            multiply_row<registers()>(in, width, entries.feature[i], entries.weight[i], entries.count[i],
                                      to + i * width);
          }
        });
      }
    }
    for (int64_t token = 0; token < product.tokens; token += kPassTokens) {
      const int64_t width = std::min(product.padded_tokens - token, kPassTokens);
      const int64_t count = std::min(product.tokens - token, kPassTokens);
      const float* from = piece(out, token, width, 0);
      for (int64_t i = 0; i < outs; i += kTokens) {
        for (int64_t t = 0; t < count; t += kTokens) {
          transpose(from + i * width + t, width, std::min(outs - i, kTokens), std::min(count - t, kTokens),
                    product.out + (token + t) * product.out_stride + begin + i, product.out_stride);
        }
      }
    }
  }
}

void split(const Split& part) {
  constexpr int64_t kSquare = 16;
  for (int64_t token = 0; token < part.tokens; token += kPassTokens) {
    const int64_t count = std::min(part.tokens - token, kPassTokens), width = (count + kTokens - 1) / kTokens * kTokens;
    float* to = part.to + token * part.features;
    for (int64_t j = part.begin; j < part.end; j += kSquare) {
      const int64_t columns = std::min(part.end - j, kSquare);
      for (int64_t i = 0; i < count; i += kSquare) {
        transpose(part.from + (token + i) * part.stride + j, part.stride, std::min(count - i, kSquare), columns,
                  to + j * width + i, width);
      }
      for (int64_t c = j; c < j + columns; ++c) std::fill(to + c * width + count, to + (c + 1) * width, 0.0f);
    }
  }
}

}  // namespace
}  // namespace losa::masked_lora
