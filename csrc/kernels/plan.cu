// SPDX-License-Identifier: Apache-2.0
// plan: every rank learns the group's routing, then numbers the rows, alike on all ranks.
//
//   publish   my topk_idx, tile by tile, as int16 -> every peer's routing[parity][me]; flag per
//   tile rank      per tile of 512 pairs (one warp): a pair's place among its expert's pairs in the
//   tile,
//             and how many pairs of each expert the tile has            -> scratch: place, counts
//   --- all blocks meet: counts are complete
//   prefix    per expert (one warp): pairs in the tiles before each tile -> scratch: before, totals
//   --- all blocks meet: prefixes are complete
//   place     segments from the totals (each block for itself), then row = segment start + pairs in
//             tiles before + place in tile, for every pair of the group  -> outputs
//
// The stable order (expert, source rank, token, k) is the order of (tile, pair in tile) per expert,
// as tiles are numbered by source rank and then by pair. A peer may be one plan ahead, never two:
// it cannot finish that plan without my flags. Hence two copies of routing and flags, by parity.
#include <climits>

#include "../device/op.cuh"
#include "../device/warp.cuh"
#include "launch.h"

namespace jax_ep {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Where the pieces of the scratch buffer are.
struct Scratch {
  int32_t* before;   // [tiles, E] pairs of e in earlier tiles
  int32_t* totals;   // [E]
  uint16_t* counts;  // [tiles, E] pairs of e in the tile
  uint16_t* place;   // [tiles * kTilePairs] a pair's place in its tile
};

JAX_EP_HD int tiles_of(const Exchange& e) { return ceil_div(e.num_pairs(), kTilePairs); }

__device__ Scratch scratch_of(const PlanParams& p) {
  const Exchange& e = p.exchange;
  const int tiles = e.num_ranks * tiles_of(e);
  Scratch s;
  s.before = p.scratch;
  s.totals = s.before + size_t(tiles) * e.num_experts;
  s.counts = reinterpret_cast<uint16_t*>(s.totals + e.num_experts);
  s.place = s.counts + size_t(tiles) * e.num_experts;
  return s;
}

struct Warp {
  int lane = threadIdx.x % 32;
  int in_block = threadIdx.x / 32;
  int index = blockIdx.x + gridDim.x * (threadIdx.x / 32);  // neighbours on different SMs
  int count = gridDim.x * kWarps;
};

// Push one tile of my routing to all ranks, me included.
__device__ void publish_tile(const PlanParams& p, const Op& op, int parity, int tile, int lane) {
  const int pairs = p.exchange.num_pairs(), E = p.exchange.num_experts;
  for (int at = tile * kTilePairs + lane * 8; at < min_int((tile + 1) * kTilePairs, pairs);
       at += 32 * 8) {
    union {
      Vec vec;
      int16_t idx[8];
    } packed;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int e = at + i < pairs ? p.topk_idx[at + i] : -1;
      if (e < -1 || e >= E) op.fail(Fault::kRouting, Phase::kRouting, op.me, e, E);
      packed.idx[i] = e < 0 || e >= E ? -1 : e;
    }
    for (int r = 0; r < op.R; ++r) {
      *reinterpret_cast<Vec*>(op.block(r).routing(parity, op.me) + at) = packed.vec;
    }
  }
  __syncwarp();  // the warp's pushes before the flags
  for (int r = lane; r < op.R; r += 32) {
    store_release_sys(op.block(r).plan_flag(parity, op.me, tile), op.tag);  // publishes the tile
  }
}

