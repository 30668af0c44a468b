// SPDX-License-Identifier: Apache-2.0
// The role that puts messages which other blocks have made. Few blocks keep a link busy, and more
// only make its queue longer; and who makes messages need not wait until it has taken them.
//
//   send or gateway block    await room, write the message -> send slot
//                            packed, a release              --> the put block of that message
//   put block                send slot --put, signal-->  receive slot
#pragma once
#include "block_copy.cuh"
#include "rings.cuh"

namespace jax_ep {

// By all threads of a block that has written message `turn`, after a block barrier.
__device__ inline void hand_to_put(const Rings& rings, const Turn& turn) {
  if (threadIdx.x != 0) return;
  store_release_gpu(rings.word(rings.packed(turn)), rings.stamp(turn));  // publishes the message
}

// Threads that put a message: as many as keep it short, and as few as let a block put several, so
// that while one signal waits until the link has taken everything, other messages go on.
constexpr int kPutThreads = kFullBlock < 128 ? 32 : 128;

// By block `block` of `blocks`: chunk after chunk, to node after node, of which `node_of(i)` is the
// i-th other one. Each team takes its turn among all. False for some threads: give up.
template <typename Transport, typename NodeOf>
__device__ bool put_messages(const Op& op, const Rings& rings, const Transport& transport,
                             const MessageShape& shape, int chunks, int block, int blocks,
                             NodeOf&& node_of) {
  const Team team = Team::of(kPutThreads);
  const int others = rings.N - 1, first = block + blocks * (threadIdx.x / kPutThreads);
  for (int i = first; i < chunks * others; i += blocks * (blockDim.x / kPutThreads)) {
    const int node = node_of(i % others);
    const Turn turn = rings.message(node, i / others), there = turn.of(rings.node);
    bool packed = true;
    if (team.thread == 0) {
      const uint64_t* word = rings.word(rings.packed(turn));
      packed = op.await_block([&] { return load_acquire_gpu(word) == rings.stamp(turn); });
    }
    if (!team.all(packed)) return false;
    const char* slot = rings.here(rings.to_send(turn));
    const int rows = load_arrived(&reinterpret_cast<const MessageHead*>(slot)->rows);
    transport.put_signal(team, rings.rank_of(node), rings.received(there, node), slot,
                         shape.bytes(rows), rings.arrived(there), rings.stamp(turn));
  }
  return true;
}

}  // namespace jax_ep
