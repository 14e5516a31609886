// Attention of one token over the places of a cache that have been written: each block takes a run of the places of one
// key head (flash-decoding), and the last block of the head to finish puts the runs together, in the order of places.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/elements.h"

namespace losa::decoder_step {

struct Attention {
  const void* q;      // (queries, size), consecutive queries share a key head
  const void* cache;  // (2, keys, room, size): keys, then values
  const int64_t* position;
  void* out;       // (queries, size)
  float* parts;    // (queries, runs, size): of each run the values weighted by 2^(score - top)
  float* weights;  // (queries, runs, 2): of each run its top score and the sum of the weights
  int* finished;   // (queries,), zero, and zero afterwards: blocks of a key head that are done
  int queries, keys, size;
  int64_t room;
  int places;   // of the cache, a bound for position + 1
  float scale;  // of products q k, to exponents of 2
};

constexpr int kAttendWarps = 4;
// A score below those of all places; finite, so that two of them have a difference.
constexpr float kNoScore = -1e30f;

// kLanes lanes share a row of up to kLanes * 16 bytes, a warp reads 32 / kLanes rows at once, and kQueries queries use
// them.
template <FloatType kType, int kLanes, int kQueries>
struct AttendShape {
  static constexpr int kOwn = kPerVector<kType>, kSize = kLanes * kOwn, kRows = 32 / kLanes;
  static constexpr int kTurns = kQueries == 1 ? 4 : 2;  // rows of a lane between two looks at the scores
  static constexpr int kStep = kAttendWarps * kRows * kTurns;
};

// What a lane's row of a warp has seen of some places: the top score of each query, and the sums of 2^(score - top) and
// of the values weighted by it, of which the lane has its share.
template <int kQueries, int kOwn>
struct Seen {
  float top[kQueries], total[kQueries], values[kQueries][kOwn];
};

// 16 bytes of a row, of which those of row 0 are at `first`; zeros where there is no row.
template <FloatType kType>
__device__ __forceinline__ uint4 load_share(const ElementBits<kType>* first, int row, int size, bool exists) {
  if (!exists) return make_uint4(0, 0, 0, 0);
  return __ldcg(reinterpret_cast<const uint4*>(first + int64_t{row} * size));
}

// Adds places `begin` to `end` of a key head. Keys and values of a step are asked for before any is used.
template <FloatType kType, int kLanes, int kQueries, int kOwn>
__device__ __forceinline__ void see_places(const Attention& task, int key, int begin, int end,
                                           const float (&q)[kQueries][kOwn], Seen<kQueries, kOwn>& seen) {
  using Shape = AttendShape<kType, kLanes, kQueries>;
  constexpr int kTurns = Shape::kTurns;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // The lane's share of a row; a lane beyond the row's end has none.
  const int share = lane % kLanes * kOwn, limit = share < task.size ? end : 0;
  const auto* const keys_from = static_cast<const ElementBits<kType>*>(task.cache) + key * task.room * task.size + share;
  const auto* const values_from = keys_from + task.keys * task.room * task.size;
  for (int base = begin; base < end; base += Shape::kStep) {
    const int first = base + warp * Shape::kRows + lane / kLanes;
    uint4 keys[kTurns], stored[kTurns];
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      const int place = first + t * kAttendWarps * Shape::kRows;
      keys[t] = load_share<kType>(keys_from, place, task.size, place < limit);
    }
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      const int place = first + t * kAttendWarps * Shape::kRows;
      stored[t] = load_share<kType>(values_from, place, task.size, place < limit);
    }
    float scores[kTurns][kQueries];
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      Elements<kType, kOwn> k;
      k.set(keys[t]);
      const bool exists = first + t * kAttendWarps * Shape::kRows < end;
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) score += q[g][i] * k.values[i];
#pragma unroll
        for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) score += __shfl_xor_sync(~0u, score, lanes);
        scores[t][g] = exists ? score : -INFINITY;
      }
    }
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
      float top = seen.top[g];
#pragma unroll
      for (int t = 0; t < kTurns; ++t) top = fmaxf(top, scores[t][g]);
      const float factor = exp2f(seen.top[g] - top);
      seen.top[g] = top;
      seen.total[g] *= factor;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) seen.values[g][i] *= factor;
#pragma unroll
      for (int t = 0; t < kTurns; ++t) seen.total[g] += scores[t][g] = exp2f(scores[t][g] - top);
    }
#pragma unroll
    for (int t = 0; t < kTurns; ++t) {
      Elements<kType, kOwn> v;
      v.set(stored[t]);
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) seen.values[g][i] += scores[t][g] * v.values[i];
      }
    }
  }
}

// Puts together what the rows of a warp have seen; in the first kLanes lanes.
template <int kLanes, int kQueries, int kOwn>
__device__ __forceinline__ void join_rows(Seen<kQueries, kOwn>& seen) {
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
#pragma unroll
    for (int lanes = kLanes; lanes < 32; lanes *= 2) {
      const float other = __shfl_xor_sync(~0u, seen.top[g], lanes), top = fmaxf(seen.top[g], other);
      const float mine = exp2f(seen.top[g] - top), theirs = exp2f(other - top);
      seen.top[g] = top;
      seen.total[g] = mine * seen.total[g] + theirs * __shfl_xor_sync(~0u, seen.total[g], lanes);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        seen.values[g][i] = mine * seen.values[g][i] + theirs * __shfl_xor_sync(~0u, seen.values[g][i], lanes);
      }
    }
  }
}

