// x as a kernel's plan wants it: see Layout in kernels.h. Compiled for any CPU.
#pragma once

#include <algorithm>

#include "cpu/simd/float_lanes.h"
#include "cpu/sparse_linear/kernels.h"

namespace losa::sparse_linear {
namespace {

// A matrix of x: rows and columns with strides in elements.
struct Input {
  const void* data;
  FloatType type;
  int64_t batch, columns, row_stride, column_stride;
};

struct Unchanged {
  template <class V>
  static auto from(typename V::Stored value) {
    return value;
  }
};

struct Widened {
  template <class V>
  static float from(typename V::Stored value) {
    return V::widen(value);
  }
};

// Columns of a row of x as `to` wants them: the first `count` of kColumns exist; columns beyond them become 0.
template <class V, class How, int kColumns, class Element>
void copy_columns(const typename V::Stored* row, int64_t stride, int64_t count, Element* to) {
  if (stride == 1 && count == kColumns) {
    for (int64_t c = 0; c < kColumns; ++c) to[c] = How::template from<V>(row[c]);
  } else {
    for (int64_t c = 0; c < kColumns; ++c) to[c] = c < count ? How::template from<V>(row[c * stride]) : Element{0};
  }
}

template <class V, class How, int kLanes, class Element>
void lay_out_lanes(const Input& x, const Plan& plan, Element* to) {
  constexpr int64_t kColumns = 32;
  static_assert(kColumns % kLanes == 0 && kBlock % kColumns == 0);
  const int64_t padded = (x.columns + kBlock - 1) / kBlock * kBlock, stride = x.column_stride;
  const int64_t apart = plan.batch * kLanes;
  const bool even_odd = plan.layout == Layout::kEvenOdd;
  alignas(64) Element part[kColumns];
  for (int64_t first = 0; first < x.batch; first += plan.batch, to += plan.batch * padded) {
    const int64_t present = std::min(plan.batch, x.batch - first);
    if (present < plan.batch) std::fill_n(to, plan.batch * padded, Element{0});
    for (int64_t b = 0; b < present; ++b) {
      const auto* const row = static_cast<const typename V::Stored*>(x.data) + (first + b) * x.row_stride;
      for (int64_t column = 0; column < padded; column += kColumns) {
        const int64_t left = std::clamp<int64_t>(x.columns - column, 0, kColumns);
        copy_columns<V, How, kColumns>(row + std::min(column, x.columns) * stride, stride, left, part);
        Element* const lanes = to + column * plan.batch + b * kLanes;
        for (int64_t group = 0; group < kColumns / kLanes; ++group) {
          if (even_odd) {
            for (int64_t lane = 0; lane < kLanes; ++lane) {
              lanes[group * apart + lane] = part[(kColumns / kLanes * lane + group) % kColumns];
            }
          } else {
            std::copy_n(part + group * kLanes, kLanes, lanes + group * apart);
          }
        }
      }
    }
  }
}

// One column after another, in tiles that stay in cache both where they are read and where they are written.
template <class V>
void lay_out_columns(const Input& x, const Plan& plan, float* to) {
  const auto* const data = static_cast<const typename V::Stored*>(x.data);
  const int64_t padded = (x.columns + kBlock - 1) / kBlock * kBlock;
  for (int64_t first = 0; first < x.batch; first += plan.batch, to += padded * plan.batch) {
    const int64_t present = std::min(plan.batch, x.batch - first);
    if (present < plan.batch) std::fill_n(to, padded * plan.batch, 0.0f);
    std::fill(to + x.columns * plan.batch, to + padded * plan.batch, 0.0f);
    for (int64_t tile = 0; tile < x.columns; tile += kBlock) {
      const int64_t columns = std::min(kBlock, x.columns - tile);
      for (int64_t b = 0; b < present; ++b) {
        const auto* const row = data + (first + b) * x.row_stride + tile * x.column_stride;
        float* const column = to + tile * plan.batch + b;
        for (int64_t c = 0; c < columns; ++c) column[c * plan.batch] = V::widen(row[c * x.column_stride]);
      }
    }
  }
}

template <class V>
void lay_out_floats(const Input& x, const Plan& plan, float* to) {
  if (plan.lanes == 1) {
    lay_out_columns<V>(x, plan, to);
  } else if (plan.lanes == 8) {
    lay_out_lanes<V, Widened, 8>(x, plan, to);
  } else {
    lay_out_lanes<V, Widened, 16>(x, plan, to);
  }
}

// Whether x lies in memory as the plan wants it already.
bool is_laid_out(const Input& x, const Plan& plan) {
  return x.type == FloatType::kFloat && plan.batch == 1 && plan.layout == Layout::kFloat && x.column_stride == 1 &&
      x.columns % kBlock == 0 && x.batch == 1;
}

// Floats that lay_out writes (numbers of 16 bits take half of them).
int64_t laid_out_size(const Input& x, const Plan& plan) {
  const int64_t passes = (x.batch + plan.batch - 1) / plan.batch;
  return passes * plan.batch * ((x.columns + kBlock - 1) / kBlock * kBlock);
}

void lay_out(const Input& x, const Plan& plan, float* to) {
  if (plan.layout == Layout::kBFloat16) {
    lay_out_lanes<BFloat16Lanes, Unchanged, 32>(x, plan, reinterpret_cast<uint16_t*>(to));
  } else {
    with_type(x.type, [&](auto type) { lay_out_floats<decltype(type)>(x, plan, to); });
  }
}

}  // namespace
}  // namespace losa::sparse_linear
