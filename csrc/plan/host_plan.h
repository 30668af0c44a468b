// SPDX-License-Identifier: Apache-2.0
// The plan by a stable sort on the host: what the kernel is tested against.
#pragma once
#include <vector>

#include "geometry.h"

namespace jax_ep {

struct HostPlan {  // of the whole group; the arrays of PlanParams with a leading rank axis
  std::vector<int> pair_rank, pair_row;     // [R, T, K]
  std::vector<int> row_pair, expert_ids;    // [R, rows]
  std::vector<int> token_rows, token_slot;  // [R, R*T, K], [R, R*T]
  std::vector<int> counts, group_sizes;     // [R, E/R]
  std::vector<int> num_dropped;             // [R]
};

// `topk_idx` is [R, T, K].
HostPlan host_plan(const Exchange& x, const std::vector<int>& topk_idx);

// Blocks granted to each expert of one rank: the highest level that fits, then one block each,
// lowest id first.
std::vector<int> grant_blocks(const std::vector<int>& blocks, int budget);

}  // namespace jax_ep
