// SPDX-License-Identifier: Apache-2.0
// combine of a small batch: one launch, one flight, no lease.
//
//           data warps                                    post warp (of each block)
//   start   per token of a peer with rows here (a block     the header
//             has one, or few):
//             partial = its rows here, each times its
//               weight, added in row order -> the token's
//               slot on its source (quantised on the way,
//               if asked)
//                                partials are pushed ->     the token's flag there
//   done    per token of mine:                              awaits the flag of each other rank that
//             own = the partial of its rows here              has rows of the token
//                                <- partials are there
//             over these ranks in order, add -> out[t]      every peer's hello
//
// A warp forms the first partial that it pushes before the header is there.
// `start` and `done` are one launch or two. Products are rounded to float32 before they are added,
// partials to y's type, the own one too: the large path's bits. Slots, and who may overwrite them
// when: device/slots.cuh. Where a group spans nodes, partials go to other nodes by the network, and
// each node's are added and rounded first: rdma/slot_combine_nodes.cuh.
#pragma once
#include "../device/rows.cuh"
#include "../device/slots.cuh"
#include "launch.h"
#include "slot_sizes.h"

namespace jax_ep {

constexpr int kHeldRowsInFlight = 4;  // rows whose loads a thread has issued

struct PartialTask {
  int n, vec;  // the n-th token, this lane's vector of it

  __device__ PartialTask(const SlotCombineSizes& sizes, int number) : n(sizes.by_tasks(number)) {
    vec = (number - n * sizes.tasks) * 32 + lane_id();
  }
};

// This lane's row here of a token, the first lanes having them all, and its weight.
struct HeldRow {
  int row = -1;
  float weight = 1.0f;

  __device__ HeldRow() {}
  // `token` of the group. It is not known yet whether the plan is whole: after a failure its rows
  // may be anything.
  __device__ HeldRow(const SlotCombineParams& p, int token) {
    const int K = p.exchange.top_k;
    if (lane_id() < K) row = p.token_rows[size_t(token) * K + lane_id()];
    if (row >= p.exchange.num_rows) row = -1;
    if (row >= 0 && p.weights != nullptr) weight = p.weights[row];
  }
};

// By one warp: the ranks that hold rows of my token t.
__device__ inline RankSet holders_of(const SlotCombineParams& p, int t) {
  const int K = p.exchange.top_k, pair = t * K + lane_id();
  const bool kept = lane_id() < K && p.pair_row[pair] >= 0;
  return RankSet::of_lanes(kept ? p.pair_rank[pair] : -1);
}

// Float32 sums of one Vec of a row.
template <typename T>
struct Sum {
  static constexpr int kCount = Pack<T>::kCount;
  float value[kCount] = {};

  __device__ void add(const Vec& v, bool weighted, float weight) {
    const Pack<T> x(v);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float f = to_float(x.element[i]);
      value[i] = __fadd_rn(value[i], weighted ? __fmul_rn(weight, f) : f);
    }
  }
  __device__ void add(const Fp8<T>& q, float scale) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] = __fadd_rn(value[i], __fmul_rn(to_float(q, i), scale));
    }
  }
  __device__ Pack<T> rounded() const {
    Pack<T> x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.element[i] = from_float<T>(value[i]);
    return x;
  }
};

// By one warp: this lane's vector of the partial of the rows that the lanes hold.
template <typename T>
__device__ Pack<T> partial_of(const SlotCombineParams& p, const SlotCombineSizes& sizes,
                              const HeldRow& rows, int vec) {
  Sum<T> sum;
  const int count = __popc(__ballot_sync(kAllLanes, rows.row >= 0));
  const auto* y = reinterpret_cast<const Vec*>(p.y) + vec;
#pragma unroll 1
  for (int base = 0; base < count; base += kHeldRowsInFlight) {
    Vec v[kHeldRowsInFlight];
#pragma unroll
    for (int j = 0; j < kHeldRowsInFlight; ++j) {
      const int row = __shfl_sync(kAllLanes, rows.row, base + j);
      v[j] = Vec{};
      const bool has_row = base + j < count && row >= 0;
      if (has_row && vec < sizes.vecs) v[j] = load_input(y + size_t(row) * sizes.vecs);
    }
#pragma unroll
    for (int j = 0; j < kHeldRowsInFlight; ++j) {
      const float weight = __shfl_sync(kAllLanes, rows.weight, base + j);
      if (base + j < count) sum.add(v[j], p.weights != nullptr, weight);
    }
  }
  return sum.rounded();
}

