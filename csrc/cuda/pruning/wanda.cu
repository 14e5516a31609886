// Wanda's masks on CUDA: a block of threads finds the smallest of a row by radix select, or a thread those of a group.
// What the values must be is looked at on the way and told in flags, so that the host need not ask before the launch.
#include <type_traits>

#include "common/bits.h"
#include "cuda/launch.h"
#include "cuda/radix_select.h"
#include "cuda/scores.h"

namespace losa::selection {

// Units of a thread whose keys stay in registers; longer rows compute them anew in each pass.
constexpr int kMaxUnits = 8;
constexpr int kMaxStored = kMaxUnits * kUnit * kThreads;
constexpr int kBadNorms = 1, kBadWeight = 2;  // faults

enum class WeightType { kFloat, kHalf, kBFloat16 };

struct Wanda {
  const void* weight;
  const float* norms;
  const uint8_t* mask;  // packed, dense rows; may be null
  int64_t rows, columns;
  int count;
  uint8_t* packed;
  int* faults;   // added to: kBadNorms, kBadWeight; may be null
  bool aligned;  // units of weight and norms are whole and may be read 16 bytes at a time
};

template <WeightType kType>
__device__ __forceinline__ float magnitude_of(unsigned bits) {
  if (kType == WeightType::kFloat) return __uint_as_float(bits & 0x7fffffffu);
  bits &= 0x7fffu;
  if (kType == WeightType::kBFloat16) return __uint_as_float(bits << 16);
  if (bits >= 0x7c00u) return __uint_as_float((bits << 13) + 0x70000000u);
  // A subnormal's bits on top of 2^-14, less 2^-14.
  if (bits < 0x400u) return __uint_as_float((bits << 13) + 0x38800000u) - 0x1p-14f;
  return __uint_as_float((bits << 13) + 0x38000000u);
}

// A unit's elements as they are in memory.
template <WeightType kType>
struct Unit {
  static constexpr int kWords = kType == WeightType::kFloat ? kUnit : kUnit / 2;
  unsigned words[kWords];

  __device__ __forceinline__ float magnitude(int i) const {
    if constexpr (kType == WeightType::kFloat) return magnitude_of<kType>(words[i]);
    return magnitude_of<kType>(words[i / 2] >> 16 * (i % 2));
  }

  // `left` of its elements exist, and the rest is 0.
  __device__ __forceinline__ void load(const void* weight, int64_t place, int64_t left, bool aligned) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    if (left <= 0) return;
    using Element = std::conditional_t<kType == WeightType::kFloat, unsigned, uint16_t>;
    const auto* from = static_cast<const Element*>(weight) + place;
    if (aligned) {
#pragma unroll
      for (int q = 0; q < kWords / 4; ++q) spread(reinterpret_cast<const uint4*>(from)[q], words + 4 * q);
    } else {
      constexpr int kPerWord = kUnit / kWords;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i < left) words[i / kPerWord] |= static_cast<unsigned>(from[i]) << 16 * (i % kPerWord);
      }
    }
  }
};

// Keys of a row's columns from `column` on, a multiple of kUnit; -1 for those that the mask lacks or that do not exist.
// Returns the bits of the former. `largest` takes the bits of the largest |w|; norms are looked at in the first row.
template <WeightType kType>
__device__ __forceinline__ unsigned find_keys(const Wanda& task, const Unit<kType>& unit, int64_t row, int column,
                                              int (&keys)[kUnit], int* largest, int* faults) {
  const int left = static_cast<int>(task.columns) - column;
  float norms[kUnit];
  load_unit<float4>(task.norms + column, left, task.aligned, 0.0f, norms);
  const unsigned inside = left < kUnit ? (1u << left) - 1 : 0xffu;
  unsigned gone = 0;
  if (task.mask != nullptr) gone = ~task.mask[row * packed_width(task.columns) + column / 8] & inside;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const float magnitude = unit.magnitude(i);
    *largest = max(*largest, __float_as_int(magnitude));
    keys[i] = ((gone | ~inside) >> i & 1u) != 0 ? -1 : score_key(__fmul_rn(magnitude, norms[i]));
  }
  if (row == 0) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (!(norms[i] >= 0.0f && __float_as_int(norms[i]) < kInfinityKey)) *faults |= kBadNorms;
    }
  }
  return gone;
}

__device__ __forceinline__ void tell(const Wanda& task, int largest, int faults) {
  if (largest >= kInfinityKey) faults |= kBadWeight;
  if (faults != 0 && task.faults != nullptr) atomicOr(task.faults, faults);
}

