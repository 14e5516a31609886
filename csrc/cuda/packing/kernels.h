// The kernels that move values: a warp goes along a row, or a slice of a row, iteration by iteration.
//
// Both directions are bound by memory, so that bytes in flight count: the mask and the weight of the next iteration, or
// its values, are requested before this iteration is handled. Kept values go through shared memory, which they leave or
// enter in pieces of 16 bytes, so that the packed side is as coalesced as the dense side.
#pragma once

#include "cuda/packing/units.h"

namespace losa::packing {

// Packs a weight (rows, columns).
struct Packing {
  Mask mask;
  const void* weight;      // (rows, weight_stride)
  int64_t weight_stride;   // in elements
  bool aligned;            // every unit of a row is one aligned access
  const int64_t* offsets;  // (rows,): each row's first value; null if all rows have `length` values
  int64_t length;
  int keep_n;       // values of each group of kM columns; for kM > 0
  uint8_t* stored;  // (rows, packed_width(columns)), dense: the columns that are stored; for kM > 0
  void* values;     // all rows' values, one after the other
};

struct Unpacking {
  Mask mask;
  const void* values;  // (total,)
  int64_t total;
  const int64_t* offsets;  // (rows,): each row's first value; null if all rows have `length` values
  int64_t length;
  void* dense;   // (rows, columns)
  bool aligned;  // every unit of a row of `dense` is one aligned access
};

constexpr int kPrefetched = 4;  // pieces of a thread

// Copies pieces of 16 bytes to a place that nothing reads, so that they are in the L2 cache afterwards.
__global__ void __launch_bounds__(kThreads) prefetch_kernel(const uint4* from, int64_t pieces) {
  __shared__ uint4 ignored[kThreads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kPrefetched + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPrefetched; ++i) {
    if (first + i * kThreads < pieces) {
      copy_async(shared_address(&ignored[threadIdx.x]), from + first + i * kThreads);
    }
  }
  commit_copies();
  wait_copies<0>();
}

// How many of the columns [0, end) the mask keeps; end is a multiple of 8. By all lanes.
__device__ __forceinline__ int kept_before(const uint8_t* row, int end) {
  int count = 0;
#pragma unroll 4
  for (int byte = threadIdx.x % 32; byte < end / 8; byte += 32) count += __popc(row[byte]);  // [8]
  return __shfl_sync(kAllLanes, inclusive_sum(count), 31);
}

// Of each group of kM bits keep_n: the set bits and, where they are fewer, the first other bits. Never more than
// keep_n.
template <int kM>
__device__ __forceinline__ unsigned stored_bits(unsigned kept, int keep_n) {
  constexpr int kWidth = kM < 8 ? 8 : kM;
  bool complete = true;
#pragma unroll
  for (int begin = 0; begin < kWidth; begin += kM) {
    complete = complete && __popc(kept >> begin & ((1u << kM) - 1)) == keep_n;
  }
  if (complete) return kept;
  unsigned stored = 0;
#pragma unroll
  for (int begin = 0; begin < kWidth; begin += kM) {
    int spare = keep_n - __popc(kept >> begin & ((1u << kM) - 1)), room = keep_n;
#pragma unroll
    for (int bit = begin; bit < begin + kM; ++bit) {
      const bool is_kept = (kept >> bit & 1u) != 0;
      if ((is_kept || spare > 0) && room > 0) {
        stored |= 1u << bit;
        --room;
        if (!is_kept) --spare;
      }
    }
  }
  return stored;
}

// The stored bits of a byte. A group of 16 is an even byte and the next byte, which a neighbouring lane has. By all
// lanes.
template <int kSize, int kM>
__device__ __forceinline__ unsigned stored_byte(unsigned kept, int keep_n) {
  if constexpr (kM == 16) {
    constexpr int kLanes = 8 / Columns<kSize>::kUnit;
    const unsigned other = __shfl_xor_sync(kAllLanes, kept, kLanes);
    const bool odd = (threadIdx.x & kLanes) != 0;
    return stored_bits<16>(odd ? kept << 8 | other : kept | other << 8, keep_n) >> (odd ? 8 : 0) & 0xffu;
  } else {
    return stored_bits<kM>(kept, keep_n);
  }
}

// kM = 0: the columns that the mask keeps; else exactly keep_n of each group of kM columns.
template <int kSize, int kM>
__global__ void __launch_bounds__(kThreads) pack_kernel(Packing task, Slices slices) {
  using Element = typename OfSize<kSize>::Element;
  using Count = Columns<kSize>;
  constexpr int kPiece = Count::kPiece, kUnit = Count::kUnit;
  __shared__ __align__(16) Element buffers[kWarps][Count::kIteration + kPiece];
  const int lane = threadIdx.x % 32, columns = task.mask.columns;
  const int64_t row = slices.row();
  const int begin = slices.begin(), end = min(begin + slices.slice, columns);
  if (row >= task.mask.rows || begin >= end) return;
  Element* const buffer = buffers[threadIdx.x / 32];
  const uint8_t* const mask = task.mask.row(row);
  const Element* const from = static_cast<const Element*>(task.weight) + row * task.weight_stride;

  Bytes<kSize> next_bytes;
  Unit<kSize> next[kSteps];
  const auto load = [&](int first) {
    next_bytes.load(mask, first, columns);
    load_units(next, from + first, columns - first, task.aligned);
  };
  load(begin);

  int64_t place = task.offsets != nullptr ? task.offsets[row] : row * task.length;
  if (begin > 0) place += kM > 0 ? begin / (kM > 0 ? kM : 1) * task.keep_n : kept_before(mask, begin);
  // buffer[0] belongs to `to`, a multiple of 16 bytes. The first piece may begin with values of the row or slice
  // before.
  Element* to = static_cast<Element*>(task.values) + place;
  int lead = static_cast<int>(reinterpret_cast<uintptr_t>(to) % 16 / sizeof(Element)), filled = lead;
  to -= lead;

#pragma unroll 1
  for (int first = begin; first < end; first += Count::kIteration) {
    Bytes<kSize> bytes = next_bytes;
    Unit<kSize> units[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) units[s] = next[s];
    if (first + Count::kIteration < end) load(first + Count::kIteration);

    // The bits of the columns that are stored.
    const int left = columns - first;
    bytes.cut(left);
    unsigned stored = 0;  // byte s: of this lane's unit of step s
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      unsigned byte = bytes.at[s];
      if constexpr (kM > 0) {
        const int column = unit_column<kSize>(s), own = left - column / 8 * 8;
        byte = stored_byte<kSize, kM>(byte, task.keep_n);
        if (own < 8) byte &= Bytes<kSize>::existing(own);
        if (column % 8 == 0 && own > 0) {
          const unsigned at = static_cast<unsigned>(first + column) / 8;
          task.stored[row * packed_width(columns) + at] = static_cast<uint8_t>(byte);
        }
        if (byte != bytes.at[s]) units[s].clear(~unit_bits<kSize>(bytes.at[s]));
      }
      stored |= unit_bits<kSize>(byte) << (8 * s);
    }
    // Their values to the buffer.
    const Places places(stored);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      Element* at = buffer + filled + places.of(s);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        if ((stored >> (8 * s + j) & 1u) != 0) *at++ = units[s].get(j);
      }
    }
    filled += places.sum(kSteps);
    __syncwarp();

    // The buffer's whole pieces to memory. The values behind them move to the buffer's begin.
    const int pieces = filled / kPiece, written = pieces * kPiece;
    const int skipped = lead > 0 && pieces > 0 ? 1 : 0;
    if (skipped != 0 && lane >= lead && lane < kPiece) to[lane] = buffer[lane];
