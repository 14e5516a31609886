// Wanda's masks on CUDA. The smallest scores |w| * norm of a row are found by a block of threads, by radix select; the
// smallest scores of each group of M columns by one thread. The kernels check the values on the way and report faults
// in flags, so that the host need not read the values before the launch.
#include "common/bits.h"
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/radix_select.h"
#include "cuda/scores.h"

namespace losa::wanda {

using namespace radix_select;

// The most units of a thread whose keys stay in registers; for longer rows they are computed anew in each pass.
constexpr int kMaxUnits = 8;
constexpr int kMaxStored = kMaxUnits * kUnit * kThreads;
constexpr int kBadNorms = 1, kBadWeight = 2;  // faults

struct Wanda {
  const void* weight;   // (rows, columns), dense
  const float* norms;   // (columns,)
  const uint8_t* mask;  // (rows, packed_width(columns)), dense, the entries that are not pruned yet; or null
  int64_t rows, columns;
  int count;        // entries of a row or group to be pruned, with those that are pruned already
  uint8_t* packed;  // (rows, packed_width(columns)), dense: the entries that stay
  int* faults;      // kBadNorms and kBadWeight are added to it; or null
  bool aligned;     // units of weight and norms are whole and may be read 16 bytes at a time
};

// |w| from the bits of w.
template <FloatType kType>
__device__ __forceinline__ float magnitude_of(unsigned bits) {
  if (kType == FloatType::kFloat) return __uint_as_float(bits & 0x7fffffffu);
  bits &= 0x7fffu;
  if (kType == FloatType::kBFloat16) return __uint_as_float(bits << 16);
  if (bits >= 0x7c00u) return __uint_as_float((bits << 13) + 0x70000000u);
  // A subnormal's bits on top of 2^-14, less 2^-14.
  if (bits < 0x400u) return __uint_as_float((bits << 13) + 0x38800000u) - 0x1p-14f;
  return __uint_as_float((bits << 13) + 0x38000000u);
}

// The weight's elements of a unit, as they are in memory.
template <FloatType kType>
struct Unit {
  static constexpr int kWords = kType == FloatType::kFloat ? kUnit : kUnit / 2;
  unsigned words[kWords];

  __device__ __forceinline__ float magnitude(int i) const {
    if constexpr (kType == FloatType::kFloat) return magnitude_of<kType>(words[i]);
    return magnitude_of<kType>(words[i / 2] >> 16 * (i % 2));
  }

  // `left` of its elements exist, and the others are 0.
  __device__ __forceinline__ void load(const void* weight, int64_t place, int64_t left, bool aligned) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    if (left <= 0) return;
    const auto* from = static_cast<const ElementBits<kType>*>(weight) + place;
    if (aligned) {
#pragma unroll
      for (int q = 0; q < kWords / 4; ++q) {
        spread(reinterpret_cast<const uint4*>(from)[q], words + 4 * q);  // [16 bytes]
      }
    } else {
      constexpr int kPerWord = kUnit / kWords;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        if (i < left) words[i / kPerWord] |= static_cast<unsigned>(from[i]) << 16 * (i % kPerWord);
      }
    }
  }
};

template <FloatType kType>
__device__ __forceinline__ Unit<kType> load_unit_of(const Wanda& task, int64_t row, int unit) {
  Unit<kType> raw;
  raw.load(task.weight, row * task.columns + unit * kUnit, task.columns - unit * kUnit, task.aligned);
  return raw;
}

// Keys of the unit at `column` of a row; -1 for columns that the mask lacks or that do not exist. Returns a bit for
// each column that the mask lacks. *largest becomes the bits of the largest |w|; the norms are checked in the first
// row.
template <FloatType kType>
__device__ __forceinline__ unsigned find_keys(const Wanda& task, const Unit<kType>& unit, int64_t row, int column,
                                              int (&keys)[kUnit], int* largest, int* faults) {
  const int left = static_cast<int>(task.columns) - column;
  float norms[kUnit];
  load_unit<float4>(task.norms + column, left, task.aligned, 0.0f, norms);  // [8]
  const unsigned inside = left < kUnit ? (1u << left) - 1 : 0xffu;
  unsigned pruned = 0;
  if (task.mask != nullptr) pruned = ~task.mask[row * packed_width(task.columns) + column / 8] & inside;  // [8 columns]
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const float magnitude = unit.magnitude(i);
    *largest = max(*largest, __float_as_int(magnitude));
    keys[i] = ((pruned | ~inside) >> i & 1u) != 0 ? -1 : score_key(__fmul_rn(magnitude, norms[i]));
  }
  if (row == 0) {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      if (!(norms[i] >= 0.0f && __float_as_int(norms[i]) < kInfinityKey)) *faults |= kBadNorms;
    }
  }
  return pruned;
}