// What a block has seen, warp by warp.
template <int kQueries, int kSize>
struct BlockSeen {
  float values[kAttendWarps][kQueries][kSize], tops[kAttendWarps][kQueries], totals[kAttendWarps][kQueries];
};

// Puts together what the warps have seen, as run `run` of the queries from `first` on.
template <int kQueries, int kSize>
__device__ __forceinline__ void store_run(const Attention& task, const BlockSeen<kQueries, kSize>& block, int first,
                                          int queries, int run, int runs) {
  for (int index = static_cast<int>(threadIdx.x); index < queries * kSize; index += 32 * kAttendWarps) {
    const int g = index / kSize, d = index % kSize;
    if (d >= task.size) continue;
    float top = block.tops[0][g], total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 1; w < kAttendWarps; ++w) top = fmaxf(top, block.tops[w][g]);
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      const float factor = exp2f(block.tops[w][g] - top);
      total += factor * block.totals[w][g];
      sum += factor * block.values[w][g][d];
    }
    const int64_t place = int64_t{first + g} * runs + run;
    task.parts[place * task.size + d] = sum;
    if (d == 0) {
      task.weights[2 * place] = top;
      task.weights[2 * place + 1] = total;
    }
  }
}

// The last of its key head's blocks: `queries` outputs from `first` on, a warp for each.
template <FloatType kType, int kSize>
__device__ __forceinline__ void combine_runs(const Attention& task, int first, int queries, int runs) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int own = static_cast<int>(threadIdx.x) / 32; own < queries; own += kAttendWarps) {
    const int64_t query = first + own;
    const float* const weights = task.weights + query * runs * 2;
    float top = kNoScore;
    for (int run = lane; run < runs; run += 32) top = fmaxf(top, __ldcg(weights + 2 * run));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
    float total = 0.0f, sums[kSize / 32] = {};
#pragma unroll 4
    for (int run = 0; run < runs; ++run) {
      const float factor = exp2f(__ldcg(weights + 2 * run) - top);
      total += factor * __ldcg(weights + 2 * run + 1);
#pragma unroll
      for (int i = 0; i < kSize / 32; ++i) {
        const int d = lane + 32 * i;
        if (d < task.size) sums[i] += factor * __ldcg(task.parts + (query * runs + run) * task.size + d);
      }
    }
#pragma unroll
    for (int i = 0; i < kSize / 32; ++i) {
      const int d = lane + 32 * i;
      if (d < task.size) store_element<kType>(task.out, query * task.size + d, sums[i] / total);
    }
  }
}

// Grid (runs, keys * sets): a set is up to kQueries queries of a key head, the first of them set * kQueries.
template <FloatType kType, int kLanes, int kQueries>
__global__ void __launch_bounds__(32 * kAttendWarps, 4) attend_kernel(Attention task) {
  using Shape = AttendShape<kType, kLanes, kQueries>;
  constexpr int kOwn = Shape::kOwn;
  __shared__ BlockSeen<kQueries, Shape::kSize> block;
  __shared__ bool is_last;
  let_next_kernel_start();
  wait_for_kernels_before();

  const int group = task.queries / task.keys, sets = (group + kQueries - 1) / kQueries;
  const int key = static_cast<int>(blockIdx.y) / sets, set = static_cast<int>(blockIdx.y) % sets;
  const int first = key * group + set * kQueries, queries = min(kQueries, group - set * kQueries);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int runs = static_cast<int>(gridDim.x), run = static_cast<int>(blockIdx.x);

  // The run's places, in whole steps of a block; the last runs may have none.
  const int64_t last = min(static_cast<int64_t>(__ldcg(task.position)), int64_t{task.places} - 1);
  const int written = static_cast<int>(max(int64_t{0}, last + 1));
  const int length = ((written + runs - 1) / runs + Shape::kStep - 1) / Shape::kStep * Shape::kStep;
  const int begin = run * length, end = min(begin + length, written);

  float q[kQueries][kOwn];
  Seen<kQueries, kOwn> seen;
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    Elements<kType, kOwn> share;
    const int column = lane % kLanes * kOwn;
    const auto* const from = static_cast<const ElementBits<kType>*>(task.q) + column;
    share.set(load_share<kType>(from, first + g, task.size, g < queries && column < task.size));
    seen.top[g] = kNoScore;
    seen.total[g] = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      q[g][i] = share.values[i] * task.scale;
      seen.values[g][i] = 0.0f;
    }
  }
  see_places<kType, kLanes>(task, key, begin, end, q, seen);
  join_rows<kLanes>(seen);
  if (lane < kLanes) {
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
      block.tops[warp][g] = seen.top[g];
      block.totals[warp][g] = seen.total[g];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) block.values[warp][g][lane * kOwn + i] = seen.values[g][i];
    }
  }
  __syncthreads();
  store_run(task, block, first, queries, run, runs);

  // All of the block's results are visible to every block before it counts as finished.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(task.finished + blockIdx.y, 1) == runs - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  combine_runs<kType, Shape::kSize>(task, first, queries, runs);
  if (threadIdx.x == 0) task.finished[blockIdx.y] = 0;
}

}  // namespace losa::decoder_step
