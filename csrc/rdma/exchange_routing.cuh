// SPDX-License-Identifier: Apache-2.0
// exchange_routing: how ranks of other nodes learn my routing, an operation of its own before each
// plan.
//
//   topk_idx -> {choice, choice, tag} -> words[parity], in my arena        (all blocks, then meet)
//   words[parity] -> routing[parity][me] of each rank of other nodes       (put)
//                    hello[parity][me] there = the plan's tag              (its signal)
//   await hello[parity][r] of each rank r of other nodes
//
// Words and hellos are those of the plan (kernels/plan_exchange.cuh) and carry its tag. So the plan
// that follows finds everything of other nodes complete, and is the same kernel as inside a node.
//
// Why no word is overwritten too early: rank s puts its next words of the same parity before its
// plan n + 2, after it has awaited my hello of n + 1. I put that in an operation that begins when
// my plan n has ended, which alone reads the words of n. The same hello says that the put of n had
// reached me, as I had awaited its signal: so s may write `words` of that parity anew, too.
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

template <typename Transport>
__device__ void put_words(const WithTransport<NodeRouting, Transport>& p, const Op& op,
                          uint64_t tag, const uint64_t* words) {
  const Block mine = op.block(op.me);
  const char* base = op.call.peers.control[op.me];
  const int parity = plan_parity(op), others = op.R - op.call.peers.node_ranks;
  const size_t bytes = size_t(p.exchange.num_pairs() + 1) / 2 * sizeof(uint64_t);
  const uint64_t to = reinterpret_cast<const char*>(mine.routing(parity, op.me)) - base;
  const uint64_t hello = reinterpret_cast<const char*>(mine.hello(parity, op.me)) - base;
  for (int i = blockIdx.x; i < others; i += gridDim.x) {
    const int r = (op.node_last() + i) % op.R;  // the ranks behind my node first
    p.transport.put_signal(Team::whole_block(), r, to, reinterpret_cast<const char*>(words), bytes,
                           hello, tag);
  }
}

// By one block. False: give up.
template <typename Transport>
__device__ bool await_other_nodes(const WithTransport<NodeRouting, Transport>& p, const Op& op,
                                  uint64_t tag) {
  bool here = true;
  for (int r = threadIdx.x; r < op.R; r += blockDim.x) {
    if (op.reaches(r)) continue;
    const uint64_t* hello = op.block(op.me).hello(plan_parity(op), r);
    here &= op.await(hello, tag, r, Phase::kRouting);
    if (here) p.transport.receive(hello);
  }
  return here;
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
