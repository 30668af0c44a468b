// SPDX-License-Identifier: Apache-2.0
// Items on their way into combine's finder: drawn in runs, then their rows are looked up, then
// the rows' weights, each step while the filler has an earlier batch.
#pragma once
#include "combine_parts.cuh"

namespace jax_ep {

// Of the rows of a batch, about: what hides a look-up. The finders of few blocks cannot keep up
// with small ones; larger ones end later.
constexpr int kFewBlocks = 80;
constexpr int kBatchBytes = 64 << 10, kBatchBytesOfFew = 128 << 10;
constexpr int kRunsPerBlock = 4;  // of the items that are left, at least

struct Run {
  int first;
  int count;
};

// Runs of neighbouring items, drawn by whichever block is free: neither SMs nor links are equally
// fast. Short towards the end, so that all blocks end together. The first `given` blocks have their
// first run without drawing.
class Runs {
 public:
  __device__ Runs(uint32_t* counter, int block, int given, int takers, int end, int most)
      : counter_(counter), share_(1.0f / (kRunsPerBlock * takers)), end_(end), most_(most) {
    size_ = size_at(0);
    given_ = given * size_;
    drawn_ = (block - given) * size_;
    if (block >= given) draw();
  }
  // The next run of this warp; empty at the end.
  __device__ Run take() {
    const int first = given_ + __shfl_sync(kAllLanes, drawn_, 0), size = size_;
    if (first >= end_) return {end_, 0};
    size_ = size_at(first);
    draw();
    return {first, min_int(size, end_ - first)};
  }

 private:
  __device__ int size_at(int item) const {
    return max_int(1, min_int(most_, int((end_ - item) * share_)));
  }
  __device__ void draw() {
    if (lane_id() == 0) drawn_ = add_relaxed_gpu(counter_, size_);
  }
  uint32_t* counter_;
  float share_;
  int end_, most_;
  int size_;   // of the run that was drawn last
  int given_;  // items
  int drawn_;  // in the first lane: its first item, counted from those given
};

// A run on its way: lanes [0, K) have the pairs of its first item, the next K those of the second.
// A lane's row is the k-th of my rows of the token, its pair the k-th of the token.
struct Batch {
  int count = 0;  // items, the same in all lanes
  int item = -1;  // to which this lane belongs, if it does
  int row = -1;
  float weight = 1.0f;
  int slot = 0;                  // of the partial on the source
  int rank = -1, pair_row = -1;  // of my own pair: where it went
  int pair = -1;                 // that gets a scalar
  float scalar = 0.0f;
  uint32_t broken = 0;
};

// A token's segment, and whose token it is.
struct Item {
  int t, segment, source;
};

// Which pair of which item of a batch this lane has.
struct Lane {
  int item, k;
  unsigned lanes;  // of the item
  __device__ explicit Lane(int K)
      : item(lane_id() / K), k(lane_id() % K), lanes(kAllLanes >> (32 - K) << item * K) {}
};

// Items that fit a batch.
__device__ __forceinline__ int most_items(const Body& b) {
  const Exchange& x = b.p.exchange;
  const int rows = max_int(1, x.top_k / x.num_ranks);  // of an item, about
  const int bytes = gridDim.x < kFewBlocks ? kBatchBytesOfFew : kBatchBytes;
  const int fit = bytes / (b.slot_bytes() * rows);
  return max_int(1, min_int(min_int(32 / x.top_k, kPlaces), fit));
}

__device__ __forceinline__ int quotient(int n, int divisor) {
  return divisor == 1 ? n : n / divisor;  // mostly 1, and a division takes 20 instructions
}

// An item to push: a token's segments for one source after the other.
__device__ __forceinline__ Item item_to_push(const Body& b, int item) {
  const int segments = b.cut.segments, per_token = segments * (b.op.R - 1);
  const int t = quotient(item, per_token);
  const int rest = item - t * per_token, other = quotient(rest, segments);
  const int source = b.op.me + 1 + other;
  return {t, rest - other * segments, source < b.op.R ? source : source - b.op.R};
}

// A local item.
__device__ __forceinline__ Item item_to_sum(const Body& b, int item) {
  const int t = quotient(item, b.cut.segments);
  return {t, item - t * b.cut.segments, b.op.me};
}

// Items to push.
__device__ __forceinline__ Batch find_pushes(const Body& b, const Lane& lane, const Run& run) {
  const CombineParams& p = b.p;
  const int T_ = p.exchange.num_tokens, K = p.exchange.top_k;
  Batch batch;
  batch.count = run.count;
  if (lane.item >= run.count) return batch;
  batch.item = run.first + lane.item;
  const Item item = item_to_push(b, batch.item);
  const size_t token = size_t(item.source) * T_ + item.t;
  batch.row = p.token_rows[token * K + lane.k];
  batch.slot = p.token_slot[token];
  batch.broken = static_cast<uint32_t>(b.op.broken_word());
  return batch;
}

// Local items.
__device__ __forceinline__ Batch find_sums(const Body& b, const Lane& lane, const Run& run) {
  const CombineParams& p = b.p;
  const int T_ = p.exchange.num_tokens, K = p.exchange.top_k;
  Batch batch;
  batch.count = run.count;
  if (lane.item >= run.count) return batch;
  batch.item = run.first + lane.item;
  const size_t pair = size_t(item_to_sum(b, batch.item).t) * K + lane.k;
  batch.row = p.token_rows[size_t(b.op.me) * T_ * K + pair];
  batch.rank = p.pair_rank[pair];
  batch.pair_row = p.pair_row[pair];
  return batch;
}

__device__ __forceinline__ void weigh(const CombineParams& p, Batch& batch) {
  if (batch.row >= 0 && p.weights != nullptr) batch.weight = p.weights[batch.row];
}

// Scalars of my rows, for their pairs on the source.
__device__ __forceinline__ void find_scalars_to_push(const Body& b, Batch& batch) {
  const CombineParams& p = b.p;
  if (p.row_scalars == nullptr || batch.row < 0) return;
  if (item_to_push(b, batch.item).segment != 0) return;
  batch.scalar = p.row_scalars[batch.row];
  batch.pair = p.row_pair[batch.row];  // of the group
}

// Scalars of my pairs whose rows are here, and zero for pairs without a row.
__device__ __forceinline__ void find_own_scalars(const Body& b, const Lane& lane, Batch& batch) {
  const CombineParams& p = b.p;
  if (p.row_scalars == nullptr || batch.item < 0) return;
  const Item item = item_to_sum(b, batch.item);
  if (item.segment != 0) return;
  if (batch.pair_row >= 0 && batch.rank != b.op.me) return;  // comes from its rank
  batch.pair = item.t * p.exchange.top_k + lane.k;
  if (batch.pair_row >= 0) batch.scalar = p.row_scalars[batch.pair_row];
}

// All items: `find` looks a run's rows up, `find_more` what belongs to the rows, `go` sends a batch
// on. False: give up.
template <typename Find, typename FindMore, typename Go>
__device__ __forceinline__ bool for_batches(Runs runs, Find&& find, FindMore&& find_more, Go&& go) {
  Batch now, next, later;
  do {
    now = next;
    next = later;
    find_more(next);
    later = find(runs.take());
    if (now.count > 0 && !go(now)) return false;
  } while (next.count + later.count > 0);
  return true;
}

}  // namespace jax_ep
