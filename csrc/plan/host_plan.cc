// SPDX-License-Identifier: Apache-2.0
#include "host_plan.h"

#include <algorithm>
#include <set>

namespace jax_ep {

std::vector<int> grant_blocks(const std::vector<int>& blocks, int budget) {
  auto sum_at = [&](int level) {
    int sum = 0;
    for (int b : blocks) sum += std::min(b, level);
    return sum;
  };
  const int most = blocks.empty() ? 0 : *std::max_element(blocks.begin(), blocks.end());
  const int level = water_level(most, budget, sum_at);
  int left = budget - sum_at(level);
  std::vector<int> granted;
  for (int b : blocks) {
    const bool more = b > level && left > 0;
    granted.push_back(std::min(b, level) + more);
    left -= more;
  }
  return granted;
}

HostPlan host_plan(const Exchange& x, const std::vector<int>& topk_idx) {
  const int R = x.num_ranks, T = x.num_tokens, K = x.top_k, local = x.local_experts(),
            A = x.alignment;
  const int pairs = R * T * K, rows = x.num_rows;
  HostPlan p;
  p.pair_rank.assign(pairs, -1);
  p.pair_row.assign(pairs, -1);
  p.row_pair.assign(size_t(R) * rows, kRowTail);
  p.expert_ids.assign(size_t(R) * rows, -1);
  p.token_rows.assign(size_t(R) * pairs, -1);
  p.token_slot.assign(size_t(R) * R * T, 0);
  p.counts.assign(x.num_experts, 0);
  p.group_sizes.assign(x.num_experts, 0);
  p.num_dropped.assign(R, 0);
  std::vector<std::vector<int>> by_expert(x.num_experts);  // pairs in (source, token, k) order
  for (int i = 0; i < pairs; ++i) {
    if (topk_idx[i] < 0) continue;
    by_expert[topk_idx[i]].push_back(i);
    p.pair_rank[i] = topk_idx[i] / local;
  }
  for (int r = 0; r < R; ++r) {
    std::vector<int> blocks;
    for (int e = 0; e < local; ++e)
      blocks.push_back(ceil_div(int(by_expert[r * local + e].size()), A));
    const std::vector<int> granted = grant_blocks(blocks, rows / A);
    int start = 0;
    for (int e = 0; e < local; ++e) {
      const std::vector<int>& asked = by_expert[r * local + e];
      const int room = x.batched ? rows / local : granted[e] * A;
      const int kept = std::min(int(asked.size()), room);
      const int size = std::min(ceil_div(kept, A) * A, room);
      for (int i = 0; i < size; ++i)
        p.row_pair[size_t(r) * rows + start + i] = i < kept ? asked[i] : kRowPadding;
      for (int i = 0; i < kept; ++i) {
        p.expert_ids[size_t(r) * rows + start + i] = e;
        p.pair_row[asked[i]] = start + i;
      }
      p.counts[r * local + e] = kept;
      p.group_sizes[r * local + e] = size;
      p.num_dropped[r] += int(asked.size()) - kept;
      start += room;
    }
    for (int token = 0; token < R * T; ++token) {
      std::vector<int> mine;
      std::set<int> below;
      for (int k = 0; k < K; ++k) {
        const int pair = token * K + k, owner = p.pair_rank[pair];
        if (owner == r && p.pair_row[pair] >= 0) mine.push_back(p.pair_row[pair]);
        if (owner >= 0 && owner < r && owner != token / T) below.insert(owner);
      }
      std::sort(mine.begin(), mine.end());
      std::copy(mine.begin(), mine.end(), p.token_rows.begin() + (size_t(r) * R * T + token) * K);
      p.token_slot[size_t(r) * R * T + token] = int(below.size());
    }
  }
  return p;
}

}  // namespace jax_ep