__device__ __forceinline__ void report_faults(const Wanda& task, int largest, int faults) {
  if (largest >= kInfinityKey) faults |= kBadWeight;
  if (faults != 0 && task.faults != nullptr) atomicOr(task.faults, faults);
}

// Bits of the keys above the bound, and of the keys equal to it.
__device__ __forceinline__ void compare(const int (&keys)[kUnit], int bound, unsigned* kept, unsigned* ties) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if (keys[i] > bound) *kept |= 1u << i;
    if (keys[i] == bound) *ties |= 1u << i;
  }
}

// Adds the ties from number `room` on, where there are `before` ties in earlier columns.
__device__ __forceinline__ void keep_ties(unsigned ties, int before, int room, unsigned* kept) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    if ((ties >> i & 1u) != 0 && before++ >= room) *kept |= 1u << i;
  }
}

// Blocks that a multiprocessor's registers must allow, where a thread holds the keys of so many units.
LOSA_HOST_DEVICE constexpr int blocks_of_multiprocessor(int units) {
  return units > 4 ? 2 : units > 2 ? 3 : 4;
}

// A block of threads for each row. kUnits: units of a thread; 0 for any number.
template <FloatType kType, int kUnits>
__global__ void __launch_bounds__(kThreads, blocks_of_multiprocessor(kUnits)) wanda_rows_kernel(Wanda task) {
  __shared__ __align__(16) int histogram[kBins];
  __shared__ int warp_sums[kWarps];
  __shared__ int pruned_before;
  __shared__ Bin found;
  const int width = static_cast<int>(packed_width(task.columns));
  const int turns = kUnits > 0 ? kUnits : (width + kThreads - 1) / kThreads;
  int largest = 0, faults = 0, own_pruned = 0;
  int stored[kUnits > 0 ? kUnits : 1][kUnit];

  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  for (int64_t row = blockIdx.x; row < task.rows; row += gridDim.x) {
    const auto unit_of = [](int turn) { return turn * kThreads + static_cast<int>(threadIdx.x); };
    const auto find = [&](int unit, const Unit<kType>& raw, int (&keys)[kUnit]) {
      if (unit < width) {
        own_pruned += __popc(find_keys(task, raw, row, unit * kUnit, keys, &largest, &faults));
      } else {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) keys[i] = -1;
      }
    };
    // run(unit, keys) for each unit of this thread; the units of all threads are in the order of columns.
    const auto each = [&](auto run) {
#pragma unroll
      for (int turn = 0; turn < turns; ++turn) {
        const int unit = unit_of(turn);
        if (kUnits == 0) find(unit, load_unit_of<kType>(task, row, unit), stored[0]);
        run(unit, stored[kUnits == 0 ? 0 : turn]);
      }
    };
    const auto count_digits = [&](int pass, int prefix) {
      each([&](int, const int (&keys)[kUnit]) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          if (takes_part(keys[i], pass, prefix)) atomicAdd(&histogram[digit_of(keys[i], pass)], 1);
        }
      });
    };

    // The keys, and the first digit of each.
    if (threadIdx.x == 0) pruned_before = 0;
    own_pruned = 0;
    if constexpr (kUnits > 0) {
      Unit<kType> raw[kUnits];
#pragma unroll
      for (int turn = 0; turn < kUnits; ++turn) raw[turn] = load_unit_of<kType>(task, row, unit_of(turn));
#pragma unroll
      for (int turn = 0; turn < kUnits; ++turn) find(unit_of(turn), raw[turn], stored[turn]);
    }
    __syncthreads();
    count_digits(0, 0);
    if (own_pruned != 0) atomicAdd(&pruned_before, own_pruned);
    __syncthreads();

    // The bound, digit by digit: keys above it stay, and of the keys equal to it all but the first `room`.
    int room = task.count - pruned_before, bound = -1;
    bool all_ties = true;
    const auto add_digit = [&](int pass, const auto& counts) {
      const Bin bin = find_bin(counts, room, warp_sums, &found);
      bound = bound << 10 | bin.index;
      room -= bin.before;
      all_ties = room == bin.inside;
      // The whole bin is pruned: the bound is the largest key in it. Unsigned, as the last bin's end is beyond an int.
      if (all_ties) bound = static_cast<int>(((bound + 1u) << digit_shift(pass)) - 1u);
    };
    int first[kBins / kThreads];
    take_bins(histogram, first);
    if (room > 0) {
      bound = 0;
      add_digit(0, first);
      for (int pass = 1; pass < 3 && !all_ties; ++pass) {
        __syncthreads();
        count_digits(pass, bound);
        __syncthreads();
        int later[digit_bins(1) / kThreads];
        take_bins(histogram, later);
        add_digit(pass, later);
      }
    }

    // The mask. Ties are counted in the order of columns.
    int passed = 0;
    each([&](int unit, const int (&keys)[kUnit]) {
      unsigned kept = 0, ties = 0;
      compare(keys, bound, &kept, &ties);
      if (!all_ties) {
        int here;
        const int before = passed + exclusive_sum(__popc(ties), warp_sums, &here);
        passed += here;
        keep_ties(ties, before, room, &kept);
      }
      if (unit < width) task.packed[row * width + unit] = static_cast<uint8_t>(kept);
    });
    __syncthreads();
  }
  report_faults(task, largest, faults);
}