template <typename T>
__device__ SlotRow partial_row(const SlotCombineParams& p) {
  if (p.quantized) return {p.hidden, p.hidden / kScaleBlock};
  return {p.hidden * int(sizeof(T)), 0};
}

// A vector of a partial as it travels. All lanes of a warp take part in the making.
template <typename T>
struct PartialVec {
  Pack<T> partial{Vec{}};
  Fp8<T> q;  // if partials travel quantised
  float scale;

  __device__ PartialVec() {}
  __device__ PartialVec(const SlotCombineParams& p, const Pack<T>& partial) : partial(partial) {
    if (p.quantized) q = quantize(partial, p.power_of_two_scales, &scale);
  }
  __device__ void store(const SlotCombineParams& p, char* slot, int vec) const {
    constexpr int kLanes = kScaleBlock / Pack<T>::kCount;
    if (p.quantized) {
      reinterpret_cast<typename Fp8<T>::Word*>(slot)[vec] = q.word;
      if (vec % kLanes == 0) partial_row<T>(p).scales_of(slot)[vec / kLanes] = scale;
    } else {
      store_row(reinterpret_cast<Vec*>(slot) + vec, partial.vec);
    }
  }
};

// What a warp does before it knows anything of the operation: the first of its tasks of each kind,
// up to the point where it needs the peers.
template <typename T>
struct EarlyPartials {
  bool any = false;     // rows here of the peer's token
  PartialVec<T> piece;  // of its partial
  HeldRow own;          // rows here of my token
  RankSet holders;      // of it
};

template <typename T>
__device__ EarlyPartials<T> work_early(const SlotCombineParams& p, const SlotCombineSizes& sizes,
                                       const Share& share) {
  EarlyPartials<T> early;
  const PartialTask task(sizes, threadIdx.x / 32);
  const bool pushes = p.half != Half::kDone && task.n < min_int(share.peers, kSlotGroup);
  const bool sums = p.half != Half::kStart && task.n < share.own;
  HeldRow peers;
  if (pushes) peers = HeldRow(p, share.peer(sizes.by_tokens, task.n).of_group(share.T));
  if (sums) early.own = HeldRow(p, share.me * share.T + share.own_token(task.n));
  if (sums) early.holders = holders_of(p, share.own_token(task.n));
  early.any = __any_sync(kAllLanes, peers.row >= 0);
  if (early.any) early.piece = PartialVec<T>(p, partial_of<T>(p, sizes, peers, task.vec));
  return early;
}

// By the data warps: partials of the block's peers' tokens.
template <typename T, typename S>
__device__ void push_partials(const SlotCombineParams& p, const SlotCombineSizes& sizes, const S& s,
                              const Share& share, const EarlyPartials<T>& early) {
#pragma unroll 1
  for (int first = 0; first < share.peers; first += kSlotGroup) {
    const int tasks = min_int(kSlotGroup, share.peers - first) * sizes.tasks;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < tasks; i += kDataWarps) {
      const PartialTask task(sizes, i);
      const Token token = share.peer(sizes.by_tokens, first + task.n);
      bool any = early.any;
      PartialVec<T> piece = early.piece;
      if (first > 0 || i >= kDataWarps) {
        const HeldRow rows(p, token.of_group(share.T));
        any = __any_sync(kAllLanes, rows.row >= 0);
        if (any) piece = PartialVec<T>(p, partial_of<T>(p, sizes, rows, task.vec));
      }
      char* slot = s.outbox(token.source).slot(token.t);
      if (any && task.vec < sizes.vecs) piece.store(p, slot, task.vec);
    }
    if constexpr (S::kSpansNodes) {
      s.put_partials(p, sizes, partial_row<T>(p), share, first);
    }
    rows_pushed(first + kSlotGroup >= share.peers);
  }
}

