// SPDX-License-Identifier: Apache-2.0
// The plan of a small batch, by every block for itself: no meeting of blocks, no second kernel.
//
//   push     my tokens' choices -> every peer's inbox, in words that carry their own tag
//   gather   all choices of the group            -> choices (shared memory)
//   count    pairs of each expert                -> totals
//   segments as the large plan                   -> kept, start, room
//   rank     of the block's own tokens alone: pairs of the same expert before each of theirs
// A block has 31 data warps, which do all this, and a post warp, which pushes words and flags: a
// flag's fence waits for a flight there and back, and nobody else has to.
#pragma once
#include "../device/slots.cuh"
#include "plan_exchange.cuh"
#include "plan_outputs.cuh"
#include "plan_segments.cuh"

namespace jax_ep {

constexpr int kSlotGroup = 8;  // tokens that a block takes at a time

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
};

// By one warp: the expert that this lane's pair of my token `t` names; -1 for none. A choice out of
// range is an error, and none.
__device__ inline int my_choice(const SlotDispatchParams& p, const SlotOp& s, int t) {
  const int K = p.exchange.top_k, E = p.exchange.num_experts;
  if (lane_id() >= K) return -1;
  const int e = p.topk_idx[t * K + lane_id()];
  if (e >= -1 && e < E) return e;
  refuse_choice(s.op, e, E);
  return -1;
}

// By one warp: the words of one of my tokens, to all peers.
__device__ inline void push_words(const SlotDispatchParams& p, const SlotOp& s, int t) {
  const int K = p.exchange.top_k, e = my_choice(p, s, t);
  const int even = __shfl_sync(kAllLanes, e, 2 * lane_id() % 32);
  const int odd = __shfl_sync(kAllLanes, e, (2 * lane_id() + 1) % 32);
  if (lane_id() >= ceil_div(K, 2)) return;
  const uint64_t word = make_word(word_tag(s.tag), even, odd);  // lanes from K on hold -1
  for (int r = 0; r < s.op.R; ++r) {
    if (r != s.op.me) store_relaxed(s.outbox(r).words(t) + lane_id(), word);
  }
}

// The word at `at`, which is not there yet. False: give up.
__device__ __noinline__ inline bool await_word(const Call& call, uint64_t tag, const uint64_t* at,
                                               const uint64_t* hello, int source, uint64_t* word) {
  const uint64_t start = now_ns();
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      *word = load_relaxed(at);
      if (tag_of(*word) == word_tag(tag)) return true;
    }
    if (is_hopeless(call, tag, start, source, Phase::kRouting, load_relaxed(hello))) return false;
  }
}

