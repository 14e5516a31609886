// One token's work between the products of a decoder. Rows are short: what counts is that each is read once.
#include "cpu/decoder_step/kernels.h"

#include <cmath>

#include "cpu/simd/exponential.h"
#include "cpu/simd/float_lanes.h"

namespace losa::decoder_step {
namespace {

// body(first, lanes) for all columns by registers; the last one may be a part.
template <class Body>
inline void by_registers(int64_t columns, const Body& body) {
  int64_t first = 0;
  for (; first + kLanes <= columns; first += kLanes) body(first, int64_t{kLanes});
  if (first < columns) body(first, columns - first);
}

template <class Type>
inline Floats read(const typename Type::Stored* from, int64_t lanes) {
  return lanes == kLanes ? load<Type>(from) : load_part<Type>(from, lanes);
}

template <class Type>
inline void write(typename Type::Stored* to, const Floats& value, int64_t lanes) {
  if (lanes == kLanes) return store<Type>(to, value);
  store_part<Type>(to, value, lanes);
}

// As memory would hold it.
template <class Type>
inline Floats rounded(const Floats& value) {
  return Type::widen(Type::narrow(value));
}

template <class Type>
float inverse_rms(const typename Type::Stored* x, int64_t columns, float eps) {
  Floats squares = {};
  by_registers(columns, [&](int64_t first, int64_t lanes) {
    const Floats value = read<Type>(x + first, lanes);
    squares += value * value;
  });
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(columns) + eps);
}

template <class Type>
void normalise(const typename Type::Stored* x, const typename Type::Stored* weight, typename Type::Stored* out,
               int64_t columns, float eps) {
  const float scale = inverse_rms<Type>(x, columns, eps);
  by_registers(columns, [&](int64_t first, int64_t lanes) {
    const Floats normed = rounded<Type>(read<Type>(x + first, lanes) * scale);
    write<Type>(out + first, normed * read<Type>(weight + first, lanes), lanes);
  });
}

void add_rms_norm(FloatType type, void* x, const void* update, const void* weight, void* out, int64_t columns,
                  float eps) {
  with_type(type, [&](auto of) {
    using Type = decltype(of);
    using Stored = typename Type::Stored;
    auto* const row = static_cast<Stored*>(x);
    if (update != nullptr) {
      const auto* const added = static_cast<const Stored*>(update);
      by_registers(columns, [&](int64_t first, int64_t lanes) {
        write<Type>(row + first, read<Type>(row + first, lanes) + read<Type>(added + first, lanes), lanes);
      });
    }
    normalise<Type>(row, static_cast<const Stored*>(weight), static_cast<Stored*>(out), columns, eps);
  });
}

void rotate(FloatType type, const void* x, const void* cos, const void* sin, const void* norm, float eps, void* out,
            int64_t size) {
  with_type(type, [&](auto of) {
    using Type = decltype(of);
    using Stored = typename Type::Stored;
    const auto* const head = static_cast<const Stored*>(x);
    const auto* const weight = static_cast<const Stored*>(norm);
    const auto *const c = static_cast<const Stored*>(cos), *const s = static_cast<const Stored*>(sin);
    auto* const to = static_cast<Stored*>(out);
    const float scale = weight == nullptr ? 1.0f : inverse_rms<Type>(head, size, eps);
    const auto value = [&](int64_t first, int64_t lanes) {
      const Floats own = read<Type>(head + first, lanes);
      return weight == nullptr ? own : rounded<Type>(rounded<Type>(own * scale) * read<Type>(weight + first, lanes));
    };
    const int64_t half = size / 2;
    by_registers(half, [&](int64_t first, int64_t lanes) {
      const Floats left = value(first, lanes), right = value(half + first, lanes);
      write<Type>(to + first, left * read<Type>(c + first, lanes) + right * read<Type>(s + first, lanes), lanes);
      write<Type>(to + half + first,
                  right * read<Type>(c + half + first, lanes) + left * read<Type>(s + half + first, lanes), lanes);
    });
  });
}

int64_t padded(int64_t size) {
  return (size + kLanes - 1) / kLanes * kLanes;
}

// kQueries at a time: their queries as fp32, padded with zeros, and a score of each at every place.
int64_t attend_scratch(int64_t count, int64_t size) {
  return 4 * padded(size) + padded(4 * (count + 4));
}

constexpr int kSums = 4;  // that add_sums makes at once
// Additions in one chain: a longer one would round off more than a dense product does.
constexpr int64_t kChunk = 64;

// scores[place][query] of kQueries queries.
template <class Type, int kQueries>
void score(const typename Type::Stored* keys, const float* q, int64_t count, int64_t size, float* scores) {
  constexpr int kPlaces = kSums / kQueries;
  const int64_t apart = padded(size);
  for (int64_t place = 0; place < count; place += kPlaces) {
    const typename Type::Stored* key[kPlaces];
    // Past the last place the last one again.
    for (int p = 0; p < kPlaces; ++p) key[p] = keys + (place + p < count ? place + p : count - 1) * size;
    Floats sums[kSums] = {};
    by_registers(size, [&](int64_t first, int64_t lanes) {
#pragma GCC unroll 4
      for (int p = 0; p < kPlaces; ++p) {
        const Floats own = read<Type>(key[p] + first, lanes);
#pragma GCC unroll 4
        for (int i = 0; i < kQueries; ++i) sums[p * kQueries + i] += own * load<FloatLanes>(q + i * apart + first);
      }
    });
    float* const to = scores + place * kQueries;
    for (int i = 0; i < kSums; ++i) to[i] = 0;
    add_sums(sums[0], sums[1], sums[2], sums[3], to);
  }
}

// e^(score - the query's largest one) in place; their sum for each query.
template <int kQueries>
void soften(float* scores, int64_t count, float (&sums)[kQueries]) {
  const int64_t all = count * kQueries, end = padded(all);
  for (int64_t i = all; i < end; ++i) scores[i] = -INFINITY;
  Floats most = load<FloatLanes>(scores);
  for (int64_t i = kLanes; i < end; i += kLanes) {
    const Floats own = load<FloatLanes>(scores + i);
    most = own > most ? own : most;
  }
  float largest[kLanes];
  store<FloatLanes>(largest, most);
  for (int i = kQueries; i < kLanes; ++i) {
    if (largest[i] > largest[i % kQueries]) largest[i % kQueries] = largest[i];
  }
  for (int i = kQueries; i < kLanes; ++i) largest[i] = largest[i % kQueries];
  most = load<FloatLanes>(largest);
  Floats total = {}, part = {};
  for (int64_t i = 0; i < end; i += kLanes) {
    if (i % (kChunk * kLanes) == 0) {
      total += part;
      part = Floats{};
    }
    const Floats weight = exponential(load<FloatLanes>(scores + i) - most);
    store<FloatLanes>(scores + i, weight);
    part += i + kLanes <= all ? weight : load_part<FloatLanes>(scores + i, all - i);
  }
  total += part;
  float folded[kLanes];
  store<FloatLanes>(folded, total);
  for (int q = 0; q < kQueries; ++q) sums[q] = 0;
  for (int i = 0; i < kLanes; ++i) sums[i % kQueries] += folded[i];
}

// out[query] = sum over places of their weight times the value, by the sum of weights. kRegisters of columns at a time.
template <class Type, int kQueries, int kRegisters>
void weigh(const typename Type::Stored* values, const float* weights, const float (&sums)[kQueries], int64_t count,
           int64_t size, int64_t column, int64_t lanes, typename Type::Stored* const (&out)[kQueries]) {
  Floats total[kQueries][kRegisters] = {};
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t end = count - first < kChunk ? count : first + kChunk;
    Floats part[kQueries][kRegisters] = {};
    for (int64_t place = first; place < end; ++place, weights += kQueries) {
      const auto* const value = values + place * size + column;
#pragma GCC unroll 4
      for (int r = 0; r < kRegisters; ++r) {
        const Floats own = read<Type>(value + r * kLanes, kRegisters > 1 ? kLanes : lanes);
#pragma GCC unroll 4
        for (int q = 0; q < kQueries; ++q) part[q][r] += own * weights[q];
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      for (int r = 0; r < kRegisters; ++r) total[q][r] += part[q][r];
    }
  }
  for (int q = 0; q < kQueries; ++q) {
    const float inverse = 1.0f / sums[q];
    for (int r = 0; r < kRegisters; ++r) {
      write<Type>(out[q] + column + r * kLanes, total[q][r] * inverse, kRegisters > 1 ? kLanes : lanes);
    }
  }
}

template <class Type, int kQueries>
void attend_together(const Attention& task, int64_t query) {
  using Stored = typename Type::Stored;
  const int64_t size = task.size, apart = padded(size);
  float *const q = task.scratch, *const scores = q + kQueries * apart;
  Stored* out[kQueries];
  for (int i = 0; i < kQueries; ++i) {
    const int64_t own = (query + i) * size;
    out[i] = static_cast<Stored*>(task.out) + own;
    by_registers(size, [&](int64_t first, int64_t lanes) {
      const Floats part = read<Type>(static_cast<const Stored*>(task.q) + own + first, lanes);
      store<FloatLanes>(q + i * apart + first, part * task.scaling);
    });
  }
  score<Type, kQueries>(static_cast<const Stored*>(task.keys), q, task.count, size, scores);
  float sums[kQueries];
  soften<kQueries>(scores, task.count, sums);
  const auto* const values = static_cast<const Stored*>(task.values);
  constexpr int kWide = 2;
  int64_t column = 0;
  for (; column + kWide * kLanes <= size; column += kWide * kLanes) {
    weigh<Type, kQueries, kWide>(values, scores, sums, task.count, size, column, kLanes, out);
  }
  for (; column < size; column += kLanes) {
    const int64_t lanes = size - column < kLanes ? size - column : kLanes;
    weigh<Type, kQueries, 1>(values, scores, sums, task.count, size, column, lanes, out);
  }
}

void attend(const Attention& task) {
  with_type(task.type, [&](auto of) {
    using Type = decltype(of);
    int64_t query = 0;
    for (; query + 4 <= task.queries; query += 4) attend_together<Type, 4>(task, query);
    for (; query + 2 <= task.queries; query += 2) attend_together<Type, 2>(task, query);
    if (query < task.queries) attend_together<Type, 1>(task, query);
  });
}

void gated_silu(FloatType type, const void* gate, const void* up, void* out, int64_t count) {
  with_type(type, [&](auto of) {
    using Type = decltype(of);
    using Stored = typename Type::Stored;
    const auto *const gates = static_cast<const Stored*>(gate), *const ups = static_cast<const Stored*>(up);
    auto* const to = static_cast<Stored*>(out);
    by_registers(count, [&](int64_t first, int64_t lanes) {
      const Floats x = read<Type>(gates + first, lanes);
      const Floats activated = x / (1.0f + exponential(-x));
      write<Type>(to + first, rounded<Type>(activated) * read<Type>(ups + first, lanes), lanes);
    });
  });
}

}  // namespace

const Kernels LOSA_ISA::kKernels = {.add_rms_norm = add_rms_norm,
                                    .rotate = rotate,
                                    .attend = attend,
                                    .attend_scratch = attend_scratch,
                                    .gated_silu = gated_silu};

}  // namespace losa::decoder_step