// By the post warp: flags of the partials, once they are pushed.
template <typename S>
__device__ void post_partials(const SlotCombineParams& p, const SlotCombineSizes& sizes, const S& s,
                              const Share& share) {
#pragma unroll 1
  for (int first = 0; first < share.peers; first += kSlotGroup) {
    const int i = first + lane_id();
    bool mine = lane_id() < kSlotGroup && i < share.peers;
    const Token token = share.peer(sizes.by_tokens, mine ? i : 0);
    if constexpr (S::kSpansNodes) mine = mine && s.stores_to(token.source);
    const bool any = mine && p.token_rows[size_t(token.of_group(share.T)) * p.exchange.top_k] >= 0;
    rows_pushed(first + kSlotGroup >= share.peers);
    if (any) store_release_sys(s.outbox(token.source).flag(token.t), s.tag);  // publishes it
  }
}

// Whether rank r holds rows of my token t.
__device__ inline bool is_holder(const SlotCombineParams& p, int t, int r) {
  const int K = p.exchange.top_k;
  int holds = 0;
#pragma unroll 4
  for (int pair = t * K; pair < (t + 1) * K; ++pair) {
    holds |= int(p.pair_row[pair] >= 0) & int(p.pair_rank[pair] == r);  // loads do not wait
  }
  return holds != 0;
}

// One partial that the post warp awaits for the data warps, of each lane.
struct Awaited {
  int i, rank;  // the block's i-th own token
  bool wanted;

  // Number `number` of those of the tokens from the first-th on, up to kSlotGroup.
  __device__ Awaited(const SlotCombineParams& p, const Share& share, int first, int number)
      : i(first + number / share.R), rank(number % share.R) {
    const bool any = i < min_int(first + kSlotGroup, share.own) && rank != share.me;
    wanted = any && is_holder(p, share.own_token(i), rank);
  }
};

// By the post warp; `early` is the lane's first. False: give up.
template <typename S>
__device__ bool await_partials(const SlotCombineParams& p, const S& s, const Share& share,
                               const Awaited& early) {
#pragma unroll 1
  for (int first = 0; first < share.own; first += kSlotGroup) {
    bool there = true;
#pragma unroll 1
    for (int number = lane_id(); number < kSlotGroup * share.R; number += 32) {
      const bool is_first = first == 0 && number < 32;
      const Awaited one = is_first ? early : Awaited(p, share, first, number);
      const int t = share.own_token(one.i);
      if (one.wanted) {  // acquires what `post_partials` published, for the data warps
        there &= s.await(s.inbox(one.rank).flag(t), one.rank, Phase::kRows);
      }
    }
    if (!all_arrived(there)) return false;
  }
  return true;
}

// Adds vector `vec` of the partials of my token t of ranks [first, last), in order.
template <typename T>
__device__ __forceinline__ void add_ranks(const SlotCombineParams& p, const SlotOp& s,
                                          const RankSet& holders, int t, int vec,
                                          const Pack<T>& own, int first, int last, Sum<T>* sum) {
  using Word = typename Fp8<T>::Word;
  constexpr int kLanes = kScaleBlock / Pack<T>::kCount;
#pragma unroll 1
  for (int r = first; r < last; ++r) {
    if (!holders.has(r)) continue;
    if (r == s.op.me) {
      sum->add(own.vec, false, 1.0f);
      continue;
    }
    const char* slot = s.inbox(r).slot(t);
    if (p.quantized) {
      const float* scales = partial_row<T>(p).scales_of(slot);
      const auto* scale = reinterpret_cast<const uint32_t*>(scales) + vec / kLanes;
      const Fp8<T> q(load_arrived(reinterpret_cast<const Word*>(slot) + vec));
      sum->add(q, __uint_as_float(load_arrived(scale)));
    } else {
      sum->add(load_arrived(reinterpret_cast<const Vec*>(slot) + vec), false, 1.0f);
    }
  }
}

