// SPDX-License-Identifier: Apache-2.0
// The arrays of one rank for an exchange between nodes, wherever they lie, and the kernels'
// parameters over them.
#pragma once
#include "../plan/tiling.h"
#include "../rdma/launch.h"
#include "case.h"

namespace jax_ep {

inline bool delivers_scales(const Case& c) { return c.prequantized || c.wire == Wire::kQuantized; }
inline int row_bytes_of(const Case& c) {
  return c.hidden * (delivers_scales(c) ? 1 : int(size_of(c.type)));
}

struct RankArrays {
  int32_t *topk_idx, *scratch, *tickets;  // of starts, by SlotKind
  PlanArrays plan;
  char *x, *rows, *y, *out;
  float *scales, *scalars, *row_scales, *row_scalars, *weights, *scalars_out;

  // `visit(pointer, count)` for each of them.
  template <typename Visit>
  void for_each(const Case& c, Visit&& visit) {
    const Exchange& e = c.x;
    const size_t R = e.num_ranks, T = e.num_tokens, pairs = e.num_pairs(), rows_ = e.num_rows;
    const size_t H = c.hidden, S = H / kScaleBlock, row = H * size_of(c.type);
    visit(topk_idx, pairs);
    visit(scratch, PlanSizes::table_words(e));
    visit(tickets, size_t(2));
    visit(plan.pair_rank, pairs);
    visit(plan.pair_row, pairs);
    visit(plan.row_pair, rows_);
    visit(plan.token_rows, R * pairs);
    visit(plan.token_slot, R * T);
    visit(plan.expert_ids, rows_);
    visit(plan.counts, size_t(e.local_experts()));
    visit(plan.group_sizes, size_t(e.local_experts()));
    visit(plan.num_dropped, size_t(1));
    visit(x, T * H * (c.prequantized ? 1 : size_of(c.type)));
    visit(rows, rows_ * row_bytes_of(c));
    visit(y, rows_ * row);
    visit(out, T * row);
    visit(scales, T * S);
    visit(scalars, pairs);
    visit(row_scales, rows_ * S);
    visit(row_scalars, rows_);
    visit(weights, rows_);
    visit(scalars_out, pairs);
  }
};

// What rank r sees of the group, whose arenas are at `arenas`: those of its node.
inline Peers node_peers(const Case& c, int r, char* const* arenas) {
  Peers p{};
  p.at = control_layout(c.x.num_ranks);
  p.rank = r;
  p.num_ranks = c.x.num_ranks;
  p.node_ranks = c.ranks_per_node;
  p.node_first = r / p.node_ranks * p.node_ranks;
  for (int s = p.node_first; s < p.node_first + p.node_ranks; ++s) p.control[s] = arenas[s];
  return p;
}

inline Call call_of(const Peers& peers, Operation o) {
  Call c{};
  c.peers = peers;
  c.operation = o;
  c.signature = 0x1234 + static_cast<uint32_t>(o);
  return c;
}

inline PlanParams plan_params(const Case& c, const RankArrays& a, const Peers& peers) {
  PlanParams p{};
  p.call = call_of(peers, Operation::kPlan);
  p.exchange = c.x;
  p.topk_idx = a.topk_idx;
  p.out = a.plan;
  p.scratch = a.scratch;
  return p;
}

inline DispatchParams dispatch_params(const Case& c, const RankArrays& a, const Peers& peers) {
  DispatchParams p{};
  p.call = call_of(peers, Operation::kDispatch);
  p.exchange = c.x;
  p.hidden = c.hidden;
  p.row_bytes = row_bytes_of(c);
  p.zero_tail = c.zero_tail;
  p.x = a.x;
  p.scales = c.prequantized ? a.scales : nullptr;
  p.scalars = c.weights ? a.scalars : nullptr;
  p.pair_rank = a.plan.pair_rank;
  p.pair_row = a.plan.pair_row;
  p.row_pair = a.plan.row_pair;
  p.token_rows = a.plan.token_rows;
  p.rows = a.rows;
  p.row_scales = delivers_scales(c) ? a.row_scales : nullptr;
  p.row_scalars = c.weights ? a.row_scalars : nullptr;
  p.power_of_two_scales = c.power_of_two;
  const size_t rows = c.x.num_rows, scales = c.hidden / kScaleBlock;
  const void* lent[] = {a.rows, a.row_scales, a.row_scalars};
  const size_t bytes[] = {rows * p.row_bytes, rows * scales * sizeof(float), rows * sizeof(float)};
  for (int i = 0; i < kMaxOutputs; ++i) {
    p.call.lent.output[i] = {reinterpret_cast<uint64_t>(lent[i]), 0, 0};
    p.call.lent.bytes[i] = bytes[i];
  }
  return p;
}

inline CombineParams combine_params(const Case& c, const RankArrays& a, const Peers& peers) {
  CombineParams p{};
  p.call = call_of(peers, Operation::kCombine);
  p.exchange = c.x;
  p.hidden = c.hidden;
  p.y = a.y;
  p.weights = c.weights ? a.weights : nullptr;
  p.row_scalars = c.weights ? a.weights : nullptr;
  p.pair_rank = a.plan.pair_rank;
  p.pair_row = a.plan.pair_row;
  p.row_pair = a.plan.row_pair;
  p.token_rows = a.plan.token_rows;
  p.token_slot = a.plan.token_slot;
  p.out = a.out;
  p.scalars = a.scalars_out;
  p.power_of_two_scales = c.power_of_two;
  return p;
}

// The shapes of a case's messages.
inline MessageShape dispatch_shape(const Case& c, uint64_t slot_bytes) {
  const int scales = c.prequantized || c.wire != Wire::kCopy ? c.hidden / kScaleBlock : 0;
  const int values = c.wire == Wire::kDequantized ? c.hidden : row_bytes_of(c);
  return dispatch_message(c.x, values, scales, slot_bytes);
}
inline MessageShape combine_shape(const Case& c, uint64_t slot_bytes) {
  return combine_message(c.x, c.hidden * int(size_of(c.type)), slot_bytes);
}

// The kernels' parameters.
inline NodeRouting routing_of(const Case& c, const RankArrays& a, const Peers& peers,
                              const RingLayout& at) {
  const Call plan = call_of(peers, Operation::kPlan);
  return {call_of(peers, Operation::kRouting), plan.signature, c.x, a.topk_idx, at};
}
inline NodeDispatch dispatch_of(const Case& c, const RankArrays& a, const Peers& peers,
                                const RingLayout& at) {
  return {dispatch_params(c, a, peers), at, dispatch_shape(c, at.slot_bytes)};
}
inline NodeCombine combine_of(const Case& c, const RankArrays& a, const Peers& peers,
                              const RingLayout& at) {
  return {combine_params(c, a, peers), at, combine_shape(c, at.slot_bytes)};
}

}  // namespace jax_ep
