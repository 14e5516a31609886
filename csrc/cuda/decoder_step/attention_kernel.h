// Attention of one token over the places of a cache that have been written (flash-decoding). The places of a key head
// are split into ranges, one for each block. The head's last block to finish combines the splits, in the order of
// places.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/elements.h"

namespace losa::decoder_step {

struct Attention {
  const void* q;      // (queries, size): queries / keys neighbours share a key head
  const void* cache;  // (2, keys, room, size): keys, then values
  const int64_t* position;
  void* out;       // (queries, size)
  float* parts;    // (queries, splits, size): each split's sum of the values, weighted by 2^(score - top)
  float* weights;  // (queries, splits, 2): each split's top score and the sum of its weights
  int* finished;   // (queries,), zero before and afterwards: of each set of queries, how many blocks are done
  int queries, keys, size;
  int64_t room;
  int places;   // at most so many places of the cache are read, whatever the position is
  float scale;  // q k * scale are the exponents of 2 of the softmax
};

constexpr int kAttendWarps = 4;
// A score below the scores of all places. It is finite, so that the difference of two such scores is a number.
constexpr float kNoScore = -1e30f;

// kLanes lanes share a row of the cache, of up to kLanes * 16 bytes. A warp reads 32 / kLanes rows at once, for
// kQueries queries.
template <FloatType kType, int kLanes, int kQueries>
struct AttendShape {
  static constexpr int kOwn = kPerVector<kType>, kSize = kLanes * kOwn, kRows = 32 / kLanes;
  static constexpr int kRowsAtOnce = kQueries == 1 ? 4 : 2;  // rows of a lane in a step
  static constexpr int kStep = kAttendWarps * kRows * kRowsAtOnce;
};

// The softmax over some places: each query's top score, the sum of 2^(score - top), and the sum of the values weighted
// by this, of which a lane has its share of a row.
template <int kQueries, int kOwn>
struct SoftmaxSums {
  float top[kQueries], total[kQueries], values[kQueries][kOwn];
};

// A lane's 16 bytes of a row; its bytes of row 0 are at `first`. Zeros where there is no row.
template <FloatType kType>
__device__ __forceinline__ uint4 load_share(const ElementBits<kType>* first, int row, int size, bool exists) {
  if (!exists) return make_uint4(0, 0, 0, 0);
  return __ldcg(reinterpret_cast<const uint4*>(first + int64_t{row} * size));
}

// Adds places `begin` to `end` of a key head. All keys and values of a step are requested before the first one is used.
template <FloatType kType, int kLanes, int kQueries, int kOwn>
__device__ __forceinline__ void attend_places(const Attention& task, int key, int begin, int end,
                                              const float (&q)[kQueries][kOwn], SoftmaxSums<kQueries, kOwn>& sums) {
  using Shape = AttendShape<kType, kLanes, kQueries>;
  constexpr int kRowsAtOnce = Shape::kRowsAtOnce;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // The lane's share of a row; a lane beyond the row's end has none.
  const int share = lane % kLanes * kOwn, limit = share < task.size ? end : 0;
  const auto* const keys_from =
      static_cast<const ElementBits<kType>*>(task.cache) + key * task.room * task.size + share;
  const auto* const values_from = keys_from + task.keys * task.room * task.size;
  for (int base = begin; base < end; base += Shape::kStep) {
    const int first = base + warp * Shape::kRows + lane / kLanes;
    // Request keys and values.
    uint4 keys[kRowsAtOnce], stored[kRowsAtOnce];
#pragma unroll
    for (int t = 0; t < kRowsAtOnce; ++t) {
      const int place = first + t * kAttendWarps * Shape::kRows;
      keys[t] = load_share<kType>(keys_from, place, task.size, place < limit);  // [32 / kLanes, size]
    }
#pragma unroll
    for (int t = 0; t < kRowsAtOnce; ++t) {
      const int place = first + t * kAttendWarps * Shape::kRows;
      stored[t] = load_share<kType>(values_from, place, task.size, place < limit);  // [32 / kLanes, size]
    }
    // Scores: a row's lanes add up their shares of q k.
    float scores[kRowsAtOnce][kQueries];
#pragma unroll
    for (int t = 0; t < kRowsAtOnce; ++t) {
      Elements<kType, kOwn> k;
      k.set(keys[t]);
      const bool exists = first + t * kAttendWarps * Shape::kRows < end;
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) score += q[g][i] * k.values[i];
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) score += __shfl_xor_sync(~0u, score, distance);
        scores[t][g] = exists ? score : -INFINITY;
      }
    }
    // New top scores, and the sums so far in their terms.
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
      float top = sums.top[g];
#pragma unroll
      for (int t = 0; t < kRowsAtOnce; ++t) top = fmaxf(top, scores[t][g]);
      const float factor = exp2f(sums.top[g] - top);
      sums.top[g] = top;
      sums.total[g] *= factor;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sums.values[g][i] *= factor;
#pragma unroll
      for (int t = 0; t < kRowsAtOnce; ++t) sums.total[g] += scores[t][g] = exp2f(scores[t][g] - top);
    }
    // Weighted values.
#pragma unroll
    for (int t = 0; t < kRowsAtOnce; ++t) {
      Elements<kType, kOwn> v;
      v.set(stored[t]);
#pragma unroll
      for (int g = 0; g < kQueries; ++g) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) sums.values[g][i] += scores[t][g] * v.values[i];
      }
    }
  }
}

