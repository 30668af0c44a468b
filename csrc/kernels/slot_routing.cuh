// SPDX-License-Identifier: Apache-2.0
// The plan of a small batch, by every block for itself: no meeting of blocks, no second kernel.
//
//   push     my tokens' choices -> every peer's inbox, in words that carry their own tag
//   gather   all choices of the group            -> choices, totals (shared memory)
//   segments as the large plan                   -> kept, start, room
//   rank     of the block's own tokens alone: pairs of the same expert before each of theirs;
//            beside the segments, which it does not need
// A block has 31 data warps, which do all this, and a post warp, which pushes words and flags: a
// flag's fence waits for a flight there and back, and nobody else has to.
#pragma once
#include "../device/slots.cuh"
#include "plan_exchange.cuh"
#include "plan_outputs.cuh"
#include "plan_segments.cuh"
#include "slot_sizes.h"

namespace jax_ep {

// A block's shared memory.
struct SlotShared {
  int16_t* choices;  // [R*T, K], padded to whole vectors with -1
  int32_t* totals;   // [E]
  int32_t* blocks;   // [E] of A rows that e wants
  Segments segments;

  __device__ SlotShared(char* base, const Exchange& x) {
    const int E = x.num_experts;
    choices = reinterpret_cast<int16_t*>(base);
    totals = reinterpret_cast<int32_t*>(base + choice_vecs(x) * sizeof(Vec));
    blocks = totals + E;
    segments = {blocks + E, blocks + 2 * E, blocks + 3 * E};
  }
  static JAX_EP_HD int choice_vecs(const Exchange& x) {
    return ceil_div(x.num_ranks * x.num_pairs(), 8);
  }
  static JAX_EP_HD size_t bytes(const Exchange& x) {
    return choice_vecs(x) * sizeof(Vec) + 5 * sizeof(int32_t) * x.num_experts;
  }
  // By the data warps, before a barrier of the block: what gathering adds to.
  __device__ void clear(const Exchange& x) const {
    for (int e = threadIdx.x; e < x.num_experts; e += kDataThreads) totals[e] = 0;
    for (int i = x.num_ranks * x.num_pairs() + threadIdx.x; i < choice_vecs(x) * 8;
         i += kDataThreads) {
      choices[i] = -1;
    }
  }
};

// By one warp: this lane's pair of my token `t`, -1 behind the last one.
__device__ inline int choice_of_lane(const SlotDispatchParams& p, int t) {
  const int K = p.exchange.top_k;
  return lane_id() < K ? p.topk_idx[t * K + lane_id()] : -1;
}

// By one warp: the words of one of my tokens, to all peers. A choice out of range is an error, and
// its word is not pushed: who waits for it finds the group broken.
template <typename S>
__device__ void push_words(const SlotDispatchParams& p, const S& s, int t, int choice) {
  const int K = p.exchange.top_k, E = p.exchange.num_experts;
  const bool valid = choice >= -1 && choice < E;
  if (!valid) refuse_choice(s.op, choice, E);
  constexpr int kRefused = -2;
  const int e = valid ? choice : kRefused;
  const int even = __shfl_sync(kAllLanes, e, 2 * lane_id() % 32);
  const int odd = __shfl_sync(kAllLanes, e, (2 * lane_id() + 1) % 32);
  if (lane_id() >= ceil_div(K, 2) || even == kRefused || odd == kRefused) return;
  const uint64_t word = make_word(word_tag(s.tag), even, odd);  // lanes from K on hold -1
  for (int r = 0; r < s.op.R; ++r) {
    if (s.stores_to(r)) store_relaxed(s.outbox(r).words(t) + lane_id(), word);
  }
}

// The word at `at`, which is not there yet. False: give up.
__device__ __noinline__ inline bool await_word(const Call& call, uint64_t tag, const uint64_t* at,
                                               const uint64_t* hello, int source,
                                               unsigned long long* word) {
  const uint64_t start = now_ns();
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      *word = load_relaxed(at);
      if (tag_of(*word) == word_tag(tag)) {
        note_wait(call, source, start);
        return true;
      }
    }
    if (is_hopeless(call, tag, start, source, Phase::kRouting, load_relaxed(hello))) return false;
  }
}

// Part `h` of the choices of token `t` of `source`, a peer, those from K on being anything. False:
// give up.
template <typename S>
__device__ bool gather_part(const SlotDispatchParams& p, const S& s, int source, int t, int h,
                            int (&choice)[kPart]) {
  const Inbox inbox = s.inbox(source);
  const uint64_t* at = s.arrived_words(source, t, h);
  ulonglong2 w = load_relaxed(reinterpret_cast<const ulonglong2*>(at));
  const uint32_t tag = word_tag(s.tag);
  if (tag_of(w.x) != tag && !await_word(s.op.call, s.tag, at, inbox.hello(), source, &w.x)) {
    return false;
  }
  if (kPart * h + 2 < p.exchange.top_k && tag_of(w.y) != tag &&
      !await_word(s.op.call, s.tag, at + 1, inbox.hello(), source, &w.y)) {
    return false;
  }
#pragma unroll
  for (int j = 0; j < kPart; ++j) choice[j] = choice_of(j < 2 ? w.x : w.y, j);
  return true;
}