#pragma unroll
    for (int i = 0; i < Count::kIteration / kPiece; i += 32) {
      const int piece = i + lane;
      if (piece >= skipped && piece < pieces) {
        reinterpret_cast<uint4*>(to)[piece] = reinterpret_cast<const uint4*>(buffer)[piece];
      }
    }
    filled -= written;
    const Element rest = lane < filled ? buffer[written + lane] : Element{0};
    __syncwarp();
    if (lane < filled) buffer[lane] = rest;
    to += written;
    if (pieces > 0) lead = 0;
  }
  __syncwarp();
  if (lane >= lead && lane < filled) to[lane] = buffer[lane];
}

// The values of an iteration on their way to shared memory.
template <int kSize>
struct ValuesAhead {
  using Element = typename OfSize<kSize>::Element;
  static constexpr int kPiece = Columns<kSize>::kPiece;
  unsigned bits;  // byte s: the bits of this lane's unit of step s
  Places places;
  int lead;  // the place of the first value in the buffer

  // Requests the values from `place` on; zeros beyond the end. By all lanes.
  __device__ __forceinline__ ValuesAhead(Bytes<kSize> bytes, int left, const Unpacking& task, int64_t place,
                                         Element* buffer)
      : bits(units_of(bytes, left)), places(bits) {
    const Element* const from = static_cast<const Element*>(task.values) + place;
    lead = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(Element));
    const int total = places.sum(kSteps), pieces = total == 0 ? 0 : (lead + total + kPiece - 1) / kPiece;
    const int64_t origin = place - lead;
    for (int piece = threadIdx.x % 32; piece < pieces; piece += 32) {
      const int64_t at = origin + piece * kPiece;
      Element* const to = buffer + piece * kPiece;
      if (at >= 0 && at + kPiece <= task.total) {
        copy_async(shared_address(to), from - lead + piece * kPiece);  // [32 lanes, kPiece]
      } else {
#pragma unroll 1
        for (int i = 0; i < kPiece; ++i) {
          to[i] = at + i >= 0 && at + i < task.total ? static_cast<const Element*>(task.values)[at + i] : Element{0};
        }
      }
    }
    commit_copies();
  }

 private:
  __device__ __forceinline__ static unsigned units_of(Bytes<kSize>& bytes, int left) {
    bytes.cut(left);
    unsigned word = 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) word |= unit_bits<kSize>(bytes.at[s]) << (8 * s);
    return word;
  }
};

