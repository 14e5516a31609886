// The kernels of products.cpp. Tokens lie side by side in a register, so that an entry of the weight multiplies many of
// them, whatever its neighbours are. With tokens in registers and a block of features in cache, a multiply-add costs
// one load, as much as in a dense product at its best.
#pragma once

#include <algorithm>
#include <bit>

#include "cpu/masked_lora/kernels.h"
#include "cpu/masked_lora/panels.h"
#include "cpu/simd/transpose.h"

namespace losa::masked_lora {
namespace {

constexpr int64_t kPassRegisters = 8, kPassTokens = kPassRegisters * kLanes;
constexpr int64_t kGroup = 4;  // entries that sample_row sums side by side
static_assert(kTokens % kLanes == 0 && kBlock == 64 && kOutFeatures % 8 == 0, "a word of the mask, or whole bytes");

inline const float* piece(const Passes& matrix, int64_t token, int64_t width, int64_t feature) {
  return matrix.data + token * matrix.features + (matrix.first + feature) * width;
}

// The mask of up to kBlock columns.
inline uint64_t block_bits(const uint8_t* from, int64_t count) {
  uint64_t bits = 0;
  std::memcpy(&bits, from, static_cast<size_t>((count + 7) / 8));
  return count < kBlock ? bits & ((uint64_t{1} << count) - 1) : bits;
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
  for (int64_t i = 0; i < rows; ++i) {
    uint64_t bits = block_bits(panel.bits + (row + i) * panel.bits_stride + first / 8, count);
    int64_t found = 0;
    for (; bits != 0; bits &= bits - 1) chosen[i][found++] = static_cast<uint8_t>(std::countr_zero(bits));
    counts[i] = found;
    // The last group is filled up with a column that exists; the sums are not used.
    while (found % kGroup != 0) chosen[i][found++] = 0;
    std::memset(compact[i], 0, static_cast<size_t>(found) * sizeof(float));
  }
  for (int64_t token = 0; token < panel.tokens; token += kPassTokens) {
    const int64_t width = std::min(panel.tokens - token, kPassTokens);
    const float* columns = piece(panel.x, token, width, first);
    for (int64_t i = 0; i < rows; ++i) {
      const float* dy = piece(panel.dy, token, width, row + i);
      if (width == kPassTokens) {
        sample_row<kPassRegisters>(dy, columns, width, chosen[i], counts[i], compact[i]);
        continue;
      }
      for (int64_t t = 0; t < width; t += kLanes) {
        sample_row<1>(dy + t, columns + t, width, chosen[i], counts[i], compact[i]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* to = gradient + i * stride;
    std::memset(to, 0, static_cast<size_t>(kBlock) * sizeof(float));
    for (int64_t e = 0; e < counts[i]; ++e) to[chosen[i][e]] = compact[i][e];
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
  std::fill_n(entries.count, outs, int64_t{0});
  for (int64_t i = 0; i < rows; ++i) {
    const float* weights = block + i * stride;
    for (int64_t j = 0; j < columns; j += kBlock) {
      uint64_t bits = block_bits(kept.bits + i * kept.bits_stride + j / 8, std::min(columns - j, kBlock));
      if (product.transposed) {
        for (; bits != 0; bits &= bits - 1) {
          const int64_t out = j + std::countr_zero(bits), at = entries.count[out]++;
          entries.feature[out][at] = static_cast<uint8_t>(i);
          entries.weight[out][at] = weights[out];
        }
      } else {
        int64_t found = 0;
        for (; bits != 0; bits &= bits - 1, ++found) {
          const int in = std::countr_zero(bits);
          entries.feature[i][found] = static_cast<uint8_t>(in);
          entries.weight[i][found] = weights[in];
        }
        entries.count[i] = found;
      }
    }
  }
}

// sums (kRegisters of tokens) += entries' weights times their features of in. The block's sum is formed apart: one long
// chain of additions over all blocks would round off several times as much as a dense product does.
template <int kRegisters>
inline void multiply_row(const float* in, int64_t stride, const uint8_t* feature, const float* weight, int64_t count,
                         float* sums) {
  Floats s[kRegisters] = {};
  for (int64_t e = 0; e < count; ++e) {
    const float* from = in + feature[e] * stride;
    const float w = weight[e];
#pragma GCC unroll 8
    for (int r = 0; r < kRegisters; ++r) s[r] += load<FloatLanes>(from + r * kLanes) * w;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRegisters; ++r) {
    store<FloatLanes>(sums + r * kLanes, load<FloatLanes>(sums + r * kLanes) + s[r]);
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
        for (int64_t i = 0; i < outs; ++i, to += width) {
          if (width == kPassTokens) {
            multiply_row<kPassRegisters>(in, width, entries.feature[i], entries.weight[i], entries.count[i], to);
            continue;
          }
          for (int64_t t = 0; t < width; t += kLanes) {
            multiply_row<1>(in + t, width, entries.feature[i], entries.weight[i], entries.count[i], to + t);
          }
        }
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