// By the data warps: every choice of the group, and how many pairs name each expert. False, for
// this thread: give up.
template <typename S>
__device__ bool gather_choices(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                               const S& s, const SlotShared& shared) {
  const int T = p.exchange.num_tokens, K = p.exchange.top_k, E = p.exchange.num_experts;
  const int all = s.op.R * T * sizes.parts;
#pragma unroll 1
  for (int i = threadIdx.x; i < all; i += kDataThreads) {
    const int token = sizes.by_parts(i), h = i - token * sizes.parts;
    const int source = sizes.plan.by_tokens(token), t = token - source * T;
    int choice[kPart];
    if (source == s.op.me) {
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        choice[j] = kPart * h + j < K ? p.topk_idx[t * K + kPart * h + j] : -1;
      }
    } else if (!gather_part(p, s, source, t, h, choice)) {
      return false;
    }
#pragma unroll
    for (int j = 0; j < kPart; ++j) {
      if (kPart * h + j >= K) break;
      const int e = choice[j] >= 0 && choice[j] < E ? choice[j] : -1;
      shared.choices[token * K + kPart * h + j] = static_cast<int16_t>(e);
      if (e >= 0) atomicAdd(&shared.totals[e], 1);
    }
  }
  return true;
}

// By one warp: segments of the experts of rank `r`.
__device__ inline void find_segments(const SlotDispatchParams& p, const PlanSizes& sizes,
                                     const SlotShared& shared, int r) {
  const int A = p.exchange.alignment, first = r * sizes.local;
  constexpr int kBatch = 4;  // loads that stores do not wait for
  for (int base = first + lane_id(); base < first + sizes.local; base += 32 * kBatch) {
    int blocks[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int e = min_int(base + 32 * j, first + sizes.local - 1);
      blocks[j] = sizes.by_alignment(shared.totals[e] + A - 1);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (base + 32 * j < first + sizes.local) shared.blocks[base + 32 * j] = blocks[j];
    }
  }
  __syncwarp();
  const Wanted wanted{shared.totals, shared.blocks};
  if (p.exchange.batched) {
    batched_segments(sizes, A, wanted, first, shared.segments);
  } else {
    ragged_segments(sizes, A, wanted, first, shared.segments);
  }
}

// By one warp: pairs of expert `e` before pair number `pair` of the group.
__device__ inline int pairs_before(const SlotShared& shared, int pair, int e) {
  constexpr uint32_t kOnes = 0x00010001u;
  const uint32_t both = static_cast<uint32_t>(e) << 16 | static_cast<uint32_t>(e);
  uint32_t other = 0;  // pairs of other experts, two sums of 16 bits
  const auto* vecs = reinterpret_cast<const Vec*>(shared.choices);
  const int whole = pair / 8;
#pragma unroll 4
  for (int v = lane_id(); v < whole; v += 32) {
    const Vec eight = vecs[v];
    other += __vminu2(eight.x ^ both, kOnes) + __vminu2(eight.y ^ both, kOnes) +
             __vminu2(eight.z ^ both, kOnes) + __vminu2(eight.w ^ both, kOnes);
  }
  const int rest = whole * 8 + lane_id();
  const int others = static_cast<int>((other & 0xffff) + (other >> 16)) +
                     (rest < pair && shared.choices[rest] != e);
  return pair - __reduce_add_sync(kAllLanes, others);
}

// Tokens at hand: up to kSlotGroup of those of a block, from the first-th on; in shared memory, of
// each pair how many of its expert come before it.
struct AtHand {
  int first, count;
  int (*position)[kMaxTopK];
};

// By one warp: where the pair k of the n-th token at hand stands among those of its expert.
__device__ inline void rank_pair(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                                 const SlotShared& shared, const Share& share, const AtHand& hand,
                                 int n, int k) {
  const Token token = share.any(sizes.plan.by_tokens, hand.first + n);
  const int pair = token.of_group(share.T) * p.exchange.top_k + k;
  const int e = shared.choices[pair];
  if (e < 0) return;
  const int before = pairs_before(shared, pair, e);
  if (lane_id() == 0) hand.position[n][k] = before;
}

// By the data warps, after gathering: segments (with the first tokens at hand only) and positions.
__device__ inline void rank_tokens(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                                   const SlotShared& shared, const Share& share,
                                   const AtHand& hand) {
  const int K = p.exchange.top_k, segments = hand.first == 0 ? p.exchange.num_ranks : 0;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < segments + hand.count * K; i += kDataWarps) {
    if (i < segments) {
      find_segments(p, sizes.plan, shared, i);
    } else {
      const int n = sizes.by_top_k(i - segments);
      rank_pair(p, sizes, shared, share, hand, n, i - segments - n * K);
    }
  }
  data_sync();
}

// This lane's pair of a token: whose expert it names, and its row there; -1 for none.
struct Pair {
  int expert = -1, row = -1;

  // Of the n-th token at hand, number `token` of the group.
  __device__ Pair(const SlotDispatchParams& p, const SlotShared& shared, const AtHand& hand, int n,
                  int token) {
    if (lane_id() >= p.exchange.top_k) return;
    expert = shared.choices[token * p.exchange.top_k + lane_id()];
    if (expert < 0) return;
    const int position = hand.position[n][lane_id()];
    if (position < shared.segments.kept[expert]) row = shared.segments.start[expert] + position;
  }
  // The row, if it is on rank `me`.
  __device__ int here(const PlanSizes& sizes, int me) const {
    return row >= 0 && sizes.by_local(expert) == me ? row : -1;
  }
};

}  // namespace jax_ep
