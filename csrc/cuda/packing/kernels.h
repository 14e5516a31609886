// The kernels that move values: a warp goes along a row, or a slice of one, batch by batch.
//
// Both directions are bound by memory, so what counts is bytes in flight: the mask and the weight of the next batch, or
// its values, are asked for before this batch is handled. Kept values meet in shared memory and leave it, or come to
// it, in 16-byte pieces, so that they are as coalesced as the dense side.
#pragma once

#include "cuda/packing/units.h"

namespace losa::packing {

// Rows of a weight where they are, and of its values where they go.
struct Packing {
  Mask mask;
  const void* weight;
  int64_t weight_stride;   // in elements
  bool aligned;            // every unit of a row is one aligned access
  const int64_t* offsets;  // or null: rows of `length` values
  int64_t length;
  int keep_n;       // of kM
  uint8_t* stored;  // dense packed mask that N:M also writes
  void* values;
};

struct Unpacking {
  Mask mask;
  const void* values;
  int64_t total;
  const int64_t* offsets;  // or null: rows of `length` values
  int64_t length;
  void* dense;
  bool aligned;
};

constexpr int kWarmed = 4;  // pieces of a thread

// Copies 16-byte pieces to a place that nobody reads: they are in the L2 cache afterwards.
__global__ void __launch_bounds__(kThreads) warm_kernel(const uint4* from, int64_t pieces) {
  __shared__ uint4 ignored[kThreads];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kWarmed + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kWarmed; ++i) {
    if (first + i * kThreads < pieces) {
      copy_async(shared_address(&ignored[threadIdx.x]), from + first + i * kThreads);
    }
  }
  commit_copies();
  wait_copies<0>();
}

// The mask's columns in [0, end) that are kept; end is a multiple of 8. By all lanes.
__device__ __forceinline__ int kept_before(const uint8_t* row, int end) {
  int count = 0;
#pragma unroll 4
  for (int byte = threadIdx.x % 32; byte < end / 8; byte += 32) count += __popc(row[byte]);
  return __shfl_sync(kAllLanes, inclusive_sum(count), 31);
}

// Of each group of kM bits the set ones, and its first others until there are keep_n; never more than keep_n.
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

// The stored bits of a byte; a group of 16 is an even byte and the next one, which a neighbour has. By all lanes.
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

// kM = 0: what the mask keeps; else exactly keep_n of each group of kM.
template <int kSize, int kM>
__global__ void __launch_bounds__(kThreads) pack_kernel(Packing task, Slices slices) {
  using Element = typename OfSize<kSize>::Element;
  using Count = Columns<kSize>;
  constexpr int kPiece = Count::kPiece, kUnit = Count::kUnit;
  __shared__ __align__(16) Element buffers[kWarps][Count::kBatch + kPiece];
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
  // `to` is a 16-byte boundary that buffer[0] belongs to. The first piece may hold the end of the row or slice before.
  Element* to = static_cast<Element*>(task.values) + place;
  int lead = static_cast<int>(reinterpret_cast<uintptr_t>(to) % 16 / sizeof(Element)), filled = lead;
  to -= lead;

#pragma unroll 1
  for (int first = begin; first < end; first += Count::kBatch) {
    Bytes<kSize> bytes = next_bytes;
    Unit<kSize> units[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) units[s] = next[s];
    if (first + Count::kBatch < end) load(first + Count::kBatch);

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

    const int pieces = filled / kPiece, gone = pieces * kPiece;
    const int skipped = lead > 0 && pieces > 0 ? 1 : 0;
    if (skipped != 0 && lane >= lead && lane < kPiece) to[lane] = buffer[lane];
#pragma unroll
    for (int i = 0; i < Count::kBatch / kPiece; i += 32) {
      const int piece = i + lane;
      if (piece >= skipped && piece < pieces) {
        reinterpret_cast<uint4*>(to)[piece] = reinterpret_cast<const uint4*>(buffer)[piece];
      }
    }
    filled -= gone;
    const Element rest = lane < filled ? buffer[gone + lane] : Element{0};
    __syncwarp();
    if (lane < filled) buffer[lane] = rest;
    to += gone;
    if (pieces > 0) lead = 0;
  }
  __syncwarp();
  if (lane >= lead && lane < filled) to[lane] = buffer[lane];
}

// The values of a batch on their way to shared memory.
template <int kSize>
struct Arriving {
  using Element = typename OfSize<kSize>::Element;
  static constexpr int kPiece = Columns<kSize>::kPiece;
  unsigned bits;  // byte s: the bits of this lane's unit of step s
  Places places;
  int lead;  // of the first value in the buffer

  // Asks for the values from `place` on, zeros beyond the end. By all lanes.
  __device__ __forceinline__ Arriving(Bytes<kSize> bytes, int left, const Unpacking& task, int64_t place,
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
        copy_async(shared_address(to), from - lead + piece * kPiece);
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

template <int kSize>
__global__ void __launch_bounds__(kThreads) unpack_kernel(Unpacking task, Slices slices) {
  using Element = typename OfSize<kSize>::Element;
  using Count = Columns<kSize>;
  constexpr int kUnit = Count::kUnit;
  __shared__ __align__(16) Element buffers[kWarps][2][Count::kBatch + Count::kPiece];
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
  Arriving<kSize> next(bytes, end - begin, task, place, buffers[warp][0]);
  bytes.load(mask, begin + Count::kBatch, end);
  int which = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += Count::kBatch) {
    const Arriving<kSize> now = next;
    const Element* const buffer = buffers[warp][which];
    which ^= 1;
    place += now.places.sum(kSteps);
    next = Arriving<kSize>(bytes, end - first - Count::kBatch, task, place, buffers[warp][which]);
    bytes.load(mask, first + 2 * Count::kBatch, end);
    wait_copies<1>();
    __syncwarp();
    const bool whole = task.aligned && columns - first >= Count::kBatch;
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