// Rank the pairs of one tile: their places, and the tile's count of each expert.
__device__ void rank_tile(const PlanParams& p, const Op& op, const Scratch& s, int parity, int tile,
                          uint16_t* seen, int lane) {
  const int E = p.exchange.num_experts, per_rank = tiles_of(p.exchange);
  const int source = tile / per_rank, first = tile % per_rank * kTilePairs;
  bool arrived = true;
  if (lane == 0) {  // acquires the tile that `source` published
    arrived = op.await(op.block(op.me).plan_flag(parity, source, tile % per_rank), source,
                       Phase::kRouting);
  }
  __syncwarp();  // what the first lane has acquired, all lanes may read
  if (!__shfl_sync(kAllLanes, arrived, 0)) return;
  for (int e = lane; e < E; e += 32) seen[e] = 0;
  __syncwarp();
  const int16_t* routing = op.block(op.me).routing(parity, source);
  const int pairs = min_int(kTilePairs, p.exchange.num_pairs() - first);
  int experts[kTilePairs / 32];
#pragma unroll
  for (int i = 0; i < kTilePairs / 32; ++i) {
    const int at = i * 32 + lane;
    experts[i] = at < pairs ? *reinterpret_cast<const volatile int16_t*>(routing + first + at) : -1;
  }
#pragma unroll
  for (int i = 0; i < kTilePairs / 32; ++i) {
    const int at = i * 32 + lane, e = experts[i];
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int earlier = __popc(same & ((1u << lane) - 1));
    const int base = e < 0 ? 0 : seen[e];
    __syncwarp();
    if (e >= 0 && earlier == 0) seen[e] = base + __popc(same);
    __syncwarp();
    if (at < pairs) s.place[size_t(tile) * kTilePairs + at] = base + earlier;
  }
  for (int e = lane; e < E; e += 32) s.counts[size_t(tile) * E + e] = seen[e];
  __syncwarp();
}

// For one expert: the number of its pairs before each tile, and in all.
__device__ void prefix_expert(const PlanParams& p, const Scratch& s, int expert, int lane) {
  const int E = p.exchange.num_experts, tiles = p.exchange.num_ranks * tiles_of(p.exchange);
  constexpr int kBatch = 4;
  int total = 0;
  for (int first = 0; first < tiles; first += 32 * kBatch) {
    int mine[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int tile = first + 32 * j + lane;
      mine[j] = tile < tiles ? s.counts[size_t(tile) * E + expert] : 0;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int tile = first + 32 * j + lane;
      int sum;
      const int before = total + warp_prefix(mine[j], &sum);
      if (tile < tiles) s.before[size_t(tile) * E + expert] = before;
      total += sum;
    }
  }
  if (lane == 0) s.totals[expert] = total;
}

// Segments of one rank's experts: `kept[e]` pairs from row `start[e]`, `room[e]` rows. By one warp.
__device__ void segment_rank(const Exchange& x, const int32_t* totals, int rank, int32_t* kept,
                             int32_t* start, int32_t* room, int lane) {
  const int local = x.local_experts(), A = x.alignment, first = rank * local;
  if (x.batched) {
    const int C = x.num_rows / local;
    for (int e = lane; e < local; e += 32) {
      const int keep = min_int(totals[first + e], C);
      kept[first + e] = keep;
      start[first + e] = e * C;
      room[first + e] = min_int(ceil_div(keep, A) * A, C);
    }
    return;
  }
  // Each lane has a run of neighbouring experts: two prefix sums over the lanes are enough.
  const int per_lane = ceil_div(local, 32);
  const int from = min_int(lane * per_lane, local), to = min_int(from + per_lane, local);
  auto blocks_of = [&](int e) { return ceil_div(totals[first + e], A); };
  int most = 0, wanted = 0;
  for (int e = from; e < to; ++e) {
    most = max_int(most, blocks_of(e));
    wanted += blocks_of(e);
  }
  const int budget = x.num_rows / A;
  int level = INT_MAX, order = 0, left = 0;
  if (warp_sum(wanted) > budget) {
    auto sum_at = [&](int l) {
      int sum = 0;
      for (int e = from; e < to; ++e) sum += min_int(blocks_of(e), l);
      return warp_sum(sum);
    };
    level = water_level(warp_max(most), budget, sum_at);
    left = budget - sum_at(level);
    int hungry = 0, all;
    for (int e = from; e < to; ++e) hungry += blocks_of(e) > level;
    order = warp_prefix(hungry, &all);
  }
  int rows = 0, all_rows;
  for (int e = from; e < to; ++e) {
    const bool more = blocks_of(e) > level;
    const int granted = min_int(blocks_of(e), level) + (more && order < left);
    order += more;
    kept[first + e] = min_int(totals[first + e], granted * A);
    room[first + e] = granted * A;
    rows += granted * A;
  }
  int at = warp_prefix(rows, &all_rows);
  for (int e = from; e < to; ++e) {
    start[first + e] = at;
    at += room[first + e];
  }
}

