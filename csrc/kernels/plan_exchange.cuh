// SPDX-License-Identifier: Apache-2.0
// How the ranks learn each other's routing: in words of two choices and a tag, without flags.
//
//   sender    topk_idx -> {choice, choice, tag} -> every peer's routing[parity][me]     (push)
//             {tag with signature}              -> every peer's hello[parity][me]       (push)
//   receiver  polls the words themselves, several at a time; one block awaits the hellos
//
// A word is stored and loaded whole, so its tag says that its choices are there: nothing is ordered
// by a fence, and nobody waits for a flight back. The tag tells operations apart, not shapes; the
// hello does. One block awaits all hellos before it comes to the grid's meeting, so no word of a
// peer that runs something else is used after the meeting; before it, a word can only be counted,
// and a choice that this rank has no expert for counts as none.
//
// Words of ranks of other nodes have come before the plan begins (rdma/exchange_routing.cuh): it
// finds them as it finds those that a fast peer has pushed early.
//
// Each word is awaited by exactly one warp of the receiver, before the meeting. Why no peer
// overwrites it before that: the next word of the same parity is pushed in the peer's plan n + 2,
// after the peer has ended plan n + 1, which needs my words of n + 1; I send those in a kernel that
// begins when the one that reads the words of n has ended. The same holds for hello. A rank that
// has given up may run ahead, but pushes nothing any more.
#pragma once
#include "../device/op.cuh"
#include "../device/warp.cuh"
#include "../plan/tiling.h"
#include "launch.h"

namespace jax_ep {

// Two neighbouring choices of mine, -1 behind the last one.
struct Choices {
  int even, odd;
};

__device__ inline Choices choices_of(const int32_t* topk_idx, int pairs, int word) {
  const int at = 2 * word;
  return {at < pairs ? topk_idx[at] : -1, at + 1 < pairs ? topk_idx[at + 1] : -1};
}

__device__ __forceinline__ int plan_parity(const Op& op) {
  return static_cast<int>(op.plans() + 1) & 1;
}

// What happens rarely is out of line, with a copy of the Op, which so stays in registers: in line,
// the code of a failure would stand several times among the instructions that every launch fetches.

__device__ __noinline__ inline void refuse_choice(Op op, int e, int E) {
  op.fail(Fault::kRouting, Phase::kRouting, op.me, e, E);
}

// Whether both choices of a word are experts, or none; otherwise one is refused.
__device__ __forceinline__ bool accept(const Op& op, const Choices& choices, int E) {
  auto bad = [E](int e) { return e < -1 || e >= E; };
  if (!bad(choices.even) && !bad(choices.odd)) return true;
  refuse_choice(op, bad(choices.even) ? choices.even : choices.odd, E);
  return false;
}

// Whether to give up on the words of rank `source`, awaited since `start`.
__device__ __noinline__ inline bool hopeless_words(Op op, int source, uint64_t start) {
  const uint64_t hello = load_relaxed(op.block(op.me).hello(plan_parity(op), source));
  return op.hopeless(start, source, Phase::kRouting, hello);
}

// By one block: the peers' hellos. False: give up.
__device__ __noinline__ inline bool await_hellos(Op op) {
  bool same = true;
  for (int r = threadIdx.x; r < op.R; r += blockDim.x) {
    if (r == op.me) continue;
    same &= op.await(op.block(op.me).hello(plan_parity(op), r), r, Phase::kRouting);
  }
  return same;
}

// By all threads of the launch: push my choices to all peers of my node, each thread its words from
// `word` on, whose choices it has. A word out of range is an error and is not pushed: who waits for
// it finds the group broken. False: give up.
__device__ inline bool publish(const PlanParams& p, const PlanSizes& sizes, const Op& op, int word,
                               Choices choices) {
  const int E = p.exchange.num_experts, words = (sizes.pairs + 1) / 2;
  const int parity = plan_parity(op), step = gridDim.x * blockDim.x;
  const uint32_t tag = word_tag(op.tag);
  if (op.was_broken()) return true;
  if (blockIdx.x == 0) {  // greet
    for (int r = op.node_first() + threadIdx.x; r < op.node_last(); r += blockDim.x) {
      if (r != op.me) store_relaxed(op.block(r).hello(parity, op.me), op.tag);
    }
  }
  bool good = true;
  while (word < words) {
    if (!accept(op, choices, E)) {
      good = false;
    } else {
      const uint64_t packed = make_word(tag, choices.even, choices.odd);
      const int last = op.node_last(), peers = last - op.node_first();
      for (int i = 1; i < peers; ++i) {  // not all to the same peer first
        const int r = op.me + i < last ? op.me + i : op.me + i - peers;
        store_relaxed(op.block(r).routing(parity, op.me) + word, packed);
      }
    }
    word += step;
    choices = choices_of(p.topk_idx, sizes.pairs, word);
  }
  return good;
}

constexpr int kGathered = 4;  // choices of one lane that are on their way together

// By one warp: the experts of the group's pairs [first, last), at most kGathered * 32 of them, the
// j-th of a lane being `first + 32 * j + lane`; -1 for none. Mine come from topk_idx, a peer's from
// the words that arrive. False: give up.
__device__ inline bool gather(const PlanParams& p, const PlanSizes& sizes, const Op& op, int first,
                              int last, int (&expert)[kGathered]) {
  const int pairs = sizes.pairs, E = p.exchange.num_experts;
  const uint64_t* routing = op.block(op.me).routing(plan_parity(op), 0);
  const uint32_t tag = word_tag(op.tag);
  int place[kGathered];  // in `routing`, in pairs; -1: nothing is awaited
  int source = sizes.by_pairs(first + lane_id()), pair = first + lane_id() - source * pairs;
#pragma unroll
  for (int j = 0; j < kGathered; ++j) {
    place[j] = expert[j] = -1;
    if (first + 32 * j >= last) continue;  // the same in all lanes
    const bool is_pair = first + 32 * j + lane_id() < last;
    if (is_pair && source == op.me) expert[j] = p.topk_idx[pair];
    if (is_pair && source != op.me) place[j] = source * kMaxPairs + pair;
    for (pair += 32; pair >= pairs; pair -= pairs) ++source;
  }
  uint64_t start = 0;
  for (int polls = 0;; ++polls) {
    uint64_t word[kGathered];
    int missing = -1;
#pragma unroll
    for (int j = 0; j < kGathered; ++j) {
      if (place[j] >= 0) word[j] = load_relaxed(routing + place[j] / 2);
    }
#pragma unroll
    for (int j = 0; j < kGathered; ++j) {
      if (place[j] < 0) continue;
      expert[j] = choice_of(word[j], place[j]);
      if (tag_of(word[j]) != tag) missing = place[j];
    }
    if (!__any_sync(kAllLanes, missing >= 0)) break;
    if (polls == 0) start = now_ns();
    if (polls % 32 != 31) continue;
    const bool give_up = missing >= 0 && hopeless_words(op, missing / kMaxPairs, start);
    if (__any_sync(kAllLanes, give_up)) return false;
  }
#pragma unroll
  for (int j = 0; j < kGathered; ++j) {
    if (expert[j] < 0 || expert[j] >= E) expert[j] = -1;
  }
  return true;
}

}  // namespace jax_ep
