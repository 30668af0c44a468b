// SPDX-License-Identifier: Apache-2.0
// Rows on their way through shared memory: a ring of slots that one warp fills, in order, and that
// every consumer warp reads, in the same order.
//
//   producer warp, one lane a slot         slot i              each consumer warp, in its own time
//   await empty[i]                                             await full[i]
//   write note[i]                          note[i]      ->     read note[i], its columns of row[i]
//   arrive at full[i], expect the bytes
//   bulk copy: global -> row[i]        ->  row[i]
//              its bytes complete full[i]                      one lane: arrive at empty[i]
//
// full[i]    publishes note[i] and row[i] to the consumers: by the producer's arrival, which a note
//            without a row consists of, and by the bytes.
// empty[i]   gives the slot back: by one arrival of each consumer warp, after all its lanes have
//            read. The producer's acquire orders the next bulk copy behind these reads.
//
// Nobody resets a barrier: a position in the ring has a phase, which flips with every round. A
// consumer waits for its producer only, and this for whoever gives it rows.
#pragma once
#include "ptx.cuh"
#include "warp.cuh"

namespace jax_ep {

constexpr int kMostSlots = 32;

// What goes with a row.
struct alignas(16) Note {
  float weight;
  uint32_t what;  // the consumers are to do, after they have added the row
  char* to;
};

// What a bulk copy takes, a multiple of 16 bytes; or nothing.
struct Piece {
  const char* from = nullptr;
  int bytes = 0;
};

struct RingState {  // in shared memory
  uint64_t full[kMostSlots];
  uint64_t empty[kMostSlots];
  Note note[kMostSlots];
};

// The ring as one warp sees it, with the position of that warp.
class Ring {
 public:
  // Slots of `slot_bytes`, a multiple of 16; as many as fit into `bytes` at `rows`.
  __device__ Ring(RingState& state, void* rows, int slot_bytes, int bytes)
      : notes_(state.note),
        barriers_(shared_address(state.full)),
        rows_(shared_address(rows)),
        slot_bytes_(slot_bytes),
        slots_(min(kMostSlots, bytes / slot_bytes)),
        row_(rows_) {}

  // By one warp, before a block barrier.
  __device__ void init(int consumer_warps) {
    for (int i = lane_id(); i < slots_; i += 32) {
      init_barrier(full(i), kBulkCopies ? 1 : 1 + 32);
      init_barrier(empty(i), consumer_warps);
    }
    fence_shared_for_bulk_copies();
  }

  // By the producer's warp: the next `count` slots. The lane whose `which` is i fills the i-th of
  // these with its note, its row, which may be none, and behind the row its tail.
  __device__ __forceinline__ void put(int which, int count, const Note& note, const Piece& row,
                                      const Piece& tail = {}) {
    for (; count > 0; count -= slots_, which -= slots_) {
      const int some = min(count, slots_);  // never two rows for one slot at once
      if constexpr (kBulkCopies) {
        fill(which, some, note, row, tail);
      } else {
        fill_by_lanes(which, some, note, row, tail);
      }
      slot_ += some;
      if (slot_ >= slots_) begin_round();
    }
  }

  // By a consumer warp: the note of its next slot, which is full then; what lies at a byte of the
  // row; and the end of reading.
  __device__ __forceinline__ Note await() const {
    while (!is_complete_soon(full(slot_), phase_)) {
    }
    return notes_[slot_];
  }
  template <typename V>
  __device__ __forceinline__ V at(int byte) const {
    return load_shared<V>(row_ + byte);
  }
  __device__ __forceinline__ void release() {
    __syncwarp();  // all lanes have read
    if (lane_id() == 0) arrive(empty(slot_));
    ++slot_;
    row_ += slot_bytes_;
    if (slot_ == slots_) begin_round();
  }

 private:
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers_ + slot * 8; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return full(kMostSlots + slot); }

  // The slot that is `ahead` of the next one, less than a round, and the phase of its use.
  struct Place {
    int slot;
    uint32_t phase;
  };
  __device__ __forceinline__ Place place(int ahead) const {
    const int slot = slot_ + ahead;
    return slot < slots_ ? Place{slot, phase_} : Place{slot - slots_, phase_ ^ 1};
  }

  __device__ __forceinline__ void begin_round() {
    slot_ -= slots_;
    row_ = rows_;
    phase_ ^= 1;
  }

  // Slots become free in order: wait for the first one, then take what there is.
  __device__ __forceinline__ void fill(int which, int count, const Note& note, const Piece& row,
                                       const Piece& tail) {
    bool todo = which >= 0 && which < count;
    const Place mine = place(which);
    const uint32_t barrier = full(mine.slot), to = rows_ + mine.slot * slot_bytes_;
    for (int done = 0; done < count; done = count - __popc(__ballot_sync(kAllLanes, todo))) {
      const Place next = place(done);
      while (!is_complete_soon(empty(next.slot), next.phase ^ 1)) {
      }
      __syncwarp();  // all lanes have seen it, before it may be filled and be free once more
      if (!todo || !is_complete(empty(mine.slot), mine.phase ^ 1)) continue;
      todo = false;
      notes_[mine.slot] = note;
      if (row.bytes > 0) {
        arrive_and_expect(barrier, row.bytes + tail.bytes);
        copy_bulk(to, row.from, row.bytes, barrier);
        if (tail.bytes > 0) copy_bulk(to + row.bytes, tail.from, tail.bytes, barrier);
      } else {
        arrive(barrier);
      }
    }
  }

  // Without bulk copies: one slot after the other, by all lanes.
  __device__ void fill_by_lanes(int which, int count, const Note& note, const Piece& row,
                                const Piece& tail) {
    for (int i = 0; i < count; ++i) {
      const int lane = __ffs(__ballot_sync(kAllLanes, which == i)) - 1;
      const Place next = place(i);
      while (!is_complete(empty(next.slot), next.phase ^ 1)) {
      }
      const uint32_t to = rows_ + next.slot * slot_bytes_;
      copy_by_lanes(to, row, lane);
      copy_by_lanes(to + __shfl_sync(kAllLanes, row.bytes, lane), tail, lane);
      arrive_when_copied(full(next.slot));
      if (which == i) {
        notes_[next.slot] = note;
        arrive(full(next.slot));
      }
    }
  }

  __device__ static void copy_by_lanes(uint32_t to, const Piece& piece, int lane) {
    const char* from = of_lane(piece.from, lane);
    const int bytes = __shfl_sync(kAllLanes, piece.bytes, lane);
    for (int at = lane_id() * int(sizeof(Vec)); at < bytes; at += 32 * int(sizeof(Vec))) {
      copy_async(to + at, from + at);
    }
  }

  Note* const notes_;
  const uint32_t barriers_;  // addresses: `full`, then `empty`
  const uint32_t rows_;
  const int slot_bytes_;
  const int slots_;
  int slot_ = 0;
  uint32_t row_;  // address of the next slot's row, for a consumer
  uint32_t phase_ = 0;
};

}  // namespace jax_ep