struct Segments {
  int32_t* kept;   // [E]
  int32_t* start;  // [E] in the owner's buffer
  int32_t* room;   // [E]
};

// Rows of every pair: a group of lanes, as many as the power of two above K, holds one token.
__device__ void place_tokens(const PlanParams& p, const Op& op, const Scratch& s,
                             const Segments& seg, int parity, const Warp& w) {
  const Exchange& x = p.exchange;
  const int K = x.top_k, T = x.num_tokens, E = x.num_experts, local = x.local_experts();
  const int per_rank = tiles_of(x);
  int width = 1;
  while (width < K) width *= 2;
  const int k = w.lane % width, tokens_per_warp = 32 / width, group = w.lane / width * width;
  const unsigned lanes = (width == 32 ? kAllLanes : (1u << width) - 1) << group;
  for (int first = w.index * tokens_per_warp; first < op.R * T;
       first += w.count * tokens_per_warp) {
    const int token = first + w.lane / width;  // source * T + t
    const bool is_pair = token < op.R * T && k < K;
    const int source = token / T, pair = token % T * K + k;
    int e = -1, row = -1;
    if (is_pair) {
      e = *reinterpret_cast<const volatile int16_t*>(op.block(op.me).routing(parity, source) +
                                                     pair);
      if (e >= 0) {
        const int tile = source * per_rank + pair / kTilePairs;
        const int position =
            s.before[size_t(tile) * E + e] + s.place[size_t(tile) * kTilePairs + pair % kTilePairs];
        if (position < seg.kept[e]) row = seg.start[e] + position;
      }
    }
    const int owner = e < 0 ? -1 : e / local;
    const bool mine = owner == op.me && row >= 0;
    int smaller = 0, earlier_empty = 0;
    bool first_of_rank = owner >= 0 && owner != source && owner < op.me;
    for (int j = 0; j < K; ++j) {
      const int other = __shfl_sync(kAllLanes, mine ? row : -1, group + j);
      const int other_owner = __shfl_sync(kAllLanes, owner, group + j);
      smaller += other >= 0 && other < row;
      earlier_empty += other < 0 && j < k;
      if (j < k && other_owner == owner) first_of_rank = false;
    }
    const int found = __popc(__ballot_sync(kAllLanes, mine) & lanes);
    const int slot = __popc(__ballot_sync(kAllLanes, first_of_rank) & lanes);
    if (!is_pair) continue;
    p.token_rows[size_t(token) * K + (mine ? smaller : found + earlier_empty)] = mine ? row : -1;
    if (k == 0) p.token_slot[token] = slot;
    if (mine) p.row_pair[row] = token * K + k;
    if (source == op.me) {
      p.pair_rank[pair] = owner;
      p.pair_row[pair] = row;
    }
  }
}