// A block of threads per row; kUnits of a thread, 0: any number.
template <WeightType kType, int kUnits>
__global__ void __launch_bounds__(kThreads, kUnits > 4 ? 2 : kUnits > 2 ? 3 : 4) wanda_rows_kernel(Wanda task) {
  __shared__ __align__(16) int histogram[kBins];
  __shared__ int warp_sums[kWarps];
  __shared__ int lost;
  __shared__ Bin found;
  const int width = static_cast<int>(packed_width(task.columns));
  const int shares = kUnits > 0 ? kUnits : (width + kThreads - 1) / kThreads;
  int largest = 0, faults = 0, own_lost = 0;
  int stored[kUnits > 0 ? kUnits : 1][kUnit];

  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  for (int64_t row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const auto load = [&](int unit) {
      Unit<kType> raw;
      raw.load(task.weight, row * task.columns + unit * kUnit, task.columns - unit * kUnit, task.aligned);
      return raw;
    };
    const auto decide = [&](int unit, const Unit<kType>& raw, int(&keys)[kUnit]) {
      if (unit < width) {
        own_lost += __popc(find_keys(task, raw, row, unit * kUnit, keys, &largest, &faults));
      } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) keys[i] = -1;
      }
    };
    // run(unit, keys): a thread's units in turn, all threads' in the order of columns.
    const auto each = [&](auto run) {
#pragma unroll
      for (int share = 0; share < shares; ++share) {
        const int unit = share * kThreads + static_cast<int>(threadIdx.x);
        if (kUnits == 0) decide(unit, load(unit), stored[0]);
        run(unit, stored[kUnits == 0 ? 0 : share]);
      }
    };
    const auto count_digits = [&](int pass, int prefix) {
      each([&](int, const int(&keys)[kUnit]) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          if (takes_part(keys[i], pass, prefix)) atomicAdd(&histogram[digit_of(keys[i], pass)], 1);
        }
      });
    };

    if (threadIdx.x == 0) lost = 0;
    own_lost = 0;
    if constexpr (kUnits > 0) {
      Unit<kType> raw[kUnits];
#pragma unroll
      for (int share = 0; share < kUnits; ++share) raw[share] = load(share * kThreads + static_cast<int>(threadIdx.x));
#pragma unroll
      for (int share = 0; share < kUnits; ++share) {
        decide(share * kThreads + static_cast<int>(threadIdx.x), raw[share], stored[share]);
      }
    }
    __syncthreads();
    count_digits(0, 0);
    if (own_lost != 0) atomicAdd(&lost, own_lost);
    __syncthreads();

    // Keys above `bound` stay, and of those equal to it all but the first `room`.
    int room = task.count - lost, bound = -1;
    bool all_ties = true;
    const auto narrow = [&](int pass, const auto& counts) {
      const Bin bin = find_bin(counts, room, warp_sums, &found);
      bound = bound << 10 | bin.index;
      room -= bin.before;
      all_ties = room == bin.inside;
      // The whole bin goes: up to the largest key in it. Unsigned, as the last bin's end is beyond an int.
      if (all_ties) bound = static_cast<int>(((bound + 1u) << digit_shift(pass)) - 1u);
    };
    int first[kBins / kThreads];
    take_bins(histogram, first);
    if (room > 0) {
      bound = 0;
      narrow(0, first);
      for (int pass = 1; pass < 3 && !all_ties; ++pass) {
        __syncthreads();
        count_digits(pass, bound);
        __syncthreads();
        int later[digit_bins(1) / kThreads];
        take_bins(histogram, later);
        narrow(pass, later);
      }
    }

    int passed = 0;
    each([&](int unit, const int(&keys)[kUnit]) {
      unsigned kept = 0, ties = 0;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (keys[i] > bound) kept |= 1u << i;
        if (keys[i] == bound) ties |= 1u << i;
      }
      if (!all_ties) {
        int here;
        int before = passed + exclusive_sum(__popc(ties), warp_sums, &here);
        passed += here;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          if ((ties >> i & 1u) != 0 && before++ >= room) kept |= 1u << i;
        }
      }
      if (unit < width) task.packed[row * width + unit] = static_cast<uint8_t>(kept);
    });
    __syncthreads();
  }
  tell(task, largest, faults);
}

// A thread per 8 columns, or per 16 for M = 16.
template <WeightType kType, int kM>
__global__ void __launch_bounds__(kThreads, 2) wanda_groups_kernel(Wanda task) {
  constexpr int kUnits = kM > kUnit ? kM / kUnit : 1;
  const auto width = static_cast<unsigned>(packed_width(task.columns)), shares = (width + kUnits - 1) / kUnits;
  const unsigned total = static_cast<unsigned>(task.rows) * shares, step = gridDim.x * kThreads;
  int largest = 0, faults = 0;
  for (unsigned index = blockIdx.x * kThreads + threadIdx.x; index < total; index += step) {
    const unsigned row = index / shares, unit = (index - row * shares) * kUnits;
    const int64_t left = task.columns - static_cast<int64_t>(unit) * kUnit;
    Unit<kType> raw[kUnits];
    int keys[kUnits][kUnit];
    unsigned lost = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t place = static_cast<int64_t>(unit + u) * kUnit;
      raw[u].load(task.weight, row * task.columns + place, task.columns - place, task.aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int column = static_cast<int>(unit + u) * kUnit;
      lost |= find_keys(task, raw[u], row, column, keys[u], &largest, &faults) << kUnit * u;
    }
    unsigned pruned = lost;
#pragma unroll
    for (int first = 0; first < kUnits * kUnit; first += kM) {
      int group[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) group[i] = keys[(first + i) / kUnit][(first + i) % kUnit];
      pruned |= smallest_of<kM>(group, task.count) << first;
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const auto kept = static_cast<uint8_t>(~pruned >> kUnit * u);
      task.packed[static_cast<int64_t>(row) * width + unit + u] = kept & column_bits(left - kUnit * u);
    }
  }
  tell(task, largest, faults);
}

