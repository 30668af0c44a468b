// SPDX-License-Identifier: Apache-2.0
// combine's signaller: counts the items whose partials its block has pushed, and says when a chunk
// is complete. A role of its own, as a count that publishes pushes waits until the link has taken
// them all: microseconds, in which the consumers go on.
//
//   consumer warp   pushes, then arrives at stored[i]        its pushes before the arrival
//   signaller       sees stored[i] complete                  acquires the pushes of all warps
//                   adds 1 to the chunk's count (release)    and passes them on
//   the last of all blocks of this rank, by that count       acquires the pushes of all blocks
//                   signals done[me][chunk] on the source    (release) publishes the chunk
//
// Scalars take the same way: the finder gives an item's orders after it has pushed them, and the
// filler passes them on at the ring.
#pragma once
#include "combine_parts.cuh"

namespace jax_ep {

// By one lane: count one item. The next operation finds the count at zero.
__device__ __forceinline__ void count_item(const Body& b, const Pushed& item) {
  const Op& op = b.op;
  const int chunk = item.token / b.chunk;
  const int tokens = min_int(b.chunk, b.p.exchange.num_tokens - chunk * b.chunk);
  uint32_t* pushed = op.block(op.me).pushed(item.source, chunk);
  if (add_acq_rel_gpu(pushed, 1) + 1 != uint32_t(tokens * b.cut.segments)) return;
  *pushed = 0;
  store_release_sys(op.block(item.source).done(op.me, chunk), op.tag);
  stamp(op.call, Stamp::kPushed);
}

// By the signaller's warp, until the entry that ends the pushes: items in order, as many at a time
// as are there, one a lane.
__device__ inline void signal_pushes(const Body& b, Pushes& pushes) {
  const uint32_t stored = shared_address(pushes.stored), counted = shared_address(pushes.counted);
  bool last = false;
  for (uint32_t next = 0; !last;) {
    while (!is_complete_soon(stored + next % kPlaces * 8, phase_of(next))) {
    }
    const uint32_t n = next + lane_id(), place = n % kPlaces;
    const bool there = lane_id() < kPlaces && is_complete(stored + place * 8, phase_of(n));
    const int count = __ffs(~__ballot_sync(kAllLanes, there)) - 1;
    if (lane_id() < count) {
      const Pushed item = pushes.entry[place];
      arrive(counted + place * 8);
      last = item.source < 0;
      if (!last) count_item(b, item);
    }
    last = __any_sync(kAllLanes, last);
    next += count;
  }
}

}  // namespace jax_ep
