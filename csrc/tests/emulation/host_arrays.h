// SPDX-License-Identifier: Apache-2.0
// A rank's arrays in the host's memory.
#pragma once
#include <algorithm>
#include <deque>
#include <type_traits>

#include "../../plan/host_plan.h"
#include "../rank_arrays.h"

namespace jax_ep {

// In `memory`: the case's inputs; all other arrays are ones.
inline RankArrays host_arrays(const Case& c, int r, std::deque<Bytes>& memory) {
  RankArrays arrays{};
  arrays.for_each(c, [&](auto*& pointer, size_t count) {
    memory.emplace_back(count * sizeof(*pointer) + 64, char(0xff));
    const auto base = reinterpret_cast<uintptr_t>(memory.back().data());
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(round_up(base, 16));
  });
  const size_t pairs = c.x.num_pairs();
  std::copy_n(c.topk_idx.begin() + r * pairs, pairs, arrays.topk_idx);
  auto copy = [](auto* to, const auto& from) { std::copy(from.begin(), from.end(), to); };
  copy(arrays.x, c.rows_in[r]);
  copy(arrays.scales, c.scales_in[r]);
  copy(arrays.scalars, c.scalars_in[r]);
  return arrays;
}

// The plan's tables, which an exchange reads.
inline void copy_plan(const HostPlan& plan, const Exchange& x, int r, PlanArrays& to) {
  const size_t pairs = x.num_pairs(), rows = x.num_rows, R = x.num_ranks, T = x.num_tokens;
  auto copy = [r](int32_t* to, const std::vector<int>& all, size_t count) {
    std::copy_n(all.begin() + r * count, count, to);
  };
  copy(to.pair_rank, plan.pair_rank, pairs);
  copy(to.pair_row, plan.pair_row, pairs);
  copy(to.row_pair, plan.row_pair, rows);
  copy(to.token_rows, plan.token_rows, R * pairs);
  copy(to.token_slot, plan.token_slot, R * T);
}

}  // namespace jax_ep