// The same over all ranks; of several nodes, each node's sum is rounded, then they are added.
template <typename T, typename S>
__device__ Pack<T> sum_ranks(const SlotCombineParams& p, const S& s, const RankSet& holders, int t,
                             int vec, const Pack<T>& own) {
  Sum<T> sum;
  if constexpr (S::kSpansNodes) {
    const int L = s.op.call.peers.node_ranks;
#pragma unroll 1
    for (int first = 0; first < s.op.R; first += L) {
      Sum<T> of_node;
      add_ranks<T>(p, s, holders, t, vec, own, first, first + L, &of_node);
      sum.add(of_node.rounded().vec, false, 1.0f);
    }
  } else {
    add_ranks<T>(p, s, holders, t, vec, own, 0, s.op.R, &sum);
  }
  return sum.rounded();
}

// By the data warps: sums of the block's own tokens. Of a warp's first task the own partial is in
// registers before the peers' are awaited.
template <typename T, typename S>
__device__ void sum_tokens(const SlotCombineParams& p, const SlotCombineSizes& sizes, const S& s,
                           const Share& share, const EarlyPartials<T>& early) {
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int first = 0; first < share.own; first += kSlotGroup) {
    const int tasks = min_int(kSlotGroup, share.own - first) * sizes.tasks;
    bool waits = true;
#pragma unroll 1
    for (int i = warp; i < tasks || waits; i += kDataWarps) {
      const PartialTask task(sizes, i);
      const int t = share.own_token(first + task.n);
      HeldRow rows = early.own;
      RankSet holders = early.holders;
      if ((first > 0 || i >= kDataWarps) && i < tasks) {
        rows = HeldRow(p, share.me * share.T + t);
        holders = holders_of(p, t);
      }
      const Pack<T> own = partial_of<T>(p, sizes, rows, task.vec);
      if (waits && !all_arrived(true)) return;
      waits = false;
      if (i >= tasks || task.vec >= sizes.vecs) continue;
      const Pack<T> sum = sum_ranks(p, s, holders, t, task.vec, own);
      store_row(reinterpret_cast<Vec*>(p.out) + size_t(t) * sizes.vecs + task.vec, sum.vec);
    }
  }
}

template <typename S>
__device__ void run_post_warp(const SlotCombineParams& p, const SlotCombineSizes& sizes, S& s,
                              const Share& share) {
  if (s.pushes() && blockIdx.x == 0) s.greet();
  s.count();
  const Awaited early(p, share, 0, lane_id());
  if (s.pushes()) {
    post_partials(p, sizes, s, share);
    s.stamp_once(Stamp::kPushed);
  }
  if (!s.receives() || !await_partials(p, s, share, early)) return;
  s.stamp_once(Stamp::kArrived);
  if (blockIdx.x == 0) s.await_hellos();
}

// `S`: SlotOp, or what extends it to a group that spans nodes, made with `more`.
template <typename T, typename S, typename... More>
__device__ void slot_combine_body(const SlotCombineParams& p, const SlotCombineSizes& sizes,
                                  const More&... more) {
  const Share share(sizes.by_blocks, p.call.peers.rank, p.call.peers.num_ranks,
                    p.exchange.num_tokens);
  SlotOp::open();
  EarlyPartials<T> early;
  if (!is_post_warp()) early = work_early<T>(p, sizes, share);
  S s(p.call, SlotKind::kCombine, p.half, p.started, more...);
  if (s.began_broken()) {
    s.count();
  } else if (is_post_warp()) {
    run_post_warp(p, sizes, s, share);
  } else {
    if (s.pushes()) push_partials<T>(p, sizes, s, share, early);
    if (s.receives()) sum_tokens<T>(p, sizes, s, share, early);
  }
  s.leave(s.receives() ? nullptr : p.ticket, [&] {
    if constexpr (S::kSpansNodes) s.tell_other_nodes();
    if (s.receives()) {
      poison_bytes(p.out, size_t(p.exchange.num_tokens) * p.hidden * sizeof(T));
    }
  });
}

}  // namespace jax_ep
