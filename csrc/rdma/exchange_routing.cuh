// SPDX-License-Identifier: Apache-2.0
// exchange_routing: how ranks of other nodes learn my routing, an operation of its own before each
// plan.
//
//   topk_idx -> {choice, choice, tag} -> words[parity], in my arena        (all blocks, then meet)
//   a piece of words[parity] -> routing[parity][me] of a rank of other nodes               (put)
//                               routed[parity][me][piece] there = the plan's tag    (its signal)
//   await routed[parity][r][piece] of each rank r of other nodes -> my hello[parity][r]
//
// Words and hellos are those of the plan (kernels/plan_exchange.cuh) and carry its tag. So the plan
// that follows finds everything of other nodes complete, and is the same kernel as inside a node.
//
// Why no word is overwritten too early: rank s puts its next words of the same parity before its
// plan n + 2, after it has awaited my pieces of n + 1. I put them in an operation that begins when
// my plan n has ended, which alone reads the words of n. The same pieces say that the puts of n had
// reached me, as I had awaited their signals: so s may write `words` of that parity anew, too.
#pragma once
#include "../kernels/plan_exchange.cuh"
#include "launch.h"
#include "rings.cuh"

namespace jax_ep {

// By all threads of the launch. False: one of this thread's choices is out of range. It is refused
// here, as the plan that follows could not tell other nodes.
__device__ inline bool write_words(const Op& op, const int32_t* topk_idx, const Exchange& x,
                                   uint32_t tag, uint64_t* to) {
  const int pairs = x.num_pairs(), step = gridDim.x * blockDim.x;
  bool good = true;
  for (int w = blockIdx.x * blockDim.x + threadIdx.x; w < (pairs + 1) / 2; w += step) {
    const Choices choices = choices_of(topk_idx, pairs, w);
    to[w] = make_word(tag, choices.even, choices.odd);
    good &= accept(op, choices, x.num_experts);
  }
  return good;
}

__device__ inline int ranks_of_other_nodes(const Op& op) { return op.R - op.call.peers.node_ranks; }

__device__ inline RoutingPieces pieces_of(const Op& op, const Exchange& x) {
  return RoutingPieces(ranks_of_other_nodes(op), (x.num_pairs() + 1) / 2);
}

// Offset of rank r's routed[parity] from the start of a control block.
__device__ inline uint64_t routed_at(const NodeRouting& p, const Op& op, int most_pieces, int r) {
  return p.at.routed + sizeof(uint64_t) * most_pieces * (size_t(plan_parity(op)) * op.R + r);
}

template <typename Transport>
__device__ void put_words(const WithTransport<NodeRouting, Transport>& p, const Op& op,
                          uint64_t tag, const uint64_t* words) {
  const uint64_t* routing = op.block(op.me).routing(plan_parity(op), op.me);
  const char* base = op.call.peers.control[op.me];
  const uint64_t to = reinterpret_cast<const char*>(routing) - base;
  const int others = ranks_of_other_nodes(op), all = (p.exchange.num_pairs() + 1) / 2;
  const RoutingPieces pieces = pieces_of(op, p.exchange);
  const uint64_t routed = routed_at(p, op, pieces.most, op.me);
  for (int i = blockIdx.x; i < others * pieces.count; i += gridDim.x) {
    const int r = (op.node_last() + i % others) % op.R;  // the ranks behind my node first
    const int piece = i / others, first = piece * pieces.words;
    const int some = min_int(pieces.words, all - first);
    p.transport.put_signal(Team::whole_block(), r, to + first * sizeof(uint64_t),
                           reinterpret_cast<const char*>(words + first), some * sizeof(uint64_t),
                           routed + piece * sizeof(uint64_t), tag);
  }
}

// By one block: every piece of every rank of other nodes, each by a thread, in bounded time; or the
// end of the group, with which nobody reads a hello that only the first piece has earned.
template <typename Transport>
__device__ void await_other_nodes(const WithTransport<NodeRouting, Transport>& p, const Op& op,
                                  uint64_t tag) {
  const RoutingPieces pieces = pieces_of(op, p.exchange);
  for (int i = threadIdx.x; i < op.R * pieces.count; i += blockDim.x) {
    const int r = i / pieces.count, piece = i % pieces.count;
    if (op.reaches(r)) continue;
    const char* routed = op.call.peers.control[op.me] + routed_at(p, op, pieces.most, r);
    const uint64_t* word = reinterpret_cast<const uint64_t*>(routed) + piece;
    if (!op.await(word, tag, r, Phase::kRouting)) continue;
    p.transport.receive(word);
    if (piece == 0) store_relaxed(op.block(op.me).hello(plan_parity(op), r), tag);
  }
}

template <typename Transport>
__device__ void exchange_routing(const WithTransport<NodeRouting, Transport>& p) {
  const Op op(p.call);
  const uint64_t tag = make_tag(op.tag >> 56, op.epoch() + 1, p.plan_signature);
  if (!op.began_broken()) {
    auto* words = reinterpret_cast<uint64_t*>(p.call.peers.control[op.me] + p.at.words) +
                  plan_parity(op) * (kMaxPairs / 2);
    if (op.meet(write_words(op, p.topk_idx, p.exchange, word_tag(tag), words))) {
      put_words(p, op, tag, words);
      if (blockIdx.x == 0) await_other_nodes(p, op, tag);
    }
  }
  op.leave([&] { tell_other_nodes(op, p.transport); });
}

}  // namespace jax_ep