inline unsigned limited(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxRowBlocks ? blocks : kMaxRowBlocks);
}

template <WeightType kType>
void launch_wanda_rows(const Wanda& task, cudaStream_t stream) {
  const unsigned grid = limited(task.rows);
  const int64_t share = kUnit * kThreads;
  if (task.columns <= share) {
    LOSA_LAUNCH((wanda_rows_kernel<kType, 1>), grid, kThreads, 0, stream, task);
  } else if (task.columns <= 2 * share) {
    LOSA_LAUNCH((wanda_rows_kernel<kType, 2>), grid, kThreads, 0, stream, task);
  } else if (task.columns <= 4 * share) {
    LOSA_LAUNCH((wanda_rows_kernel<kType, 4>), grid, kThreads, 0, stream, task);
  } else if (task.columns <= kMaxStored) {
    LOSA_LAUNCH((wanda_rows_kernel<kType, kMaxUnits>), grid, kThreads, 0, stream, task);
  } else {
    LOSA_LAUNCH((wanda_rows_kernel<kType, 0>), grid, kThreads, 0, stream, task);
  }
}

// m = 0: `count` go of each row; m = 4, 8 or 16: of each group, of less than 2^31 units.
template <WeightType kType>
void launch_wanda(const Wanda& task, int64_t m, cudaStream_t stream) {
  if (task.rows * task.columns == 0) return;
  const int64_t units = task.rows * packed_width(task.columns) / (m > kUnit ? m / kUnit : 1);
  const unsigned grid = limited((units + kThreads - 1) / kThreads);
  if (m == 0) {
    launch_wanda_rows<kType>(task, stream);
  } else if (m == 4) {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 4>), grid, kThreads, 0, stream, task);
  } else if (m == 8) {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 8>), grid, kThreads, 0, stream, task);
  } else {
    LOSA_LAUNCH((wanda_groups_kernel<kType, 16>), grid, kThreads, 0, stream, task);
  }
}

template void launch_wanda<WeightType::kFloat>(const Wanda&, int64_t, cudaStream_t);
template void launch_wanda<WeightType::kHalf>(const Wanda&, int64_t, cudaStream_t);
template void launch_wanda<WeightType::kBFloat16>(const Wanda&, int64_t, cudaStream_t);

}  // namespace losa::selection

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/pruning_checks.h"

namespace losa::selection {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Tensor wanda_select(const Tensor& weight, const Tensor& input_norms, int64_t count, int64_t m,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& faults) {
  pruning::check_wanda_select(weight, input_norms, count, m, mask);
  const ScalarType dtype = weight.scalar_type();
  const int64_t rows = weight.size(0), columns = weight.size(1);
  STD_TORCH_CHECK((m == 0 || m == 4 || m == 8 || m == 16) && columns < (1 << 30),
                  "m: expected 0, 4, 8 or 16, a divisor of ", columns, ", got ", m);
  STD_TORCH_CHECK(m == 0 || rows * packed_width(columns) < (int64_t{1} << 31),
                  "weight: expected less than 2^34 entries for N:M");
  STD_TORCH_CHECK(!faults || (faults->scalar_type() == ScalarType::Int && faults->numel() == 1),
                  "faults: expected an int32 tensor of one element");
  const DeviceGuard guard(weight.get_device_index());
  const Tensor source = torch::stable::contiguous(weight), norms = torch::stable::contiguous(input_norms);
  std::optional<Tensor> before;
  if (mask) before = torch::stable::contiguous(*mask);
  Tensor packed = torch::stable::new_empty(source, {rows, packed_width(columns)}, ScalarType::Byte);
  const auto* norm = static_cast<const float*>(norms.const_data_ptr());
  const uintptr_t places = reinterpret_cast<uintptr_t>(source.const_data_ptr()) | reinterpret_cast<uintptr_t>(norm);
  const Wanda task{source.const_data_ptr(),
                  norm,
                  before ? static_cast<const uint8_t*>(before->const_data_ptr()) : nullptr,
                  rows,
                  columns,
                  static_cast<int>(count),
                  static_cast<uint8_t*>(packed.mutable_data_ptr()),
                  faults ? static_cast<int*>(faults->mutable_data_ptr()) : nullptr,
                  columns % kUnit == 0 && places % 16 == 0};
  const auto launch = dtype == ScalarType::Float  ? launch_wanda<WeightType::kFloat>
                      : dtype == ScalarType::Half ? launch_wanda<WeightType::kHalf>
                                                  : launch_wanda<WeightType::kBFloat16>;
  launch(task, m, current_stream(weight));
  return packed;
}

}  // namespace
}  // namespace losa::selection

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("wanda_select", TORCH_BOX(&losa::selection::wanda_select));
}

#endif