// What no pair says: experts of rows, padding, tail, counts.
__device__ void describe_rows(const PlanParams& p, const Op& op, const Scratch& s,
                              const Segments& seg) {
  const Exchange& x = p.exchange;
  const int local = x.local_experts(), first = op.me * local;
  const int32_t* start = seg.start + first;
  for (int row = blockIdx.x * kThreads + threadIdx.x; row < x.num_rows;
       row += gridDim.x * kThreads) {
    int low = 0, high = local;  // the last segment that starts at or before the row
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (start[middle] <= row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int position = row - start[low];
    const bool owned = position < seg.kept[first + low];
    p.expert_ids[row] = owned ? low : -1;
    if (!owned) p.row_pair[row] = position < seg.room[first + low] ? kRowPadding : kRowTail;
  }
  if (blockIdx.x == 0) {
    __shared__ int dropped;
    if (threadIdx.x == 0) dropped = 0;
    __syncthreads();
    for (int e = threadIdx.x; e < local; e += kThreads) {
      p.counts[e] = seg.kept[first + e];
      p.group_sizes[e] = seg.room[first + e];
      atomicAdd(&dropped, s.totals[first + e] - seg.kept[first + e]);
    }
    __syncthreads();
    if (threadIdx.x == 0) p.num_dropped[0] = dropped;
  }
}

__device__ void poison_plan(const PlanParams& p) {
  const Exchange& x = p.exchange;
  const size_t pairs = x.num_pairs();
  poison_bytes(p.pair_rank, 4 * pairs);
  poison_bytes(p.pair_row, 4 * pairs);
  poison_bytes(p.row_pair, 4 * size_t(x.num_rows));
  poison_bytes(p.expert_ids, 4 * size_t(x.num_rows));
  poison_bytes(p.token_rows, 4 * pairs * x.num_ranks);
  poison_bytes(p.token_slot, 4 * size_t(x.num_tokens) * x.num_ranks, 0);
  poison_bytes(p.counts, 4 * x.local_experts(), 0);
  poison_bytes(p.group_sizes, 4 * x.local_experts(), 0);
  poison_bytes(p.num_dropped, 4, 0);
}

__device__ void plan_phases(const PlanParams& p, const Op& op, char* shared) {
  const Exchange& x = p.exchange;
  const Scratch s = scratch_of(p);
  const Warp w;
  const int parity = (op.plans() + 1) & 1, tiles = tiles_of(x), E = x.num_experts;
  for (int tile = w.index; tile < tiles; tile += w.count) publish_tile(p, op, parity, tile, w.lane);
  auto* seen = reinterpret_cast<uint16_t*>(shared) + size_t(w.in_block) * E;
  for (int tile = w.index; tile < op.R * tiles; tile += w.count) {
    rank_tile(p, op, s, parity, tile, seen, w.lane);
  }
  if (!op.meet(1)) return;
  for (int e = w.index; e < E; e += w.count) prefix_expert(p, s, e, w.lane);
  if (!op.meet(2)) return;
  auto* words = reinterpret_cast<int32_t*>(shared);
  const Segments seg{words, words + E, words + 2 * E};
  int32_t* totals = words + 3 * E;
  for (int e = threadIdx.x; e < E; e += kThreads) totals[e] = s.totals[e];
  __syncthreads();
  for (int r = w.in_block; r < op.R; r += kWarps) {
    segment_rank(x, totals, r, seg.kept, seg.start, seg.room, w.lane);
  }
  __syncthreads();
  place_tokens(p, op, s, seg, parity, w);
  describe_rows(p, op, s, seg);
}

__device__ void plan_body(const PlanParams& p) {
  extern __shared__ __align__(16) char shared[];
  const Op op(p.call);
  if (!op.began_broken()) plan_phases(p, op, shared);
  op.leave([&] { poison_plan(p); });
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  plan_body(p);
}

__global__ void __launch_bounds__(kThreads) plan_all_ranks(const PlanParams* p) {
  plan_body(p[blockIdx.y]);
}

}  // namespace

size_t plan_scratch_words(const Exchange& e) {
  const size_t tiles = size_t(e.num_ranks) * tiles_of(e);
  const size_t halves = tiles * e.num_experts + tiles * kTilePairs;
  return tiles * e.num_experts + e.num_experts + (halves + 1) / 2;
}

cudaError_t launch_plan(const PlanParams* params, const Exchange& e, const Launch& how) {
  // Per warp one counter of 16 bits an expert; later four words an expert for the block.
  const size_t shared = size_t(e.num_experts) * max_int(2 * kWarps, 16);
  const void* kernel = how.all_ranks ? reinterpret_cast<const void*>(&plan_all_ranks)
                                     : reinterpret_cast<const void*>(&plan_kernel);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return error;
  if (how.all_ranks) {
    plan_all_ranks<<<dim3(how.num_sms, how.all_ranks), kThreads, shared, how.stream>>>(params);
  } else {
    plan_kernel<<<how.num_sms, kThreads, shared, how.stream>>>(*params);
  }
  return cudaPeekAtLastError();
}

cudaError_t load_plan() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(&plan_kernel)}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_ep
