// SPDX-License-Identifier: Apache-2.0
// What an exchange between nodes must come to, of one rank, bit for bit.
#pragma once
#include <cstdio>

#include "expect.h"
#include "node_cases.h"

namespace jax_ep {

template <typename T>
void expect_same(const char* name, int rank, const T* got, const std::vector<T>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) == 0) continue;
    std::printf("  %s of rank %d differs at %zu of %zu: got %g, expected %g\n", name, rank, i,
                want.size(), double(got[i]), double(want[i]));
    ++failures;
    return;
  }
}

inline void check_plan(const Exchange& x, const HostPlan& plan, int r, const PlanArrays& got) {
  const size_t R = x.num_ranks, pairs = x.num_pairs(), rows = x.num_rows, T = x.num_tokens,
               local = x.local_experts();
  auto expect = [r](const char* name, const int32_t* got, const std::vector<int>& all, size_t n) {
    expect_same(name, r, got, std::vector<int>(&all[r * n], &all[r * n] + n));
  };
  expect("pair_rank", got.pair_rank, plan.pair_rank, pairs);
  expect("pair_row", got.pair_row, plan.pair_row, pairs);
  expect("row_pair", got.row_pair, plan.row_pair, rows);
  expect("expert_ids", got.expert_ids, plan.expert_ids, rows);
  expect("token_rows", got.token_rows, plan.token_rows, R * pairs);
  expect("token_slot", got.token_slot, plan.token_slot, R * T);
  expect("counts", got.counts, plan.counts, local);
  expect("group_sizes", got.group_sizes, plan.group_sizes, local);
  expect("num_dropped", got.num_dropped, plan.num_dropped, 1);
}

inline void check_dispatch(const Case& c, const HostPlan& plan, int r, const char* rows,
                           const float* scales, const float* weights) {
  const HostRows want = host_dispatch(c, plan, r);
  expect_same("rows", r, rows, want.rows);
  if (delivers_scales(c)) expect_same("scales", r, scales, want.scales);
  if (c.weights) expect_same("weights", r, weights, want.scalars);
}

inline void check_scalars(const Case& c, const HostPlan& plan, const Results& results, int r,
                          const float* scalars) {
  const size_t pairs = c.x.num_pairs();
  std::vector<float> want;
  for (size_t pair = r * pairs; pair < (r + 1) * pairs; ++pair) {
    const int row = plan.pair_row[pair];
    want.push_back(row < 0 ? 0.0f : results.weights[plan.pair_rank[pair]][row]);
  }
  expect_same("scalars", r, scalars, want);
}

inline void check_combine(const Case& c, const HostPlan& plan, const Results& results, int r,
                          const char* out, const float* scalars) {
  expect_same("combined", r, out, host_combine(c, plan, results.y, results.weights, r));
  if (c.weights) check_scalars(c, plan, results, r, scalars);
}

inline void check_no_fault(const FaultRecord& f) {
  if (f.fault == 0) return;
  std::printf("  rank %d: fault %u in phase %u of operation %u, awaiting rank %d\n", f.rank,
              f.fault, f.phase, f.operation, f.awaited);
  ++failures;
}

inline void describe(int i, const NodeCase& n) {
  const Exchange& x = n.c.x;
  std::printf(
      "case %d: %dx%d E=%d T=%d K=%d rows=%d A=%d H=%d type=%d wire=%d pre=%d slots=%d "
      "slot_bytes=%d blocks=%d\n",
      i, n.nodes, n.c.ranks_per_node, x.num_experts, x.num_tokens, x.top_k, x.num_rows, x.alignment,
      n.c.hidden, int(n.c.type), int(n.c.wire), n.c.prequantized, n.rings.slots, n.rings.slot_bytes,
      n.blocks);
}

}  // namespace jax_ep
