// SPDX-License-Identifier: Apache-2.0
// Local work of a dispatch: own tokens to their rows here, arrived rows to the others of their
// tokens, zeros where no pair is.
#pragma once
#include "dispatch_push.cuh"

namespace jax_ep {

constexpr int kLead = 8;  // chunks

// The rows of source token `token` (source * T + t) here.
__device__ inline Targets local_targets(const DispatchParams& p, size_t token) {
  const int K = p.exchange.top_k, lane = lane_id();
  const int row = lane < K ? p.token_rows[token * K + lane] : -1;
  Targets to;
  to.count = __popc(__ballot_sync(kAllLanes, row >= 0));
  if (row >= 0) {
    to.row = p.rows + size_t(row) * p.row_bytes;
    to.scales = p.row_scales + size_t(row) * (p.hidden / kScaleBlock);
  }
  return to;
}

__device__ inline Targets without_first(Targets all) {
  all.row = of_lane(all.row, lane_id() + 1);
  all.scales = of_lane(all.scales, lane_id() + 1);
  --all.count;
  return all;
}

// One segment of one of this rank's own tokens.
template <Wire W, typename T>
__device__ void place_own(const Body& b, const Cut& cut, int item) {
  const DispatchParams& p = b.p;
  const int K = p.exchange.top_k, vecs = row_vecs<W, T>(p);
  const int t = item / cut.segments, segment = item % cut.segments;
  const Targets to = local_targets(p, size_t(b.op.me) * p.exchange.num_tokens + t);
  if (segment == 0 && p.scalars != nullptr && lane_id() < K) {
    const size_t pair = size_t(t) * K + lane_id();
    if (p.pair_rank[pair] == b.op.me && p.pair_row[pair] >= 0) {
      p.row_scalars[p.pair_row[pair]] = p.scalars[pair];
    }
  }
  if (to.count == 0) return;
  const int first = segment * cut.segment_vecs;
  send_row<W, T, W == Wire::kDequantized>(p, t, to, first, min_int(first + cut.segment_vecs, vecs));
}

// Zeros where no pair is: padding inside segments always, the tail if asked; scalars everywhere.
// By the blocks that do not push.
__device__ inline void zero_unowned(const Body& b) {
  const DispatchParams& p = b.p;
  const int blocks = b.roles.local, warps = blocks * kWarps;
  const int warp = blockIdx.x - (gridDim.x - blocks) + blocks * (threadIdx.x / 32);
  const int rows = p.exchange.num_rows, scale_count = p.hidden / kScaleBlock;
  for (int base = warp * 32; base < rows; base += warps * 32) {
    const int row = base + lane_id();
    const int pair = row < rows ? p.row_pair[row] : 0;
    if (pair < 0 && p.row_scalars != nullptr) p.row_scalars[row] = 0.0f;
    const bool zero = pair == kRowPadding || (pair == kRowTail && p.zero_tail);
    for (unsigned todo = __ballot_sync(kAllLanes, zero); todo != 0; todo &= todo - 1) {
      const size_t r = base + __ffs(todo) - 1;
      auto* to = reinterpret_cast<Vec*>(p.rows + r * p.row_bytes);
      for (int v = lane_id(); v < p.row_bytes / int(sizeof(Vec)); v += 32) store_row(to + v, Vec{});
      if (p.row_scales == nullptr) continue;
      for (int j = lane_id(); j < scale_count; j += 32) p.row_scales[r * scale_count + j] = 0.0f;
    }
  }
}

// One segment of a token of another rank: from the row that arrived to the token's other rows here.
// Items go chunk by chunk over all sources, as they arrive. False: give up. kForwarded: nothing is
// left to do of ranks of other nodes whose messages come here (rdma/dispatch_messages.cuh).
template <Wire W, typename T, bool kForwarded>
__device__ bool expand_arrived(const Body& b, const Cut& cut, int item, float* held) {
  const DispatchParams& p = b.p;
  const int others = b.op.R - 1, per_token = others * cut.segments;
  const int t = item / per_token, rest = item % per_token, segment = rest % cut.segments;
  const int source = (b.op.me + 1 + rest / cut.segments) % b.op.R;
  if (kForwarded && !b.op.reaches(source)) {
    const int L = b.op.call.peers.node_ranks;
    if (source % L == b.op.me % L) return true;
  }
  const Targets all = local_targets(p, size_t(source) * p.exchange.num_tokens + t);
  if (!await_chunk(b.op, t / b.chunk, source, source + 1)) return false;
  if (all.count == 0) return true;
  const char* arrived = of_lane(all.row, 0);
  if constexpr (W == Wire::kDequantized) {
    dequantize_row<T>(p, arrived, all, held);
  } else if (all.count > 1) {
    const Targets to = without_first(all);
    const int first = segment * cut.segment_vecs, vecs = p.row_bytes / int(sizeof(Vec));
    copy_row<true>(arrived, to, first, min_int(first + cut.segment_vecs, vecs));
    if (segment == 0 && p.row_scales != nullptr) {
      copy_scales(of_lane(all.scales, 0), to, p.hidden / kScaleBlock);
    }
  }
  return true;
}

// Local work, by all blocks: those that push come when they have pushed. First own tokens, to be
// busy until the peers' arrive. Rows that expand in place are read where they are written: they
// take turns with own tokens after `kLead` chunks of those, while they are still in cache. Others
// do not gain by it.
template <Wire W, typename T, bool kForwarded = false>
__device__ void work_locally(const Body& b, float* held) {
  const DispatchParams& p = b.p;
  const int tokens = p.exchange.num_tokens, others = b.op.R - 1, warps = gridDim.x * kWarps;
  const Cut own = cut_rows(row_vecs<W, T>(p), tokens, 4 * warps);
  // A row that expands in place is one item.
  const int arrived_vecs = W == Wire::kDequantized ? 1 : p.row_bytes / int(sizeof(Vec));
  const Cut arrived = cut_rows(arrived_vecs, tokens * max_int(others, 1), 4 * warps);
  const int own_items = b.chunk * own.segments, arrived_items = b.chunk * others * arrived.segments;
  const int lead = W == Wire::kDequantized ? min_int(kLead, b.chunks) : b.chunks;
  const int first_turn = lead * own_items, own_in_turn = lead < b.chunks ? own_items : 0;
  const int turn = max_int(own_in_turn + arrived_items, 1);  // 1: a group of one rank
  const int end = first_turn + b.chunks * (own_in_turn + arrived_items);
  const int warp = local_warp(b.roles, blockIdx.x, gridDim.x, threadIdx.x / 32, kWarps);
  Tickets tickets(&b.op.header().local_ticket, warp, b.roles.local * kWarps);
  for (int i; (i = tickets.take(end)) >= 0;) {
    const int after = i - first_turn, chunk = after / turn, item = after % turn;
    if (after < 0 || item < own_in_turn) {
      const int at = after < 0 ? i : first_turn + chunk * own_items + item;
      if (at < tokens * own.segments) place_own<W, T>(b, own, at);
    } else {
      const int at = chunk * arrived_items + item - own_in_turn;
      if (at >= tokens * others * arrived.segments) continue;
      if (!expand_arrived<W, T, kForwarded>(b, arrived, at, held)) return;
    }
  }
}

// By one block of a broken launch.
__device__ inline void poison_dispatch(const DispatchParams& p) {
  const size_t rows = p.exchange.num_rows;
  poison_bytes(p.rows, rows * p.row_bytes);
  poison_bytes(p.row_scales, rows * (p.hidden / kScaleBlock) * sizeof(float));
  poison_bytes(p.row_scalars, rows * sizeof(float));
}

}  // namespace jax_ep