// By the data warps: every choice of the group. False, for this thread: give up.
__device__ inline bool gather_choices(const SlotDispatchParams& p, const PlanSizes& sizes,
                                      const SlotOp& s, const SlotShared& shared) {
  const int T = p.exchange.num_tokens, K = p.exchange.top_k, E = p.exchange.num_experts;
  const int per_token = ceil_div(K, 2), all = s.op.R * T,
            padded = SlotShared::choice_vecs(p.exchange) * 8;
  for (int i = all * K + threadIdx.x; i < padded; i += kDataThreads) shared.choices[i] = -1;
  constexpr int kBatch = 4;
  auto keep = [&](int token, int j, int even, int odd) {
    auto valid = [E](int e) { return static_cast<int16_t>(e >= 0 && e < E ? e : -1); };
    shared.choices[token * K + 2 * j] = valid(even);
    if (2 * j + 1 < K) shared.choices[token * K + 2 * j + 1] = valid(odd);
  };
  for (int base = threadIdx.x; base < all * per_token; base += kBatch * kDataThreads) {
    int token[kBatch], half[kBatch];
    uint64_t word[kBatch];
    const uint64_t* at[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * kDataThreads;
      token[j] = i < all * per_token ? i / per_token : -1;
      half[j] = i - token[j] * per_token;
      at[j] = nullptr;
      if (token[j] < 0) continue;
      const int source = sizes.by_tokens(token[j]), t = token[j] - source * T;
      if (source == s.op.me) {
        const int32_t* mine = p.topk_idx + t * K + 2 * half[j];
        const int odd = 2 * half[j] + 1 < K ? mine[1] : -1;
        keep(token[j], half[j], mine[0], odd);
      } else {
        at[j] = s.inbox(source).words(t) + half[j];
        word[j] = load_relaxed(at[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (at[j] == nullptr) continue;
      const int source = sizes.by_tokens(token[j]);
      if (tag_of(word[j]) != word_tag(s.tag) &&
          !await_word(s.op.call, s.tag, at[j], s.inbox(source).hello(), source, &word[j])) {
        return false;
      }
      keep(token[j], half[j], choice_of(word[j], 0), choice_of(word[j], 1));
    }
  }
  return true;
}

// By the data warps: totals and segments of all experts. False, for all of them: give up.
__device__ inline bool plan_segments(const SlotDispatchParams& p, const PlanSizes& sizes,
                                     const SlotOp& s, const SlotShared& shared) {
  const Exchange& x = p.exchange;
  const int E = x.num_experts, pairs = x.num_ranks * x.num_pairs();
  for (int e = threadIdx.x; e < E; e += kDataThreads) shared.totals[e] = 0;
  if (!data_and(gather_choices(p, sizes, s, shared))) return false;
  for (int i = threadIdx.x; i < pairs; i += kDataThreads) {
    if (shared.choices[i] >= 0) atomicAdd(&shared.totals[shared.choices[i]], 1);
  }
  data_sync();
  for (int e = threadIdx.x; e < E; e += kDataThreads) {
    shared.blocks[e] = sizes.by_alignment(shared.totals[e] + x.alignment - 1);
  }
  data_sync();
  for (int r = threadIdx.x / 32; r < x.num_ranks; r += kDataWarps) {
    const Wanted wanted{shared.totals, shared.blocks};
    if (x.batched) {
      batched_segments(sizes, x.alignment, wanted, r * sizes.local, shared.segments);
    } else {
      ragged_segments(sizes, x.alignment, wanted, r * sizes.local, shared.segments);
    }
  }
  data_sync();
  return true;
}

// By one warp: pairs of expert `e` before pair number `pair` of the group.
__device__ inline int pairs_before(const SlotShared& shared, int pair, int e) {
  const uint32_t both = static_cast<uint32_t>(e) << 16 | static_cast<uint32_t>(e);
  uint32_t equal = 0;
  auto add = [&](uint32_t two) { equal += __vseteq2(two, both); };
  const auto* vecs = reinterpret_cast<const Vec*>(shared.choices);
  for (int v = lane_id(); v < pair / 8; v += 32) {
    const Vec eight = vecs[v];
    add(eight.x);
    add(eight.y);
    add(eight.z);
    add(eight.w);
  }
  const int rest = pair / 8 * 8 + lane_id();
  if (rest < pair) equal += shared.choices[rest] == e;
  return warp_sum(static_cast<int>((equal & 0xffff) + (equal >> 16)));
}

// The tokens of the group that a block works on: its own rank's first, those that it has pushed,
// then its share of the peers'.
struct Share {
  int own, all;  // how many
  int me, R, T;

  __device__ Share(int me, int R, int T)
      : own(count(blockIdx.x, T)), all(own + count(last(), (R - 1) * T)), me(me), R(R), T(T) {}
  // The i-th: its source and its number there.
  __device__ int source(int i) const {
    return i < own ? me : (me + 1 + (last() + (i - own) * gridDim.x) / T) % R;
  }
  __device__ int token(int i) const {
    return i < own ? blockIdx.x + i * gridDim.x : (last() + (i - own) * gridDim.x) % T;
  }

 private:
  // Peers' tokens are dealt out from the last block on, which has fewer of its own.
  __device__ static int last() { return gridDim.x - 1 - blockIdx.x; }
  __device__ static int count(int first, int n) {
    return first < n ? ceil_div(n - first, gridDim.x) : 0;
  }
};

// Rows of the pairs of up to kSlotGroup tokens of a block, in shared memory.
struct Tokens {
  int row[kSlotGroup][kMaxTopK];   // on whatever rank; -1 for none
  int here[kSlotGroup][kMaxTopK];  // on this rank
};

// By the data warps: rows of the pairs of the block's tokens first, first + 1, ..., `count` of
// them.
__device__ inline void rank_tokens(const SlotDispatchParams& p, const PlanSizes& sizes,
                                   const SlotOp& s, const SlotShared& shared, const Share& share,
                                   int first, int count, Tokens& tokens) {
  const int K = p.exchange.top_k;
  const Segments& seg = shared.segments;
  for (int i = threadIdx.x / 32; i < count * K; i += kDataWarps) {
    const int n = i / K, k = i - n * K;
    const int pair = (share.source(first + n) * share.T + share.token(first + n)) * K + k;
    const int e = shared.choices[pair];
    int row = -1;
    if (e >= 0) {
      const int position = pairs_before(shared, pair, e);
      if (position < seg.kept[e]) row = seg.start[e] + position;
    }
    if (lane_id() != 0) continue;
    tokens.row[n][k] = row;
    tokens.here[n][k] = row >= 0 && sizes.by_local(e) == s.op.me ? row : -1;
  }
  data_sync();
}

// By one warp: what the plan says of the n-th of them, the `i`-th of the block.
__device__ inline void describe_token(const SlotDispatchParams& p, const PlanSizes& sizes,
                                      const SlotOp& s, const SlotShared& shared, const Share& share,
                                      int n, int i, const Tokens& tokens) {
  const int K = p.exchange.top_k, k = lane_id();
  const int token = share.source(i) * share.T + share.token(i);
  const int e = k < K ? shared.choices[token * K + k] : -1;
  place_token(p.plan, p.exchange, sizes, s.op.me, TokenLanes(32), token, k < K, e,
              k < K ? tokens.row[n][k] : -1);
}

}  // namespace jax_ep
