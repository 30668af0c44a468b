// SPDX-License-Identifier: Apache-2.0
// combine's finder: turns items into rows and notes, in the order in which consumers add.
//
//   to push   my rows of the token; the last one with: store to the source's partial, tell the
//             signaller
//   local     my rows; the last one with: hold my partial
//             await the chunk, then the partials of other ranks, in rank order; mine is added where
//             my rank is; the last one with: store to the result
//
// An item without any row has a note without a row. Scalars are stored by the finder itself, before
// it gives the item's orders: so they are published with the item.
#pragma once
#include "combine_items.cuh"
#include "combine_orders.cuh"

namespace jax_ep {

// A set of ranks: that of each lane for which `named` holds.
__device__ __forceinline__ uint64_t set_of_ranks(bool named, int rank, int num_ranks) {
  uint64_t set = __reduce_or_sync(kAllLanes, named && rank < 32 ? 1u << rank : 0);
  if (num_ranks > 32) {
    const uint32_t high = __reduce_or_sync(kAllLanes, named && rank >= 32 ? 1u << rank % 32 : 0);
    set |= uint64_t(high) << 32;
  }
  return set;
}

__device__ __forceinline__ int count_below(uint64_t set, int rank) {
  return __popcll(set & ((uint64_t(1) << rank) - 1));
}

class Finder {
 public:
  __device__ Finder(const Body& body, Orders& orders, const Borrowed& peers, Pushes& pushes)
      : b(body),
        p(body.p),
        lane_(body.p.exchange.top_k),
        queue_(orders),
        peers_(peers),
        pushes_(pushes),
        counted_(shared_address(pushes.counted)) {}

  // Everything that this block pushes. False: give up.
  __device__ bool push_partials() {
    const int items = p.exchange.num_tokens * (b.op.R - 1) * b.cut.segments, wire = b.roles.wire;
    const Runs runs(&b.op.header().wire_ticket, blockIdx.x, wire, wire, items, most_items(b));
    const bool all = for_batches(
        runs, [&](const Run& run) { return find_pushes(b, lane_, run); },
        [&](Batch& batch) {
          weigh(p, batch);
          find_scalars_to_push(b, batch);
        },
        [&](const Batch& batch) { return push(batch); });
    end_pushes();
    return all;
  }

  // Local work, by all blocks: those that push come when they have pushed.
  __device__ void sum_tokens() {
    const int items = p.exchange.num_tokens * b.cut.segments, block = blockIdx.x;
    const Runs runs(&b.op.header().local_ticket, local_warp(b.roles, block, gridDim.x, 0, 1),
                    b.roles.local, gridDim.x, items, most_items(b));
    for_batches(
        runs, [&](const Run& run) { return find_sums(b, lane_, run); },
        [&](Batch& batch) {
          weigh(p, batch);
          find_own_scalars(b, lane_, batch);
        },
        [&](const Batch& batch) { return sum(batch); });
  }

  __device__ void stop() { queue_.put(lane_id(), 1, Note{0.0f, kStop, nullptr}, {}); }

 private:
  // All notes of a batch at once.
  __device__ __forceinline__ bool push(const Batch& batch) {
    const bool here = batch.item >= 0;
    const Item at = item_to_push(b, here ? batch.item : 0);
    if (batch.pair >= 0) {
      const size_t pair = batch.pair - size_t(at.source) * p.exchange.num_tokens * p.exchange.top_k;
      reinterpret_cast<float*>(peers_.output[at.source][kScalars])[pair] = batch.scalar;
    }
    __syncwarp();  // all scalars before the orders
    const bool has_row = batch.row >= 0 && b.vecs > 0;
    const int rows = __popc(__ballot_sync(kAllLanes, has_row) & lane_.lanes);
    const int notes = max_int(1, rows);  // of the item
    const bool has_note = here && lane_.k < notes;
    const unsigned all = __ballot_sync(kAllLanes, has_note);
    Note note{batch.weight, uint32_t(b.vecs_of(at.segment)), nullptr};
    if (has_note && lane_.k == notes - 1) {
      const uint32_t place = tell(told_ + lane_.item, at);
      char* partial = rows > 0 ? partial_on_source(at, batch.slot) : nullptr;
      if (partial != nullptr) note.to = partial + b.values_at(at.segment);
      if (partial != nullptr && b.fp8()) {
        pushes_.scales[place] = partial + b.scales_at(at.segment);
      }
      note.what |= (note.to == nullptr ? kClear : kStore) | kTell | place << kPlaceShift;
    }
    told_ += batch.count;
    queue_.put(has_note ? __popc(all & ((1u << lane_id()) - 1)) : -1, __popc(all), note,
               has_row ? row_of(batch.row, at.segment) : Piece{});
    return !__any_sync(kAllLanes, batch.broken != 0);
  }

  // Null, and the end of the group, if it would leave the peer's buffer.
  __device__ __forceinline__ char* partial_on_source(const Item& at, int slot_of_token) {
    const size_t slot = size_t(at.t) * partial_slots(p.exchange) + slot_of_token;
    const uint64_t bytes = peers_.bytes[at.source][kPartials];
    if ((slot + 1) * b.partial_bytes() > bytes) {
      b.op.fail(Fault::kBounds, Phase::kRows, at.source, slot, bytes);
      return nullptr;
    }
    return peers_.output[at.source][kPartials] + slot * b.partial_bytes();
  }

