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
// the large path's, bit for bit. Slots, and who may overwrite them when: device/slots.cuh.
#include "../device/kernel.cuh"
#include "slot_rows.cuh"

namespace jax_ep {
namespace {

// By the post warp: words of the block's own tokens. `first` is this lane's choice of the first of
// them.
__device__ void post_words(const SlotDispatchParams& p, const SlotOp& s, const Share& share,
                           int first) {
  for (int i = 0; i < share.own; ++i) {
    const int t = share.own_token(i);
    push_words(p, s, t, i == 0 ? first : choice_of_lane(p, t));
  }
  if (blockIdx.x == 0) s.greet();
}

// By the post warp: flags of the rows of the block's own tokens, once they are pushed.
__device__ void post_rows(const SlotDispatchParams& p, const PlanSizes& sizes, const SlotOp& s,
                          const Share& share, int first) {
  if (s.op.R == 1) return;
  const int own = share.own;
  for (int from = 0; from < own; from += kSlotGroup) {
    rows_pushed(from + kSlotGroup >= own);
    for (int i = from; i < min_int(from + kSlotGroup, own); ++i) {
      const int t = share.own_token(i);
      const RankSet named = named_by(p, sizes, i == 0 ? first : choice_of_lane(p, t));
      for (int r = lane_id(); r < s.op.R; r += 32) {
        if (r != s.op.me && named.has(r)) {
          store_release_sys(s.outbox(r).flag(t), s.tag);  // publishes the token's row
        }
      }
    }
  }
}

// What no pair says of rows, by warp number `warp` of `warps` of the launch: experts, and zeros in
// padding, and in the tail if asked. Scalars are zero in both.
__device__ void describe_and_zero(const SlotDispatchParams& p, const SlotOp& s, const Segments& seg,
                                  int warp, int warps) {
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
__device__ bool may_zero(const SlotDispatchParams& p) {
  return p.zero_tail || p.exchange.alignment > 1;
}

// What the data warps of a block share.
template <Wire W, typename T>
struct Work {
  const SlotDispatchParams& p;
  const SlotDispatchSizes& sizes;
  const SlotOp& s;
  const SlotShared& shared;
  const Share& share;
};

// By one warp: what the plan says of the n-th token at hand.
template <Wire W, typename T>
__device__ void describe_token(const Work<W, T>& work, const AtHand& hand, int n) {
  const auto& [p, sizes, s, shared, share] = work;
  const int token = share.any(sizes.plan.by_tokens, hand.first + n).of_group(share.T);
  const Pair pair(p, shared, hand, n, token);
  place_token(p.plan, p.exchange, sizes.plan, s.op.me, TokenLanes(32), token,
              lane_id() < p.exchange.top_k, pair.expert, pair.row);
}

// By one warp: one of its tasks of the n-th own token at hand.
template <Wire W, typename T>
__device__ void place_own_task(const Work<W, T>& work, const AtHand& hand, int number,
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
template <Wire W, typename T>
__device__ void place_arrived_task(const Work<W, T>& work, const AtHand& hand, int skip,
                                   int number) {
  const auto& [p, sizes, s, shared, share] = work;
  const Task task(sizes.by_slot_tasks, sizes.slot_tasks, number);
  const Token token = share.any(sizes.plan.by_tokens, hand.first + skip + task.n);
  const Pair pair(p, shared, hand, skip + task.n, token.of_group(share.T));
  const char* slot = s.inbox(token.source).slot(token.t);
  place_arrived<W, T>(p, sizes, task, pair.here(sizes.plan, s.op.me), slot);
}

// By the data warps: the rows here, and what the plan says, of all the block's tokens.
template <Wire W, typename T>
__device__ void place_rows(const Work<W, T>& work, AtHand& hand, const Early& early,
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
__device__ bool await_rows(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                           const SlotOp& s, const SlotShared& shared, const Share& share) {
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
__device__ void post_plan(const SlotDispatchParams& p, const SlotOp& s, const SlotShared& shared) {
  if (!may_zero(p)) describe_and_zero(p, s, shared.segments, blockIdx.x, gridDim.x);
  if (blockIdx.x == gridDim.x - 1) {
    describe_experts(p.plan, p.exchange, s.op.me, shared.segments, shared.totals);
  }
  if (blockIdx.x == 0) s.await_hellos();
}

__device__ __noinline__ void poison_dispatch(const SlotDispatchParams& p) {
  const size_t rows = p.exchange.num_rows;
  poison_plan(p.plan, p.exchange);
  poison_bytes(p.rows, rows * p.row_bytes);
  poison_bytes(p.row_scales, rows * (p.hidden / kScaleBlock) * sizeof(float));
  poison_bytes(p.row_scalars, rows * sizeof(float));
}

template <Wire W, typename T>
__device__ void run_data_warps(const Work<W, T>& work, const Early& early,
                               const WireVec<W, T>& first, bool* planned) {
  __shared__ int position[kSlotGroup][kMaxTopK];
  const auto& [p, sizes, s, shared, share] = work;
  if (s.pushes() && s.op.R > 1) push_rows<W, T>(p, sizes, s, share.own, early, first);
  if (!s.receives()) return;
  const bool there = data_and(gather_choices(p, sizes, s, shared));
  AtHand hand{0, min_int(kSlotGroup, share.all()), position};
  if (there) rank_tokens(p, sizes, shared, share, hand);
  if (threadIdx.x == 0) *planned = there;
  __syncwarp();
  bar_arrive(kPlanned, kSlotThreads);
  if (there) place_rows(work, hand, early, first);
}

__device__ void run_post_warp(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                              SlotOp& s, const SlotShared& shared, const Share& share, int choice,
                              const bool* planned) {
  if (s.pushes()) post_words(p, s, share, choice);
  s.count();
  if (s.pushes()) {
    post_rows(p, sizes.plan, s, share, choice);
    s.stamp_once(Stamp::kPushed);
  }
  if (!s.receives()) return;
  __syncwarp();
  bar_sync(kPlanned, kSlotThreads);
  if (!*planned || !await_rows(p, sizes, s, shared, share)) return;
  s.stamp_once(Stamp::kArrived);
  post_plan(p, s, shared);
}

template <Wire W, typename T>
__device__ void dispatch_body(const SlotDispatchParams& p, const SlotDispatchSizes& sizes) {
  __shared__ bool planned;
  const Share share(sizes.by_blocks, p.call.peers.rank, p.call.peers.num_ranks,
                    p.exchange.num_tokens);
  const SlotShared shared(dynamic_shared(), p.exchange);
  const Early early = load_early(p, sizes, share.own);
  if (!is_post_warp()) shared.clear(p.exchange);
  SlotOp::open();
  WireVec<W, T> first;
  if (!is_post_warp()) first = WireVec<W, T>(p, early.vec);
  SlotOp s(p.call, SlotKind::kDispatch, p.half, p.started);
  if (s.began_broken()) {
    s.count();
  } else if (is_post_warp()) {
    run_post_warp(p, sizes, s, shared, share, early.choice, &planned);
  } else {
    run_data_warps(Work<W, T>{p, sizes, s, shared, share}, early, first, &planned);
  }
  s.leave(s.receives() ? nullptr : p.ticket, [&] {
    if (s.receives()) poison_dispatch(p);
  });
}

template <Wire W, typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_dispatch_kernel(const __grid_constant__ SlotDispatchParams p,
                         const __grid_constant__ SlotDispatchSizes sizes) {
  dispatch_body<W, T>(p, sizes);
}

template <Wire W, typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_dispatch_all_ranks(const SlotDispatchParams* p,
                            const __grid_constant__ SlotDispatchSizes sizes) {
  dispatch_body<W, T>(p[blockIdx.y], sizes);
}

template <Wire W, typename T>
SlotDispatchSizes sizes_of(const Exchange& e, int blocks, int hidden, Element x) {
  const int row_bytes = hidden * (W == Wire::kCopy ? element_bytes(x) : int(sizeof(T)));
  const int vecs = row_bytes / int(sizeof(Vec));
  return SlotDispatchSizes(e, blocks, vecs,
                           W == Wire::kQuantized ? hidden / int(sizeof(Vec)) : vecs);
}

template <Wire W, typename T>
cudaError_t launch(const SlotDispatchParams* params, const Exchange& e, Element x, int hidden,
                   const Launch& how) {
  const int blocks = min_int(how.num_sms, e.num_ranks * e.num_tokens);
  const SlotDispatchSizes sizes = sizes_of<W, T>(e, blocks, hidden, x);
  const size_t shared = SlotShared::bytes(e);
  if (how.all_ranks == 0) {
    return launch_kernel(slot_dispatch_kernel<W, T>, blocks, kSlotThreads, shared, how.stream,
                         *params, sizes);
  }
  if constexpr (kAllRanks) {
    return launch_kernel(slot_dispatch_all_ranks<W, T>, dim3(blocks, how.all_ranks), kSlotThreads,
                         shared, how.stream, params, sizes);
  }
  return cudaErrorNotSupported;
}

template <Wire W, typename T>
cudaError_t load() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes,
                               reinterpret_cast<const void*>(&slot_dispatch_kernel<W, T>));
}

// Every compiled variant: rows as bytes, and two FP8 deliveries of three types.
template <typename Visit>
cudaError_t for_variant(Element x, Wire wire, Visit&& visit) {
  using Quantized = std::integral_constant<Wire, Wire::kQuantized>;
  using Dequantized = std::integral_constant<Wire, Wire::kDequantized>;
  if (wire == Wire::kCopy) return visit(std::integral_constant<Wire, Wire::kCopy>{}, float{});
  auto by_type = [&](auto type) {
    return wire == Wire::kQuantized ? visit(Quantized{}, type) : visit(Dequantized{}, type);
  };
  switch (x) {
    case Element::kBf16:
      return by_type(__nv_bfloat16{});
    case Element::kF16:
      return by_type(__half{});
    case Element::kF32:
      return by_type(float{});
    case Element::kFp8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_slot_dispatch(const SlotDispatchParams* params, const Exchange& e, Element x,
                                 Wire wire, int hidden, const Launch& how) {
  return for_variant(x, wire, [&](auto w, auto type) {
    return launch<decltype(w)::value, decltype(type)>(params, e, x, hidden, how);
  });
}

cudaError_t load_slot_dispatch() {
  for (Wire wire : {Wire::kCopy, Wire::kQuantized, Wire::kDequantized}) {
    for (Element x : {Element::kBf16, Element::kF16, Element::kF32}) {
      const cudaError_t error = for_variant(
          x, wire, [](auto w, auto type) { return load<decltype(w)::value, decltype(type)>(); });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace jax_ep
