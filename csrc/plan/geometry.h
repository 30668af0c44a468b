// SPDX-License-Identifier: Apache-2.0
// Integer arithmetic of the plan, for host and device alike: who owns which expert, how many rows
// an expert is granted, how work is cut into chunks.
#pragma once
#include <cstdint>

#include "../layout/host_device.h"

namespace jax_ep {

// Sizes of one exchange: what Python calls the Spec.
struct Exchange {
  int num_ranks;    // R
  int num_experts;  // E
  int num_tokens;   // T, per rank
  int top_k;        // K
  int num_rows;     // rows of a rank's buffer
  int alignment;    // A
  int batched;      // 1: expert e's rows start at e * (rows / (E/R))

  JAX_EP_HD int local_experts() const { return num_experts / num_ranks; }
  JAX_EP_HD int num_pairs() const { return num_tokens * top_k; }
};

constexpr int kRowPadding = -1;  // row_pair of a row inside a segment that no pair owns
constexpr int kRowTail = -2;     // row_pair of a row outside every segment

JAX_EP_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
JAX_EP_HD constexpr int min_int(int a, int b) { return a < b ? a : b; }
JAX_EP_HD constexpr int max_int(int a, int b) { return a > b ? a : b; }

// Tokens of one chunk: what is published by one flag. About 128 chunks, never more than `most`.
JAX_EP_HD int chunk_tokens(int num_tokens, int most) {
  const int least = max_int(1, ceil_div(num_tokens, most));
  return max_int(least, min_int(32, ceil_div(num_tokens, 128)));
}

constexpr int kSegmentVecs = 128;  // 16-byte vectors that a warp takes at a time: 4 a lane

// How a row of `vecs` vectors is cut, so that `tokens` rows give every warp about two pieces: each
// but the last has `segment_vecs` vectors, a multiple of kSegmentVecs.
struct Cut {
  int segments;
  int segment_vecs;
};

JAX_EP_HD Cut cut_rows(int vecs, int tokens, int warps) {
  const int most = max_int(1, ceil_div(vecs, kSegmentVecs));
  const int wanted = min_int(most, max_int(1, ceil_div(2 * warps, max_int(1, tokens))));
  const int segment_vecs = ceil_div(most, wanted) * kSegmentVecs;
  return {max_int(1, ceil_div(vecs, segment_vecs)), segment_vecs};
}

// How the blocks of a launch share the roles: the first `wire` push to peers, the last `local` work
// in this rank's memory. A single block has both roles, pushes first.
struct Roles {
  int wire;
  int local;
};

JAX_EP_HD Roles split_roles(int num_blocks, int num_ranks, int wire_share_percent) {
  if (num_ranks == 1) return {0, num_blocks};
  if (num_blocks == 1) return {1, 1};
  const int wire = max_int(1, min_int(num_blocks - 1, num_blocks * wire_share_percent / 100));
  return {wire, num_blocks - wire};
}

// Number of a warp among those of the blocks that only work locally, neighbours on different SMs;
// at least `warps` for the others.
JAX_EP_HD int local_warp(const Roles& roles, int block, int num_blocks, int warp_in_block,
                         int warps_per_block) {
  const int first = num_blocks - roles.local;
  if (block < first) return roles.local * warps_per_block;
  return block - first + roles.local * warp_in_block;
}

// Highest level L with sum(min(blocks_e, L)) <= budget, by bisection; `sum_at(L)` gives the sum.
template <typename SumAt>
JAX_EP_HD int water_level(int most, int budget, SumAt&& sum_at) {
  int low = 0, high = most + 1;  // the level is in [low, high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (sum_at(middle) <= budget) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace jax_ep
