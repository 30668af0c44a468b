// SPDX-License-Identifier: Apache-2.0
// Wire blocks of a dispatch: each of my tokens once to every other rank that it names.
#pragma once
#include <climits>

#include "../device/lend.cuh"
#include "dispatch_rows.cuh"

namespace jax_ep {

constexpr int kThreads = kFullBlock;
constexpr int kWarps = kThreads / 32;
enum Output { kRows = 0, kScales = 1, kScalars = 2 };

struct Body {
  const DispatchParams& p;
  const Op& op;
  Roles roles;
  int chunk;  // tokens
  int chunks;
};

// Where a token's row goes: one target per rank, its first kept row there. Each lane has a pair of
// the token, its rank and row, if it is `wanted`; its scalar, if there is one, goes to its row.
__device__ inline Targets targets_of(const Body& b, const Borrowed& peers, bool wanted, int rank,
                                     int row, const float* scalar) {
  const DispatchParams& p = b.p;
  const int lane = lane_id();
  if (wanted && uint64_t(row + 1) * p.row_bytes > peers.bytes[rank][kRows]) {
    b.op.fail(Fault::kBounds, Phase::kRows, rank, row, peers.bytes[rank][kRows]);
    wanted = false;
  }
  if (wanted && scalar != nullptr) {
    reinterpret_cast<float*>(peers.output[rank][kScalars])[row] = *scalar;
  }
  Targets to;
  const int scale_count = p.hidden / kScaleBlock;
  for (unsigned todo = __ballot_sync(kAllLanes, wanted); todo != 0; ++to.count) {
    const int d = __shfl_sync(kAllLanes, rank, __ffs(todo) - 1);
    const bool same = wanted && rank == d;
    const int first = __reduce_min_sync(kAllLanes, same ? row : INT_MAX);
    if (lane == to.count) {
      to.row = peers.output[d][kRows] + size_t(first) * p.row_bytes;
      to.scales = reinterpret_cast<float*>(peers.output[d][kScales]) + size_t(first) * scale_count;
    }
    todo &= ~__ballot_sync(kAllLanes, same);
  }
  return to;
}

// Where my token t's row goes on other ranks of my node.
__device__ inline Targets remote_targets(const Body& b, const Borrowed& peers, int t,
                                         bool with_scalars) {
  const DispatchParams& p = b.p;
  const int K = p.exchange.top_k, lane = lane_id();
  const size_t pair = size_t(t) * K + lane;
  int rank = -1, row = -1;
  if (lane < K) {
    rank = p.pair_rank[pair];
    row = p.pair_row[pair];
  }
  const bool remote = row >= 0 && rank != b.op.me && b.op.reaches(rank);
  const bool scalars = with_scalars && p.scalars != nullptr;
  return targets_of(b, peers, remote, rank, row, scalars ? p.scalars + pair : nullptr);
}

template <Wire W, typename T>
__device__ void push_tokens(const Body& b) {
  __shared__ Borrowed peers;
  const DispatchParams& p = b.p;
  const int tokens = p.exchange.num_tokens, warps = b.roles.wire * kWarps;
  const int vecs = row_vecs<W, T>(p);
  const Cut cut = cut_rows(vecs, tokens, warps);
  if (!borrow_outputs(b.op, peers)) return;
  // Blocks first: the early items, so the early chunks, are spread over all of them.
  Tickets tickets(&b.op.header().wire_ticket, blockIdx.x + b.roles.wire * (threadIdx.x / 32),
                  warps);
  for (int i; (i = tickets.take(tokens * cut.segments)) >= 0;) {
    const int t = i / cut.segments, segment = i % cut.segments, chunk = t / b.chunk;
    const uint64_t broken = b.op.broken_word();
    Targets to = remote_targets(b, peers, t, segment == 0);
    // Delivered as T: the scales travel behind the values, inside the row's place.
    if (W == Wire::kDequantized) to.scales = reinterpret_cast<float*>(to.row + p.hidden);
    const int first = segment * cut.segment_vecs;
    if (to.count > 0) {
      send_row<W, T, false>(p, t, to, first, min_int(first + cut.segment_vecs, vecs));
    }
    const int in_chunk = min_int(b.chunk, tokens - chunk * b.chunk) * cut.segments;
    finish_item(b.op, chunk, in_chunk, b.op.node_first(), b.op.node_last());
    if (__any_sync(kAllLanes, broken != 0)) return;
  }
}

}  // namespace jax_ep
