// SPDX-License-Identifier: Apache-2.0
// Small batches of a group that spans nodes: how what a rank sends gets to other nodes.
//
//   rank of my node      stores and flags, as in device/slots.cuh
//   rank of another one  what it gets is stored in an outbox of mine, laid out as my inbox there
//                        (layout/slots.h); a put takes it from there to the same place of that
//                        inbox, and its signal is the flag, or the hello. One hop, whatever the
//                        sender's and the receiver's places in their nodes are.
//
// Signals set words that nobody else writes, to the operation's tag; a put's own signal alone says
// that its data are there. So flags and hellos of other nodes are awaited as those of this one, and
// words of routing, which say themselves that they have come inside a node, only behind the hello.
//
// Who may overwrite an outbox, or what lies in an inbox, when: a rank that starts n + 2 has done
// n + 1, for which it awaited the hello of n + 1 of every rank. Each sent that after its own done
// n, which ended only when it had seen the signals of all puts of n to it: so these puts have left
// the outbox, and what they brought has been read. Dispatch and combine take different parts of the
// outboxes, so each has its own two copies.
#pragma once
#include "../device/slots.cuh"
#include "transport.cuh"

namespace jax_ep {

// What SlotOp is inside a node.
template <typename Transport>
class NodeSlotOp : public SlotOp {
 public:
  static constexpr bool kSpansNodes = true;

  __device__ NodeSlotOp(const Call& call, SlotKind kind, Half half, const int32_t* ticket,
                        const Transport& transport)
      : SlotOp(call, kind, half, ticket), transport_(transport) {}

  __device__ bool stores_to(int rank) const { return rank != op.me && op.reaches(rank); }
  __device__ RankSet outboxes_of(const RankSet& named) const {
    const uint64_t node = ((uint64_t{1} << op.call.peers.node_ranks) - 1) << op.node_first();
    const uint64_t me = uint64_t{1} << op.me, all = uint64_t{named.high} << 32 | named.low;
    const uint64_t to = (all & node & ~me) | ((all & ~node) != 0 ? me : 0);
    return {static_cast<unsigned>(to), static_cast<unsigned>(to >> 32)};
  }
  __device__ bool fills(int) const { return true; }
  __device__ Inbox outbox(int rank) const {
    if (stores_to(rank)) return SlotOp::outbox(rank);
    const Peers& peers = op.call.peers;
    const size_t number = size_t(kInboxSets + parity()) * op.R + rank;
    return Inbox(peers.slots, peers.control[op.me] + peers.at.total + number * peers.slots.total);
  }

  // By one warp: greet the ranks of this node; and the others, where no put carries the greeting.
  __device__ void greet() const {
    for (int r = lane_id(); r < op.R; r += 32) {
      if (stores_to(r)) store_relaxed(outbox(r).hello(), tag);
    }
  }
  __device__ void greet_other_nodes() const {
    const Inbox mine = outbox(op.me);
    for (int r = lane_id(); r < op.R; r += 32) {
      if (!op.reaches(r)) transport_.signal(r, there(mine, mine.hello()), tag);
    }
  }

  // As inside a node: acquires what rank `from` has sent.
  __device__ bool await(const uint64_t* word, int from, Phase phase) const {
    const bool seen = SlotOp::await(word, from, phase);
    if (seen && !op.reaches(from)) transport_.receive(word);
    return seen;
  }

  // By all lanes of a warp, after a barrier with those that have stored it: `bytes` at `what` of
  // `outbox` to the same place of my inbox at `rank`, then its word `flag` is the tag.
  __device__ void put(int rank, const Inbox& outbox, const void* what, int bytes,
                      const uint64_t* flag) const {
    const size_t vecs = (bytes + sizeof(Vec) - 1) / sizeof(Vec);
    transport_.put_signal_by_warp(rank, there(outbox, what), static_cast<const char*>(what),
                                  vecs * sizeof(Vec), there(outbox, flag), tag);
  }

  // By one block that gives up.
  __device__ void tell_other_nodes() const { jax_ep::tell_other_nodes(op, transport_); }

 private:
  // Where a place of an outbox is on the rank that it is for.
  __device__ uint64_t there(const Inbox& outbox, const void* place) const {
    return sent_at() +
           (static_cast<const char*>(place) - reinterpret_cast<const char*>(outbox.hello()));
  }

  const Transport& transport_;
};

}  // namespace jax_ep