// dense: the values at the columns that the mask keeps, zeros elsewhere.
template <int kSize>
__global__ void __launch_bounds__(kThreads) unpack_kernel(Unpacking task, Slices slices) {
  using Element = typename OfSize<kSize>::Element;
  using Count = Columns<kSize>;
  constexpr int kUnit = Count::kUnit;
  __shared__ __align__(16) Element buffers[kWarps][2][Count::kIteration + Count::kPiece];
  const int warp = threadIdx.x / 32, columns = task.mask.columns;
  const int64_t row = slices.row();
  const int begin = slices.begin(), end = min(begin + slices.slice, columns);
  if (row >= task.mask.rows || begin >= end) return;
  const uint8_t* const mask = task.mask.row(row);
  Element* const to = static_cast<Element*>(task.dense) + row * columns;

  Bytes<kSize> bytes;
  bytes.load(mask, begin, end);
  int64_t place = first_value(task.offsets, row, task.length, task.total);
  if (begin > 0) place += kept_before(mask, begin);
  ValuesAhead<kSize> next(bytes, end - begin, task, place, buffers[warp][0]);
  bytes.load(mask, begin + Count::kIteration, end);
  int which = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += Count::kIteration) {
    // Request the next iteration's values, and the mask of the iteration after it.
    const ValuesAhead<kSize> now = next;
    const Element* const buffer = buffers[warp][which];
    which ^= 1;
    place += now.places.sum(kSteps);
    next = ValuesAhead<kSize>(bytes, end - first - Count::kIteration, task, place, buffers[warp][which]);
    bytes.load(mask, first + 2 * Count::kIteration, end);
    // Expand this iteration's values.
    wait_copies<1>();
    __syncwarp();
    const bool whole = task.aligned && columns - first >= Count::kIteration;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const Element* at = buffer + now.lead + now.places.of(s);
      Unit<kSize> unit;
#pragma unroll
      for (unsigned& word : unit.words) word = 0;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        if ((now.bits >> (8 * s + j) & 1u) != 0) unit.put(j, *at++);
      }
      const int column = first + unit_column<kSize>(s);
      if (whole) {
        unit.store(to + column);
      } else {
        unit.store_part(to + column, columns - column, task.aligned);
      }
    }
    __syncwarp();
  }
}

}  // namespace losa::packing
