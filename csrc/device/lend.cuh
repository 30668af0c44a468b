// SPDX-License-Identifier: Apache-2.0
// Lending output buffers: a receiver publishes where its peers may write in this operation, a
// sender takes the lease before its first push. Locations become addresses here and nowhere else.
//
//   receiver r         lease[s] = OPEN (own block)  ->  ready[r] of s = {locations, sizes, tag}
//   sender s, block 0  await ready[r]  ->  compare-and-swap r's lease[s]: OPEN -> TAKEN
//                      ->  borrowed[r] (own block)
//   its other blocks   await borrowed[r]
//
// One block takes the leases, as a hundred swaps of one word on a peer would take turns. Nobody
// pushes or signals before all leases are taken: so no peer can be done with the operation, and
// overwrite `ready` by the next one, while block 0 awaits it.
// A block that comes after everything has been pushed may read the next operation's addresses; it
// finds no ticket, and uses none.
#pragma once
#include "op.cuh"
#include "warp.cuh"

namespace jax_ep {

// By one block of the receiver, once: lend my outputs to every peer of my node.
__device__ inline void lend_outputs(const Op& op) {
  for (int p = op.node_first() + threadIdx.x; p < op.node_last(); p += blockDim.x) {
    if (p == op.me) continue;
    store_release_sys(op.block(op.me).lease(p), op.tag);
    Ready& there = op.block(p).ready(op.me);
    for (int i = 0; i < kMaxOutputs; ++i) {
      there.output[i] = op.call.lent.output[i];
      there.bytes[i] = op.call.lent.bytes[i];
    }
    store_release_sys(&there.tag, op.tag);  // publishes the lease, the locations and the sizes
  }
}

// What a sender's block knows of its peers' outputs; in shared memory.
struct Borrowed {
  char* output[kMaxRanks][kMaxOutputs];
  uint64_t bytes[kMaxRanks][kMaxOutputs];
  int failed;
};

// By every block that pushes, all threads: the outputs of all peers of my node. False: give up.
__device__ inline bool borrow_outputs(const Op& op, Borrowed& b) {
  if (threadIdx.x == 0) b.failed = 0;
  __syncthreads();
  for (int p = op.node_first() + threadIdx.x; p < op.node_last(); p += blockDim.x) {
    if (p == op.me) continue;
    const Ready& ready = op.block(op.me).ready(p);
    uint64_t* borrowed = op.block(op.me).borrowed(p);
    bool taken;
    if (blockIdx.x == 0) {
      taken = op.await(&ready.tag, p, Phase::kReady);  // acquires what `lend_outputs` published
      if (taken) {
        const uint64_t was = cas_acq_rel_sys(op.block(p).lease(op.me), op.tag, op.tag | kTaken);
        taken = was == op.tag;
        if (!taken) op.fail(Fault::kRevoked, Phase::kReady, p, was, op.tag);
      }
      if (taken) store_release_gpu(borrowed, op.tag);  // passes it on to the other blocks
    } else {
      taken = op.await_block([&] { return load_acquire_gpu(borrowed) == op.tag; });  // acquires it
    }
    if (!taken) b.failed = 1;
    for (int i = 0; i < kMaxOutputs && taken; ++i) {
      const Location at = ready.output[i];
      b.output[p][i] = const_cast<char*>(op.block(op.me).mapping(p, at.allocation)) + at.offset;
      b.bytes[p][i] = ready.bytes[i];
    }
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) stamp(op.call, Stamp::kReady);
  return !b.failed;
}

// By one warp that has pushed one of the `items` of a chunk: count it, and with the last one signal
// `done[me][chunk]` to the ranks in [first, last), me excepted. The chunk's count is kept by
// `first`.
__device__ inline void finish_item(const Op& op, int chunk, uint32_t items, int first, int last) {
  uint32_t* pushed = op.block(op.me).pushed(first, chunk);
  bool complete = false;
  __syncwarp();  // the warp's pushes before the count
  if (lane_id() == 0)
    complete = add_acq_rel_gpu(pushed, 1) + 1 == items;  // gathers all warps' pushes
  if (!__shfl_sync(kAllLanes, complete, 0)) return;
  __syncwarp();  // what the first lane has gathered, before any lane's flag
  if (lane_id() == 0) *pushed = 0;
  for (int p = first + lane_id(); p < last; p += 32) {
    if (p != op.me)
      store_release_sys(op.block(p).done(op.me, chunk), op.tag);  // publishes the chunk
  }
  if (lane_id() == 0) stamp(op.call, Stamp::kPushed);
}

// By one warp of a receiver: await `done[p][chunk]` of the ranks in [first, last), me excepted.
__device__ inline bool await_chunk(const Op& op, int chunk, int first, int last) {
  bool arrived = true;
  for (int p = first + lane_id(); p < last; p += 32) {
    if (p != op.me)
      arrived &= op.await(op.block(op.me).done(p, chunk), p, Phase::kRows);  // acquires
  }
  __syncwarp();  // what one lane has acquired, all lanes may read
  return __all_sync(kAllLanes, arrived);
}

// By one warp of a receiver, without waiting: how many chunks, from `chunk` on, all others have
// published. Looks at as many as lanes can, so none with more than 33 ranks.
__device__ inline int arrived_chunks(const Op& op, int chunk, int chunks) {
  const int others = op.R - 1, ahead = lane_id() / others;
  const int p = (op.me + 1 + lane_id() % others) % op.R;
  bool arrived = (ahead + 1) * others <= 32 && chunk + ahead < chunks;
  if (arrived) arrived = load_acquire_sys(op.block(op.me).done(p, chunk + ahead)) == op.tag;
  const unsigned missing = ~__ballot_sync(kAllLanes, arrived);
  __syncwarp();  // what one lane has acquired, all lanes may read
  return (missing == 0 ? 32 : __ffs(missing) - 1) / others;
}

}  // namespace jax_ep
