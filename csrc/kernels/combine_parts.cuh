// SPDX-License-Identifier: Apache-2.0
// What the roles of one of combine's blocks tell each other, in shared memory.
//
//   warp 0    signaller  items that are pushed -> counts, done flags      (combine_signaller.cuh)
//   warp 1    finder     items -> rows and notes: orders                  (combine_finder.cuh)
//   warp 2    filler     orders -> the ring, whose producer it is         (combine_orders.cuh)
//   others    consumers  the ring -> sums -> partials on peers, results   (combine_consumer.cuh)
//
// An item is one segment of one token for one source. Consumers know no items: a note says what to
// do with a row, and after it.
#pragma once
#include "../device/lend.cuh"
#include "../device/ring.cuh"

namespace jax_ep {

// Warps share the four schedulers of an SM in turn: the first has four consumers beside the
// signaller, which mostly waits; those of the finder and the filler have three.
constexpr int kSignallerWarp = 0;
constexpr int kFinderWarp = 1;
constexpr int kFillerWarp = 2;
constexpr int kFirstConsumer = 3;
constexpr int kConsumerWarps = min_int(14, kFullBlock / 32 - kFirstConsumer);  // 14 on GPUs
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kCombineThreads = 32 * kFirstConsumer + kConsumers;
constexpr int kColumnVecs = 2;  // of a consumer
constexpr int kMostSegmentVecs = kColumnVecs * kConsumers;

enum Output { kPartials = 0, kScalars = 1 };

// Note::what: the Vecs of the item, at most kMostSegmentVecs, what the row is, and what consumers
// do after it, in this order.
constexpr uint32_t kFp8Row = 1 << 15;  // a partial as it travels: e4m3 and scales
constexpr uint32_t kClear = 1 << 16;   // there was no row: the sum is zero
constexpr uint32_t kHold = 1 << 17;    // my own partial is complete: round, hold, begin anew
constexpr uint32_t kAddOwn = 1 << 18;  // add what is held
constexpr uint32_t kStore = 1 << 19;   // round, store to `to`, begin anew; quantise what is told
constexpr uint32_t kTell = 1 << 20;    // tell the signaller, at the place in bits 24 and up
constexpr uint32_t kStop = 1 << 21;
constexpr uint32_t kSomething = kClear;  // from here on
constexpr int kPlaceShift = 24;

static_assert(kMostSegmentVecs < kFp8Row);

__device__ __forceinline__ int vecs_of(const Note& note) { return note.what % kFp8Row; }

// Items to push, from the finder to the signaller by way of the consumers.
constexpr int kPlaces = 16;
struct Pushed {
  int token;
  int source;  // -1: the last entry
};

struct Pushes {               // in shared memory
  Pushed entry[kPlaces];      // by the finder, before the note that names it
  char* scales[kPlaces];      // with the entry: where the partial's go, if it travels as FP8
  uint64_t stored[kPlaces];   // one arrival of each consumer warp, after its pushes of the item
  uint64_t counted[kPlaces];  // by the signaller, which has read the entry: free again

  // By one warp, before a block barrier.
  __device__ void init() {
    if (lane_id() >= kPlaces) return;
    init_barrier(shared_address(&stored[lane_id()]), kConsumerWarps);
    init_barrier(shared_address(&counted[lane_id()]), 1);
  }
};

__device__ __forceinline__ uint32_t phase_of(uint32_t n) { return n / kPlaces & 1; }

// One rank's part in one block.
struct Body {
  const CombineParams& p;
  const Op& op;
  Roles roles;
  int chunk;  // tokens
  int chunks;
  int row_bytes;   // 0 without y
  int vecs;        // of a row
  int wire_bytes;  // of a Vec of a partial: all, or one for a channel, as e4m3
  Cut cut;

  __device__ size_t offset(int segment) const {  // bytes
    return size_t(segment) * cut.segment_vecs * sizeof(Vec);
  }
  __device__ int vecs_of(int segment) const {
    return min_int(cut.segment_vecs, vecs - segment * cut.segment_vecs);
  }
  __device__ int slot_bytes() const { return cut.segment_vecs * int(sizeof(Vec)); }

  __device__ bool fp8() const { return wire_bytes != sizeof(Vec); }
  __device__ int partial_bytes() const { return fp8() ? fp8_partial_bytes(p.hidden) : row_bytes; }

  // Where the values and the scales of a segment are in a partial, and the bytes of the scales of
  // `vecs`, for a bulk copy.
  __device__ size_t values_at(int segment) const {
    return size_t(segment) * cut.segment_vecs * wire_bytes;
  }
  __device__ size_t scales_at(int segment) const {
    return p.hidden + values_at(segment) / kScaleBlock * sizeof(float);
  }
  __device__ int scale_bytes(int vecs) const {
    return ceil_div(vecs * wire_bytes, 4 * kScaleBlock) * 16;
  }
};

}  // namespace jax_ep
