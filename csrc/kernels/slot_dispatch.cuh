// SPDX-License-Identifier: Apache-2.0
// dispatch of a small batch, plan included: one launch, one flight.
//
//           data warps                                    post warp (of each block)
//   start   per token of mine (a block has one, or few):    the header; choices -> every peer's
//             its row -> the slot of each peer that it        inbox, as words
//             names (quantised on the way)
//                                       rows are pushed ->  the token's flag on these peers
//   done    all choices of the group -> the plan, by each
//             block for itself (slot_routing.cuh)
//                                     the plan is there ->  awaits the flags of the peers' tokens
//           per own token: its row -> each of its rows        whose rows this block places
//             here; and what the plan says of all tokens
//                                       <- rows are there
//           per peer's token: from its slot to each of      experts of rows, padding, tail;
//             its rows here                                   every peer's hello
//
// `start` and `done` are one launch or two. Nothing of ours is resident between the two. Rows are
// the large path's, bit for bit. Slots, and who may overwrite them when: device/slots.cuh. Where a
// group spans nodes, other nodes' peers get all that by the network: rdma/slot_dispatch_nodes.cuh.
#pragma once
#include "../device/kernel.cuh"
#include "slot_rows.cuh"

namespace jax_ep {

// By the post warp: words of the block's own tokens. `first` is this lane's choice of the first of
// them.
template <typename S>
__device__ void post_words(const SlotDispatchParams& p, const S& s, const Share& share, int first) {
  for (int i = 0; i < share.own; ++i) {
    const int t = share.own_token(i);
    push_words(p, s, t, i == 0 ? first : choice_of_lane(p, t));
  }
  if (blockIdx.x == 0) s.greet();
}

// By the post warp: flags of the rows of the block's own tokens, once they are pushed.
template <typename S>
__device__ void post_rows(const SlotDispatchParams& p, const PlanSizes& sizes, const S& s,
                          const Share& share, int first) {
  if (s.op.R == 1) return;
  const int own = share.own;
  for (int from = 0; from < own; from += kSlotGroup) {
    rows_pushed(from + kSlotGroup >= own);
    for (int i = from; i < min_int(from + kSlotGroup, own); ++i) {
      const int t = share.own_token(i);
      const RankSet named = named_by(p, sizes, i == 0 ? first : choice_of_lane(p, t));
      for (int r = lane_id(); r < s.op.R; r += 32) {
        if (s.stores_to(r) && named.has(r)) {
          store_release_sys(s.outbox(r).flag(t), s.tag);  // publishes the token's row
        }
      }
    }
  }
}

// What no pair says of rows, by warp number `warp` of `warps` of the launch: experts, and zeros in
// padding, and in the tail if asked. Scalars are zero in both.
__device__ inline void describe_and_zero(const SlotDispatchParams& p, const SlotOp& s,
                                         const Segments& seg, int warp, int warps) {
  const int rows = p.exchange.num_rows, scales = p.hidden / kScaleBlock;
  for (int base = warp * 32; base < rows; base += warps * 32) {
    const int row = base + lane_id();
    int state = 0;
    if (row < rows) {
      state = expert_of_row(p.exchange, s.op.me, seg, row);
      p.plan.expert_ids[row] = max_int(state, -1);
      if (state < 0) p.plan.row_pair[row] = state;
      if (state < 0 && p.row_scalars != nullptr) p.row_scalars[row] = 0.0f;
    }
    const bool zero = state == kRowPadding || (state == kRowTail && p.zero_tail);
    for (unsigned todo = __ballot_sync(kAllLanes, zero); todo != 0; todo &= todo - 1) {
      const size_t r = base + __ffs(todo) - 1;
      auto* to = reinterpret_cast<Vec*>(p.rows + r * p.row_bytes);
      for (int v = lane_id(); v < p.row_bytes / int(sizeof(Vec)); v += 32) store_row(to + v, Vec{});
      if (p.row_scales == nullptr) continue;
      for (int j = lane_id(); j < scales; j += 32) p.row_scales[r * scales + j] = 0.0f;
    }
  }
}

// Whether there may be rows to zero: then the data warps describe rows too.
__device__ inline bool may_zero(const SlotDispatchParams& p) {
  return p.zero_tail || p.exchange.alignment > 1;
}

// What the data warps of a block share.
template <Wire W, typename T, typename S>
struct Work {
  const SlotDispatchParams& p;
  const SlotDispatchSizes& sizes;
  const S& s;
  const SlotShared& shared;
  const Share& share;
};

// By one warp: what the plan says of the n-th token at hand.
template <Wire W, typename T, typename S>
__device__ void describe_token(const Work<W, T, S>& work, const AtHand& hand, int n) {
  const auto& [p, sizes, s, shared, share] = work;
  const int token = share.any(sizes.plan.by_tokens, hand.first + n).of_group(share.T);
  const Pair pair(p, shared, hand, n, token);
  place_token(p.plan, p.exchange, sizes.plan, s.op.me, TokenLanes(32), token,
              lane_id() < p.exchange.top_k, pair.expert, pair.row);
}

// By one warp: one of its tasks of the n-th own token at hand.
template <Wire W, typename T, typename S>
__device__ void place_own_task(const Work<W, T, S>& work, const AtHand& hand, int number,
                               const Early& early, const WireVec<W, T>& first) {
  const auto& [p, sizes, s, shared, share] = work;
  const Task task(sizes.by_x_tasks, sizes.x_tasks, number);
  const int t = share.own_token(hand.first + task.n);
  const Pair pair(p, shared, hand, task.n, share.me * share.T + t);
  const int here = pair.here(sizes.plan, s.op.me);
  if (hand.first == 0 && number < kDataWarps) {
    place_own(p, sizes, t, task, here, first, early.scalar);
  } else {
    const float scalar = scalar_of_lane(p, t);
    place_own(p, sizes, t, task, here, WireVec<W, T>(p, load_x(p, sizes, t, task)), scalar);
  }
}

// By one warp: one of its tasks of the peers' tokens at hand, which have arrived; the first of them
// is the `skip`-th at hand.
template <Wire W, typename T, typename S>
__device__ void place_arrived_task(const Work<W, T, S>& work, const AtHand& hand, int skip,
                                   int number) {
  const auto& [p, sizes, s, shared, share] = work;
  const Task task(sizes.by_slot_tasks, sizes.slot_tasks, number);
  const Token token = share.any(sizes.plan.by_tokens, hand.first + skip + task.n);
  const Pair pair(p, shared, hand, skip + task.n, token.of_group(share.T));
  const char* slot = s.inbox(token.source).slot(token.t);
  place_arrived<W, T>(p, sizes, task, pair.here(sizes.plan, s.op.me), slot);
}

// By the data warps: the rows here, and what the plan says, of all the block's tokens.
template <Wire W, typename T, typename S>
__device__ void place_rows(const Work<W, T, S>& work, AtHand& hand, const Early& early,
                           const WireVec<W, T>& first) {
  const auto& [p, sizes, s, shared, share] = work;
  for (;;) {
    const int own = min_int(max_int(share.own - hand.first, 0), hand.count);
    const int own_tasks = own * sizes.x_tasks, here = own_tasks + hand.count;
    const int all = here + (hand.count - own) * sizes.slot_tasks;
    int i = threadIdx.x / 32;
    for (; i < here; i += kDataWarps) {
      if (i < own_tasks) {
        place_own_task(work, hand, i, early, first);
      } else {
        describe_token(work, hand, i - own_tasks);
      }
    }
    if (!all_arrived(true)) return;
    for (; i < all; i += kDataWarps) place_arrived_task(work, hand, own, i - here);
    hand.first += hand.count;
    if (hand.first >= share.all()) break;
    hand.count = min_int(kSlotGroup, share.all() - hand.first);
    data_sync();  // positions are the next tokens' now
    rank_tokens(p, sizes, shared, share, hand);
  }
  if (may_zero(p)) {
    describe_and_zero(p, s, shared.segments, blockIdx.x + gridDim.x * (threadIdx.x / 32),
                      gridDim.x * kDataWarps);
  }
}

// By the post warp, for the data warps: wait for the rows that they take from slots. False: give
// up.
template <typename S>
__device__ bool await_rows(const SlotDispatchParams& p, const SlotDispatchSizes& sizes, const S& s,
                           const SlotShared& shared, const Share& share) {
  const int K = p.exchange.top_k;
  for (int first = 0; first < share.all(); first += kSlotGroup) {
    const int i = first + lane_id();
    bool there = true;
    if (lane_id() < kSlotGroup && i >= share.own && i < share.all()) {
      const Token token = share.any(sizes.plan.by_tokens, i);
      const int16_t* choices = shared.choices + token.of_group(share.T) * K;
      bool sent = false;  // also if all its pairs here are dropped
      for (int k = 0; k < K; ++k)
        sent |= choices[k] >= 0 && sizes.plan.by_local(choices[k]) == s.op.me;
      const Inbox inbox = s.inbox(token.source);
      if (sent) there = s.await(inbox.flag(token.t), token.source, Phase::kRows);  // acquires it
    }
    if (!all_arrived(there)) return false;
  }
  return true;
}

// By the post warp, when the plan is there.
__device__ inline void post_plan(const SlotDispatchParams& p, const SlotOp& s,
                                 const SlotShared& shared) {
  if (!may_zero(p)) describe_and_zero(p, s, shared.segments, blockIdx.x, gridDim.x);
  if (blockIdx.x == gridDim.x - 1) {
    describe_experts(p.plan, p.exchange, s.op.me, shared.segments, shared.totals);
  }
  if (blockIdx.x == 0) s.await_hellos();
}

__device__ __noinline__ inline void poison_slot_dispatch(const SlotDispatchParams& p) {
  const size_t rows = p.exchange.num_rows;
  poison_plan(p.plan, p.exchange);
  poison_bytes(p.rows, rows * p.row_bytes);
  poison_bytes(p.row_scales, rows * (p.hidden / kScaleBlock) * sizeof(float));
  poison_bytes(p.row_scalars, rows * sizeof(float));
}

template <Wire W, typename T, typename S>
__device__ void run_data_warps(const Work<W, T, S>& work, const Early& early,
                               const WireVec<W, T>& first, bool* planned) {
  __shared__ int position[kSlotGroup][kMaxTopK];
  const auto& [p, sizes, s, shared, share] = work;
  if constexpr (S::kSpansNodes) {
    if (s.pushes()) s.put_words(p, sizes);
  }
  if (s.pushes() && s.op.R > 1) push_rows<W, T>(p, sizes, s, share.own, early, first);
  if (!s.receives()) return;
  bool routed = true;
  if constexpr (S::kSpansNodes) routed = all_routed(true);
  const bool there = data_and(routed && gather_choices(p, sizes, s, shared));
  AtHand hand{0, min_int(kSlotGroup, share.all()), position};
  if (there) rank_tokens(p, sizes, shared, share, hand);
  if (threadIdx.x == 0) *planned = there;
  __syncwarp();
  bar_arrive(kPlanned, kSlotThreads);
  if (there) place_rows(work, hand, early, first);
}

template <typename S>
__device__ void run_post_warp(const SlotDispatchParams& p, const SlotDispatchSizes& sizes, S& s,
                              const SlotShared& shared, const Share& share, int choice,
                              const bool* planned) {
  if (s.pushes()) post_words(p, s, share, choice);
  s.count();
  if (s.pushes()) {
    post_rows(p, sizes.plan, s, share, choice);
    s.stamp_once(Stamp::kPushed);
  }
  if (!s.receives()) return;
  if constexpr (S::kSpansNodes) all_routed(s.await_other_nodes());
  __syncwarp();
  bar_sync(kPlanned, kSlotThreads);
  if (!*planned || !await_rows(p, sizes, s, shared, share)) return;
  s.stamp_once(Stamp::kArrived);
  post_plan(p, s, shared);
}

// `S`: SlotOp, or what extends it to a group that spans nodes, made with `more`.
template <Wire W, typename T, typename S, typename... More>
__device__ void slot_dispatch_body(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                                   const More&... more) {
  __shared__ bool planned;
  const Share share(sizes.by_blocks, p.call.peers.rank, p.call.peers.num_ranks,
                    p.exchange.num_tokens);
  const SlotShared shared(dynamic_shared(), p.exchange);
  const Early early = load_early(p, sizes, share.own);
  if (!is_post_warp()) shared.clear(p.exchange);
  SlotOp::open();
  WireVec<W, T> first;
  if (!is_post_warp()) first = WireVec<W, T>(p, early.vec);
  S s(p.call, SlotKind::kDispatch, p.half, p.started, more...);
  if (s.began_broken()) {
    s.count();
  } else if (is_post_warp()) {
    run_post_warp(p, sizes, s, shared, share, early.choice, &planned);
  } else {
    run_data_warps(Work<W, T, S>{p, sizes, s, shared, share}, early, first, &planned);
  }
  s.leave(s.receives() ? nullptr : p.ticket, [&] {
    if constexpr (S::kSpansNodes) s.tell_other_nodes();
    if (s.receives()) poison_slot_dispatch(p);
  });
}

template <Wire W, typename T>
SlotDispatchSizes slot_dispatch_sizes(const Exchange& e, int blocks, int hidden, Element x) {
  const int row_bytes = hidden * (W == Wire::kCopy ? element_bytes(x) : int(sizeof(T)));
  const int vecs = row_bytes / int(sizeof(Vec));
  return SlotDispatchSizes(e, blocks, vecs,
                           W == Wire::kQuantized ? hidden / int(sizeof(Vec)) : vecs);
}

}  // namespace jax_ep
