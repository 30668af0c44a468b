// SPDX-License-Identifier: Apache-2.0
// combine's orders: what the finder has found, for the filler to put into the ring. Two warps, as
// one takes as long to look rows up as the other to issue their copies.
//
//   finder   await taken[i]   a lane an order -> order[i][]   arrive at given[i]
//   filler   await given[i]   its order <- order[i][lane]     arrive at taken[i], fill the ring
//
// An arrival releases, who finds its phase complete acquires: given[i] the orders, taken[i] that
// they have been read. What the finder has stored before, its arrival publishes, too, and the
// filler's at the ring passes it on: scalars on peers, the signaller's entries.
//
// Of all that is awaited in a block only the finder's wait for a peer's chunk may not come, and it
// is bounded: the finder then stops, and its last order ends the others.
#pragma once
#include "combine_parts.cuh"

namespace jax_ep {

constexpr int kOrderBatches = 4;

// What goes into one slot of the ring.
struct Order {
  Note note;
  Piece row, tail;
};

struct Orders {  // in shared memory
  Order order[kOrderBatches][32];
  int count[kOrderBatches];
  uint64_t given[kOrderBatches];
  uint64_t taken[kOrderBatches];

  // By one warp, before a block barrier.
  __device__ void init() {
    if (lane_id() >= kOrderBatches) return;
    init_barrier(shared_address(&given[lane_id()]), 1);
    init_barrier(shared_address(&taken[lane_id()]), 1);
  }
};

// One end of the orders, with its position.
class OrderQueue {
 public:
  __device__ explicit OrderQueue(Orders& orders) : orders_(orders) {}

  // By the finder's warp: the next `count` orders, at most 32. The lane whose `which` is i has the
  // i-th of these.
  __device__ __forceinline__ void put(int which, int count, const Note& note, const Piece& row,
                                      const Piece& tail = {}) {
    while (!is_complete_soon(shared_address(&orders_.taken[place_]), phase_ ^ 1)) {
    }
    if (which >= 0 && which < count) orders_.order[place_][which] = {note, row, tail};
    if (lane_id() == 0) orders_.count[place_] = count;
    __syncwarp();  // all orders before the arrival
    if (lane_id() == 0) arrive(shared_address(&orders_.given[place_]));
    next();
  }

  // By the filler's warp: how many orders come next, and this lane's, if it has one.
  __device__ __forceinline__ int take(Order* mine) {
    while (!is_complete_soon(shared_address(&orders_.given[place_]), phase_)) {
    }
    const int count = orders_.count[place_];
    if (lane_id() < count) *mine = orders_.order[place_][lane_id()];
    __syncwarp();  // all lanes have read
    if (lane_id() == 0) arrive(shared_address(&orders_.taken[place_]));
    next();
    return count;
  }

 private:
  __device__ void next() {
    place_ = (place_ + 1) % kOrderBatches;
    if (place_ == 0) phase_ ^= 1;
  }
  Orders& orders_;
  int place_ = 0;
  uint32_t phase_ = 0;
};

// By the filler's warp, until the finder stops.
__device__ inline void fill_ring(Ring ring, OrderQueue queue) {
  for (bool stop = false; !stop;) {
    Order mine = {};
    const int count = queue.take(&mine);
    ring.put(lane_id() < count ? lane_id() : -1, count, mine.note, mine.row, mine.tail);
    stop = __any_sync(kAllLanes, mine.note.what & kStop);
  }
}

}  // namespace jax_ep