  __device__ __forceinline__ bool sum(const Batch& batch) {
    if (batch.pair >= 0) p.scalars[batch.pair] = batch.scalar;
#pragma unroll 1
    for (int i = 0; i < batch.count; ++i) {
      if (!sum_item(batch, i)) return false;
    }
    return true;
  }

  __device__ __forceinline__ bool sum_item(const Batch& batch, int item) {
    const bool mine = batch.item >= 0 && lane_.item == item;
    const int first = __shfl_sync(kAllLanes, batch.item, 0);
    const Item at = item_to_sum(b, first + item);
    // Ranks that the token's pairs name, and those that have kept one of them: they send a partial.
    uint64_t named = 0, kept = 0;
    if (b.op.R > 1 && b.vecs > 0) {
      const bool other = mine && batch.rank >= 0 && batch.rank != b.op.me;
      named = set_of_ranks(other, batch.rank, b.op.R);
      kept = set_of_ranks(other && batch.pair_row >= 0, batch.rank, b.op.R);
    }
    const int before_own = count_below(kept, b.op.me), partials = __popcll(kept);
    const uint32_t vecs = b.vecs_of(at.segment);
    char* to = p.out + size_t(at.t) * b.row_bytes + b.offset(at.segment);

    const bool has_row = mine && batch.row >= 0 && b.vecs > 0;
    const int rows = __popc(__ballot_sync(kAllLanes, has_row));
    const int own = rows + partials == 0 ? 1 : rows;
    if (own > 0) {
      uint32_t last = rows == 0 ? kClear : kHold;
      if (rows > 0 && before_own == 0) last |= kAddOwn;
      if (partials == 0) last |= kStore;
      const Note note{batch.weight, lane_.k == own - 1 ? vecs | last : vecs, to};
      queue_.put(mine && lane_.k < own ? lane_.k : -1, own, note,
                 has_row ? row_of(batch.row, at.segment) : Piece{});
    }
    if (!await_arrivals(at.t)) return false;
    for (int rank = lane_id(); rank - lane_id() < b.op.R && partials > 0; rank += 32) {
      const int order = count_below(kept, rank), earlier = count_below(kept, rank - lane_id());
      const int some = count_below(kept >> (rank - lane_id()), 32);
      const size_t slot = size_t(at.t) * partial_slots(p.exchange) + count_below(named, rank);
      Note note{1.0f, vecs, to};
      if (rows > 0 && order == before_own - 1) note.what |= kAddOwn;
      if (order == partials - 1) note.what |= kStore;
      if (b.fp8()) note.what |= kFp8Row;
      const char* partial = p.partials + slot * b.partial_bytes();
      queue_.put(kept >> rank & 1 ? order - earlier : -1, some, note,
                 {partial + b.values_at(at.segment), int(vecs) * b.wire_bytes},
                 b.fp8() ? Piece{partial + b.scales_at(at.segment), b.scale_bytes(vecs)} : Piece{});
    }
    return true;
  }

  __device__ __forceinline__ Piece row_of(int row, int segment) const {
    return {p.y + size_t(row) * b.row_bytes + b.offset(segment),
            b.vecs_of(segment) * int(sizeof(Vec))};
  }

  // The chunk of my token t of every other rank, for bulk copies too: of the filler, which is told
  // of its partials after the fence. Tokens come in order, so earlier ones are not asked for any
  // more. False: give up.
  __device__ __forceinline__ bool await_arrivals(int t) {
    return t < arrived_ || b.op.R == 1 || await_chunks(t / b.chunk);
  }
  __device__ bool await_chunks(int chunk) {
    int arrived = arrived_chunks(b.op, chunk, b.chunks);
    if (arrived == 0) {
      if (!await_chunk(b.op, chunk, 0, b.op.R)) return false;
      arrived = 1;
    }
    arrived_ = (chunk + arrived) * b.chunk;
    fence_global_for_bulk_copies();
    return true;
  }

  // By one lane: the n-th entry for the signaller, which has read what was there before.
  __device__ __forceinline__ uint32_t tell(uint32_t n, const Item& at) {
    const uint32_t place = n % kPlaces;
    while (!is_complete(counted_ + place * 8, phase_of(n) ^ 1)) {
    }
    pushes_.entry[place] = {at.t, at.source};
    return place;
  }

  __device__ void end_pushes() {
    const uint32_t place = told_ % kPlaces;
    while (!is_complete(counted_ + place * 8, phase_of(told_) ^ 1)) {
    }
    if (lane_id() == 0) pushes_.entry[place] = {0, -1};
    queue_.put(lane_id(), 1, Note{0.0f, kClear | kTell | place << kPlaceShift, nullptr}, {});
  }

  const Body& b;
  const CombineParams& p;
  const Lane lane_;
  OrderQueue queue_;
  const Borrowed& peers_;
  Pushes& pushes_;
  const uint32_t counted_;  // address of its barriers
  int arrived_ = 0;         // tokens before it have arrived, or are not needed
  uint32_t told_ = 0;       // items that the signaller gets
};

}  // namespace jax_ep