// Combines the sums of the lanes that have the same share of different rows. The result is in the first kLanes lanes.
template <int kLanes, int kQueries, int kOwn>
__device__ __forceinline__ void join_lanes(SoftmaxSums<kQueries, kOwn>& sums) {
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
      const float other = __shfl_xor_sync(~0u, sums.top[g], distance), top = fmaxf(sums.top[g], other);
      const float mine = exp2f(sums.top[g] - top), theirs = exp2f(other - top);
      sums.top[g] = top;
      sums.total[g] = mine * sums.total[g] + theirs * __shfl_xor_sync(~0u, sums.total[g], distance);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        sums.values[g][i] = mine * sums.values[g][i] + theirs * __shfl_xor_sync(~0u, sums.values[g][i], distance);
      }
    }
  }
}

// The sums of each warp of a block.
template <int kQueries, int kSize>
struct BlockSums {
  float values[kAttendWarps][kQueries][kSize], tops[kAttendWarps][kQueries], totals[kAttendWarps][kQueries];
};

// Combines the sums of the warps and stores them as split number `split` of the queries from `first` on.
template <int kQueries, int kSize>
__device__ __forceinline__ void store_split(const Attention& task, const BlockSums<kQueries, kSize>& block, int first,
                                            int queries, int split, int splits) {
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
    const int64_t place = int64_t{first + g} * splits + split;
    task.parts[place * task.size + d] = sum;
    if (d == 0) {
      task.weights[2 * place] = top;
      task.weights[2 * place + 1] = total;
    }
  }
}

// In the last of a key head's blocks: `queries` outputs from `first` on, a warp for each.
template <FloatType kType, int kSize>
__device__ __forceinline__ void combine_splits(const Attention& task, int first, int queries, int splits) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int q = static_cast<int>(threadIdx.x) / 32; q < queries; q += kAttendWarps) {
    const int64_t query = first + q;
    const float* const weights = task.weights + query * splits * 2;
    float top = kNoScore;
    for (int split = lane; split < splits; split += 32) top = fmaxf(top, __ldcg(weights + 2 * split));  // [splits]
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
    float total = 0.0f, own[kSize / 32] = {};
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float factor = exp2f(__ldcg(weights + 2 * split) - top);
      total += factor * __ldcg(weights + 2 * split + 1);
#pragma unroll
      for (int i = 0; i < kSize / 32; ++i) {
        const int d = lane + 32 * i;
        if (d < task.size) own[i] += factor * __ldcg(task.parts + (query * splits + split) * task.size + d);
      }
    }
#pragma unroll
    for (int i = 0; i < kSize / 32; ++i) {
      const int d = lane + 32 * i;
      if (d < task.size) store_element<kType>(task.out, query * task.size + d, own[i] / total);
    }
  }
}

// Grid (splits, keys * sets). A set is up to kQueries queries of a key head, from number set * kQueries on.
template <FloatType kType, int kLanes, int kQueries>
__global__ void __launch_bounds__(32 * kAttendWarps, 4) attend_kernel(Attention task) {
  using Shape = AttendShape<kType, kLanes, kQueries>;
  constexpr int kOwn = Shape::kOwn;
  __shared__ BlockSums<kQueries, Shape::kSize> block;
  __shared__ bool is_last;
  let_next_kernel_start();
  wait_for_kernels_before();

  const int group = task.queries / task.keys, sets = (group + kQueries - 1) / kQueries;
  const int key = static_cast<int>(blockIdx.y) / sets, set = static_cast<int>(blockIdx.y) % sets;
  const int first = key * group + set * kQueries, queries = min(kQueries, group - set * kQueries);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int splits = static_cast<int>(gridDim.x), split = static_cast<int>(blockIdx.x);

  // The split's places, in whole steps of a block. The last splits may have none.
  const int64_t last = min(static_cast<int64_t>(__ldcg(task.position)), int64_t{task.places} - 1);
  const int written = static_cast<int>(max(int64_t{0}, last + 1));
  const int length = ((written + splits - 1) / splits + Shape::kStep - 1) / Shape::kStep * Shape::kStep;
  const int begin = split * length, end = min(begin + length, written);

  // The queries, scaled.
  float q[kQueries][kOwn];
  SoftmaxSums<kQueries, kOwn> sums;
#pragma unroll
  for (int g = 0; g < kQueries; ++g) {
    Elements<kType, kOwn> share;
    const int column = lane % kLanes * kOwn;
    const auto* const from = static_cast<const ElementBits<kType>*>(task.q) + column;
    share.set(load_share<kType>(from, first + g, task.size, g < queries && column < task.size));  // [kLanes, kOwn]
    sums.top[g] = kNoScore;
    sums.total[g] = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      q[g][i] = share.values[i] * task.scale;
      sums.values[g][i] = 0.0f;
    }
  }
  attend_places<kType, kLanes>(task, key, begin, end, q, sums);
  join_lanes<kLanes>(sums);
  if (lane < kLanes) {
#pragma unroll
    for (int g = 0; g < kQueries; ++g) {
      block.tops[warp][g] = sums.top[g];
      block.totals[warp][g] = sums.total[g];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) block.values[warp][g][lane * kOwn + i] = sums.values[g][i];
    }
  }
  __syncthreads();
  store_split(task, block, first, queries, split, splits);

  // Every block sees this block's results before it counts as finished.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(task.finished + blockIdx.y, 1) == splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  combine_splits<kType, Shape::kSize>(task, first, queries, splits);
  if (threadIdx.x == 0) task.finished[blockIdx.y] = 0;
}

}  // namespace losa::decoder_step
