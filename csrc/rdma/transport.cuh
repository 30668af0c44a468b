// SPDX-License-Identifier: Apache-2.0
// What the kernels ask of the network between nodes. They are templates over a Transport, a small
// struct that travels as a kernel argument. Everything remote lies in the arena, which is laid out
// alike on all ranks: places are offsets from the start of a rank's control block.
//
//   struct Transport {
//     // By all threads of a team, after a barrier of it: `bytes` at `from`, in my arena, to offset
//     // `to` of `rank`; then `value` to its word at offset `signal`. Returns before that: `from`
//     // must stay as it is until the receiver has answered the signal.
//     void put_signal(const Team& team, int rank, uint64_t to, const char* from, size_t bytes,
//                     uint64_t signal, uint64_t value) const;
//     // The same by all lanes of a warp; `bytes` is a multiple of 16.
//     void put_signal_by_warp(int rank, uint64_t to, const char* from, size_t bytes,
//                             uint64_t signal, uint64_t value) const;
//     // By one thread: `value` to the word at offset `signal` of `rank`. What this thread has read
//     // and written before, or others before a block barrier, is over when it arrives.
//     void signal(int rank, uint64_t signal, uint64_t value) const;
//     // By the thread that has seen a signal at `word`, by an acquiring load, before anybody reads
//     // what was put with it.
//     void receive(const uint64_t* word) const;
//   };
//
// Puts and signals are ordered by nothing else: two puts to one rank may arrive in any order and
// piece by piece, only a put's own signal comes after all of its data. Waiting is not the
// transport's: `Op::await` polls, in bounded time.
#pragma once
#include "../device/op.cuh"
#include "block_copy.cuh"
#include "layout.h"

namespace jax_ep {

// By one block, when the operation has failed here: ranks of other nodes find the group broken as
// those of this node do. A later failure may overwrite the name of an earlier one.
template <typename Transport>
__device__ void tell_other_nodes(const Op& op, const Transport& transport) {
  const uint64_t broken = op.call.peers.at.header + offsetof(Header, broken);
  for (int r = threadIdx.x; r < op.R; r += blockDim.x) {
    if (!op.reaches(r)) transport.signal(r, broken, 1 + op.me);
  }
}

}  // namespace jax_ep
