// SPDX-License-Identifier: Apache-2.0
// The parameters of small batches' kernels over a rank's arrays.
#pragma once
#include "rank_arrays.h"

namespace jax_ep {

// The call of an operation on slots, or of a half of it: both halves have the whole one's
// signature.
inline Call slot_call(const Peers& peers, SlotKind kind, Half half) {
  const bool is_dispatch = kind == SlotKind::kDispatch;
  Call call = call_of(peers, is_dispatch ? Operation::kDispatch : Operation::kCombine);
  if (half == Half::kStart) {
    call.operation = is_dispatch ? Operation::kDispatchStart : Operation::kCombineStart;
  }
  if (half == Half::kDone) {
    call.operation = is_dispatch ? Operation::kDispatchDone : Operation::kCombineDone;
  }
  return call;
}

inline SlotDispatchParams slot_dispatch_params(const Case& c, const RankArrays& a, const Call& call,
                                               Half half) {
  SlotDispatchParams p{};
  p.call = call;
  p.exchange = c.x;
  p.half = half;
  p.hidden = c.hidden;
  p.row_bytes = row_bytes_of(c);
  p.zero_tail = c.zero_tail;
  p.power_of_two_scales = c.power_of_two;
  p.x = a.x;
  p.scales = c.prequantized ? a.scales : nullptr;
  p.scalars = c.weights ? a.scalars : nullptr;
  p.topk_idx = a.topk_idx;
  p.started = p.ticket = &a.tickets[0];
  p.plan = a.plan;
  p.rows = a.rows;
  p.row_scales = delivers_scales(c) ? a.row_scales : nullptr;
  p.row_scalars = c.weights ? a.row_scalars : nullptr;
  return p;
}

inline SlotCombineParams slot_combine_params(const Case& c, const RankArrays& a, const Call& call,
                                             Half half) {
  SlotCombineParams p{};
  p.call = call;
  p.exchange = c.x;
  p.half = half;
  p.hidden = c.hidden;
  p.quantized = c.quantized_partials;
  p.power_of_two_scales = c.power_of_two;
  p.y = a.y;
  p.weights = c.weights ? a.weights : nullptr;
  p.pair_rank = a.plan.pair_rank;
  p.pair_row = a.plan.pair_row;
  p.token_rows = a.plan.token_rows;
  p.started = p.ticket = &a.tickets[1];
  p.out = a.out;
  return p;
}

}  // namespace jax_ep