// A thread for each 8 columns, or 16 for M = 16.
template <FloatType kType, int kM>
__global__ void __launch_bounds__(kThreads, 2) wanda_groups_kernel(Wanda task) {
  constexpr int kUnits = kM > kUnit ? kM / kUnit : 1;
  const auto width = static_cast<unsigned>(packed_width(task.columns));
  const unsigned items = (width + kUnits - 1) / kUnits;  // of a row
  const unsigned total = static_cast<unsigned>(task.rows) * items, step = gridDim.x * kThreads;
  int largest = 0, faults = 0;
  for (unsigned index = blockIdx.x * kThreads + threadIdx.x; index < total; index += step) {
    const unsigned row = index / items, unit = (index - row * items) * kUnits;
    const int64_t left = task.columns - static_cast<int64_t>(unit) * kUnit;
    Unit<kType> raw[kUnits];
    int keys[kUnits][kUnit];
    unsigned pruned = 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t place = static_cast<int64_t>(unit + u) * kUnit;
      raw[u].load(task.weight, row * task.columns + place, task.columns - place, task.aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int column = static_cast<int>(unit + u) * kUnit;
      pruned |= find_keys(task, raw[u], row, column, keys[u], &largest, &faults) << kUnit * u;
    }
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
  report_faults(task, largest, faults);
}

inline unsigned limited(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxRowBlocks ? blocks : kMaxRowBlocks);
}

template <FloatType kType>
void launch_wanda_rows(const Wanda& task, cudaStream_t stream) {
  const unsigned grid = limited(task.rows);
  const int64_t together = kUnit * kThreads;  // columns of one unit for each thread
  if (task.columns <= together) {
    LOSA_LAUNCH((wanda_rows_kernel<kType, 1>), grid, kThreads, 0, stream, task);
  } else if (task.columns <= 2 * together) {
    LOSA_LAUNCH((wanda_rows_kernel<kType, 2>), grid, kThreads, 0, stream, task);
  } else if (task.columns <= 4 * together) {
    LOSA_LAUNCH((wanda_rows_kernel<kType, 4>), grid, kThreads, 0, stream, task);
  } else if (task.columns <= kMaxStored) {
    LOSA_LAUNCH((wanda_rows_kernel<kType, kMaxUnits>), grid, kThreads, 0, stream, task);
  } else {
    LOSA_LAUNCH((wanda_rows_kernel<kType, 0>), grid, kThreads, 0, stream, task);
  }
}

// m = 0: `count` of each row are pruned; m = 4, 8 or 16: of each group of m columns. There are fewer than 2^31 units.
template <FloatType kType>
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

template void launch_wanda<FloatType::kFloat>(const Wanda&, int64_t, cudaStream_t);
template void launch_wanda<FloatType::kHalf>(const Wanda&, int64_t, cudaStream_t);
template void launch_wanda<FloatType::kBFloat16>(const Wanda&, int64_t, cudaStream_t);

}  // namespace losa::wanda

#if defined(LOSA_TORCH)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "common/pruning_checks.h"

namespace losa::wanda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Tensor wanda_select(const Tensor& weight, const Tensor& input_norms, int64_t count, int64_t m,
                    const std::optional<Tensor>& mask, const std::optional<Tensor>& faults) {
  pruning::check_wanda_select(weight, input_norms, count, m, mask);
  const FloatType type = float_type(weight, "weight");
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
  const Wanda task{.weight = source.const_data_ptr(),
                   .norms = norm,
                   .mask = before ? static_cast<const uint8_t*>(before->const_data_ptr()) : nullptr,
                   .rows = rows,
                   .columns = columns,
                   .count = static_cast<int>(count),
                   .packed = static_cast<uint8_t*>(packed.mutable_data_ptr()),
                   .faults = faults ? static_cast<int*>(faults->mutable_data_ptr()) : nullptr,
                   .aligned = columns % kUnit == 0 && places % 16 == 0};
  const auto launch = type == FloatType::kFloat ? launch_wanda<FloatType::kFloat>
      : type == FloatType::kHalf                ? launch_wanda<FloatType::kHalf>
                                                : launch_wanda<FloatType::kBFloat16>;
  launch(task, m, current_stream(weight));
  return packed;
}

}  // namespace
}  // namespace losa::wanda

STABLE_TORCH_LIBRARY_IMPL(losa, CUDA, library) {
  library.impl("wanda_select", TORCH_BOX(&losa::wanda::wanda_select));
}

#endif
