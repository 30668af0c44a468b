// SPDX-License-Identifier: Apache-2.0
// How many rows each expert gets, and where they begin: the same on every rank.
#pragma once
#include "../device/warp.cuh"
#include "../plan/tiling.h"

namespace jax_ep {

// Of each expert of the group; in shared memory.
struct Segments {
  int32_t* kept;   // pairs that have a row
  int32_t* start;  // first row, in the owner's buffer
  int32_t* room;   // rows
};

// What is known before: also of each expert.
struct Wanted {
  const int32_t* totals;  // pairs
  int32_t* blocks;        // of A rows, for all of them
};

// Of each expert at most C pairs, each expert at its own place. By one warp, for the experts of a
// rank, which begin with `first`.
__device__ inline void batched_segments(const PlanSizes& sizes, int A, const Wanted& wanted,
                                        int first, const Segments& seg) {
  const int C = sizes.expert_rows;
#pragma unroll 1
  for (int i = lane_id(); i < sizes.local; i += 32) {
    const int e = first + i;
    seg.kept[e] = min_int(wanted.totals[e], C);
    seg.start[e] = i * C;
    seg.room[e] = min_int(wanted.blocks[e] * A, C);
  }
}

// Cut the blocks that a rank's experts want down to the budget. By one warp, of which this lane has
// the experts [from, to), the lanes after it those that follow. The lane's blocks afterwards.
__device__ __noinline__ inline int cut_to_budget(int32_t* blocks, int from, int to, int budget) {
  auto sum_at = [&](int level) {
    int sum = 0;
#pragma unroll 1
    for (int e = from; e < to; ++e) sum += min_int(blocks[e], level);
    return warp_sum(sum);
  };
  int most = 0, hungry = 0, granted = 0, all;
#pragma unroll 1
  for (int e = from; e < to; ++e) most = max_int(most, blocks[e]);
  const int level = water_level(warp_max(most), budget, sum_at);
  const int left = budget - sum_at(level);
#pragma unroll 1
  for (int e = from; e < to; ++e) hungry += blocks[e] > level;
  int order = warp_prefix(hungry, &all);
#pragma unroll 1
  for (int e = from; e < to; ++e) {
    if (blocks[e] > level) blocks[e] = level + (order++ < left);
    granted += blocks[e];
  }
  return granted;
}

// The experts' segments one behind the other. By one warp, as above; each lane has a run of
// neighbouring experts, so that one prefix sum over the lanes is enough.
__device__ inline void ragged_segments(const PlanSizes& sizes, int A, const Wanted& wanted,
                                       int first, const Segments& seg) {
  const int local = sizes.local, per_lane = (local + 31) / 32, budget = sizes.most_blocks;
  const int from = first + min_int(lane_id() * per_lane, local);
  const int to = min_int(from + per_lane, first + local);
  int mine = 0, all;
#pragma unroll 4
  for (int e = from; e < to; ++e) mine += wanted.blocks[e];
  int before = warp_prefix(mine, &all);
  if (all > budget) {  // the same in all lanes
    before = warp_prefix(cut_to_budget(wanted.blocks, from, to, budget), &all);
  }
  int start = before * A;
  constexpr int kBatch = 4;  // loads that stores do not wait for
  for (int base = from; base < to; base += kBatch) {
    int blocks[kBatch], totals[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int e = min_int(base + j, to - 1);
      blocks[j] = wanted.blocks[e];
      totals[j] = wanted.totals[e];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int e = base + j, room = blocks[j] * A;
      if (e >= to) break;
      seg.kept[e] = min_int(totals[j], room);
      seg.start[e] = start;
      seg.room[e] = room;
      start += room;
    }
  }
}

}  // namespace jax_ep
