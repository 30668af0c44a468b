// SPDX-License-Identifier: Apache-2.0
// The arrays of a plan, from experts, rows and segments that are known.
#pragma once
#include "../device/op.cuh"
#include "../device/warp.cuh"
#include "../plan/tiling.h"
#include "launch.h"
#include "plan_segments.cuh"

namespace jax_ep {

// The lanes of one token's pairs: a group as large as the power of two from K on, of which this
// lane has pair `k`.
struct TokenLanes {
  int shift, width, k, first;
  unsigned lanes;

  __device__ explicit TokenLanes(int K) {
    shift = K == 1 ? 0 : 32 - __clz(K - 1);
    width = 1 << shift;
    k = lane_id() & (width - 1);
    first = lane_id() - k;
    lanes = (width == 32 ? kAllLanes : (1u << width) - 1) << first;
  }
};

// By one warp: what the plan says of this lane's pair of `token` (of the group), whose expert is
// `e`
// (-1: none) and whose row, on the expert's rank, is `row` (-1: none, or dropped).
__device__ inline void place_token(const PlanArrays& out, const Exchange& x, const PlanSizes& sizes,
                                   int me, const TokenLanes& lanes, int token, bool is_pair, int e,
                                   int row) {
  const int K = x.top_k, k = lanes.k;
  const int source = sizes.by_tokens(token), owner = e < 0 ? -1 : sizes.by_local(e);
  const bool mine = owner == me && row >= 0;
  int smaller = 0, earlier_empty = 0;
  bool first_of_rank = owner >= 0 && owner != source && owner < me;
  for (int j = 0; j < K; ++j) {
    const int other = __shfl_sync(kAllLanes, mine ? row : -1, lanes.first + j);
    const int other_owner = __shfl_sync(kAllLanes, owner, lanes.first + j);
    smaller += other >= 0 && other < row;
    earlier_empty += other < 0 && j < k;
    if (j < k && other_owner == owner) first_of_rank = false;
  }
  const int found = __popc(__ballot_sync(kAllLanes, mine) & lanes.lanes);
  const int slot = __popc(__ballot_sync(kAllLanes, first_of_rank) & lanes.lanes);
  if (!is_pair) return;
  out.token_rows[size_t(token) * K + (mine ? smaller : found + earlier_empty)] = mine ? row : -1;
  if (k == 0) out.token_slot[token] = slot;
  if (mine) out.row_pair[row] = token * K + k;
  if (source == me) {
    const int pair = (token - source * x.num_tokens) * K + k;
    out.pair_rank[pair] = owner;
    out.pair_row[pair] = row;
  }
}

// The local expert of a row of rank `me`, or what else it is.
__device__ inline int expert_of_row(const Exchange& x, int me, const Segments& seg, int row) {
  const int local = x.local_experts(), first = me * local;
  const int32_t* start = seg.start + first;
  int low = 0, high = local;  // the last segment that starts at or before the row
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (start[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int position = row - start[low];
  if (position < seg.kept[first + low]) return low;
  return position < seg.room[first + low] ? kRowPadding : kRowTail;
}

// What no pair says: experts of rows, padding, tail; rows `row`, `row + step` and so on.
__device__ inline void describe_rows(const PlanArrays& out, const Exchange& x, int me,
                                     const Segments& seg, int row, int step) {
  for (; row < x.num_rows; row += step) {
    const int e = expert_of_row(x, me, seg, row);
    out.expert_ids[row] = e < 0 ? -1 : e;
    if (e < 0) out.row_pair[row] = e;
  }
}

// By one warp. `totals`: pairs of each expert of the group.
__device__ inline void describe_experts(const PlanArrays& out, const Exchange& x, int me,
                                        const Segments& seg, const int32_t* totals) {
  const int local = x.local_experts(), first = me * local;
  int dropped = 0;
#pragma unroll 1
  for (int e = lane_id(); e < local; e += 32) {
    out.counts[e] = seg.kept[first + e];
    out.group_sizes[e] = seg.room[first + e];
    dropped += totals[first + e] - seg.kept[first + e];
  }
  dropped = warp_sum(dropped);
  if (lane_id() == 0) out.num_dropped[0] = dropped;
}

// Rare, hence out of line.
__device__ __noinline__ inline void poison_plan(const PlanArrays& out, const Exchange& x) {
  const size_t pairs = x.num_pairs();
  poison_bytes(out.pair_rank, 4 * pairs);
  poison_bytes(out.pair_row, 4 * pairs);
  poison_bytes(out.row_pair, 4 * size_t(x.num_rows));
  poison_bytes(out.expert_ids, 4 * size_t(x.num_rows));
  poison_bytes(out.token_rows, 4 * pairs * x.num_ranks);
  poison_bytes(out.token_slot, 4 * size_t(x.num_tokens) * x.num_ranks, 0);
  poison_bytes(out.counts, 4 * x.local_experts(), 0);
  poison_bytes(out.group_sizes, 4 * x.local_experts(), 0);
  poison_bytes(out.num_dropped, 4, 0);
}

}  // namespace jax_ep
