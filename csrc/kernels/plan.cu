// SPDX-License-Identifier: Apache-2.0
// plan: every rank learns the group's routing, then numbers the rows, alike on all ranks.
//
//   publish   my topk_idx -> every peer's routing[parity][me], in words that carry their own tag
//   rank      a tile of the group's tokens (one block): each pair's place among its expert's pairs
//             in the tile                                           -> held (shared memory)
//             how many pairs of each expert the tile has            -> counts (scratch)
//   --- all blocks meet: counts are complete
//   sum       the table of counts, each block for itself: pairs of each expert in all tiles, and
//             in those before its own                               -> totals, before (shared)
//   segments  from the totals, each block for itself                -> kept, start, room (shared)
//   place     row = start + before + place in tile, for the pairs of my tile -> outputs
//
// The stable order (expert, source rank, token, k) is the order of (tile, warp, pair in warp) per
// expert, as all of them are neighbouring runs of the group's pairs. How words travel, and who may
// overwrite them when: plan_exchange.cuh. A rank's counts are written and read by its own blocks,
// which the meeting orders; the next plan's follow on the stream.
#include <algorithm>

#include "../device/kernel.cuh"
#include "plan_exchange.cuh"
#include "plan_outputs.cuh"
#include "plan_segments.cuh"

namespace jax_ep {
namespace {

constexpr int kThreads = kPlanThreads;
constexpr int kWarps = kPlanWarps;
constexpr int kExpertBits = 12;
static_assert(kMaxExperts < 1 << kExpertBits, "an expert and none have different bits");
static_assert(kMaxExperts / 8 <= kThreads, "a thread sums 8 experts");

// A block's shared memory: what is ranked, and behind it the counters of its warps, whose place the
// sums and segments take after the meeting.
struct Shared {
  uint32_t* held;   // [pairs of a tile] {expert 16, place in the tile 16}
  uint16_t* seen;   // [kWarps, E] pairs of e that the warp has seen; then, in the warps before it
  int32_t* totals;  // [E]
  int32_t* before;  // [E] pairs of e in tiles before mine; follows the totals
  int32_t* blocks;  // [E] of A rows that e wants
  Vec* partials;    // [groups of threads, totals and before, E] 16 bits, until there are segments
  Segments segments;

  __device__ Shared(char* base, const PlanSizes& sizes) {
    const int E = sizes.experts;
    held = reinterpret_cast<uint32_t*>(base);
    seen = reinterpret_cast<uint16_t*>(held + sizes.held);
    totals = reinterpret_cast<int32_t*>(held + sizes.held);
    before = totals + E;
    blocks = before + E;
    partials = reinterpret_cast<Vec*>(blocks + E);
    segments = {blocks + E, blocks + 2 * E, blocks + 3 * E};
  }
  static size_t bytes(const PlanSizes& sizes) {
    const size_t E = sizes.experts, counters = 2 * E * kWarps, partials = 4 * E * sizes.groups;
    return 4 * sizes.held + std::max(counters, 12 * E + std::max(partials, 12 * E));
  }
};

// What a block works on: tokens of the group, source rank * T + token.
struct Tile {
  int first, last;  // tokens
  uint32_t* held;   // of its pairs: in shared memory, or where their rows will be
};

__device__ Tile tile_of(const PlanParams& p, const Tiling& tiling, const Shared& s, int index) {
  const int first = index * tiling.tokens;
  const int last = min_int(first + tiling.tokens, p.exchange.num_ranks * p.exchange.num_tokens);
  auto* rows = reinterpret_cast<uint32_t*>(p.out.token_rows) + size_t(first) * p.exchange.top_k;
  return {first, last, tiling.per_block == 1 ? s.held : rows};
}

// By one warp: places of the pairs [from, to) of the tile among those of their expert in this warp,
// in order; `seen` counts. False: give up.
__device__ bool rank_run(const PlanParams& p, const PlanSizes& sizes, const Op& op,
                         const Tile& tile, int from, int to, uint16_t* seen) {
  const int first = tile.first * p.exchange.top_k;
  for (int base = from; base < to; base += 32 * kGathered) {
    int expert[kGathered];
    if (!gather(p, sizes, op, first + base, first + to, expert)) return false;
#pragma unroll
    for (int j = 0; j < kGathered; ++j) {
      const int at = base + 32 * j + lane_id(), e = expert[j];
      if (base + 32 * j >= to) break;  // the same in all lanes
      const unsigned same = lanes_with<kExpertBits>(e);
      const int earlier = __popc(same & ((1u << lane_id()) - 1));
      const int place = e < 0 ? 0 : seen[e] + earlier;
      __syncwarp();
      if (e >= 0 && earlier == 0) seen[e] = place + __popc(same);
      __syncwarp();
      if (at < to) tile.held[at] = static_cast<uint32_t>(e) << 16 | place;
    }
  }
  return true;
}

// For each expert, two at a time: pairs in the warps before each warp, and in the tile.
__device__ void prefix_warps(uint32_t* seen, uint32_t* counts, int words) {
#pragma unroll 1
  for (int w = threadIdx.x; w < words; w += kThreads) {
    uint32_t n[kWarps], sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) n[i] = seen[i * words + w];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      seen[i * words + w] = sum;
      sum += n[i];
    }
    counts[w] = sum;
  }
}

// By all threads of a block: `held` and `counts` of one tile. False, for all of them: give up.
__device__ bool rank_tile(const PlanParams& p, const PlanSizes& sizes, const Op& op,
                          const Tile& tile, uint16_t* counts, const Shared& s) {
  const int E = sizes.experts, warp = threadIdx.x / 32;
  const int pairs = (tile.last - tile.first) * p.exchange.top_k;
  const int run = (pairs + kThreads - 1) / kThreads * 32;
  const int from = min_int(warp * run, pairs), to = min_int(from + run, pairs);
  uint16_t* seen = s.seen + warp * E;
#pragma unroll 1
  for (int i = lane_id(); i < E / 8; i += 32) reinterpret_cast<Vec*>(seen)[i] = Vec{};
  __syncwarp();
  const bool ranked = rank_run(p, sizes, op, tile, from, to, seen);
  if (!__syncthreads_and(ranked)) return false;
  prefix_warps(reinterpret_cast<uint32_t*>(s.seen), reinterpret_cast<uint32_t*>(counts), E / 2);
  __syncthreads();
  for (int at = from + lane_id(); at < to; at += 32) {  // what this lane has stored
    const int e = static_cast<int>(tile.held[at]) >> 16;
    if (e >= 0) tile.held[at] += seen[e];
  }
  __syncwarp();  // before the next tile's zeros
  return true;
}

// Sums of two counts of 16 bits each.
__device__ __forceinline__ void add_pairs(Vec* sum, const Vec& v) {
  sum->x += v.x;
  sum->y += v.y;
  sum->z += v.z;
  sum->w += v.w;
}

// Pairs of each expert in all tiles, and in those before `mine`; blocks of all. A thread has 8
// experts and every so-many-th tile, counted from `mine`, so that blocks do not all ask for the
// same lines first; then the groups of threads are summed through shared memory.
__device__ void sum_counts(const Vec* counts, const PlanSizes& sizes, int A, int mine,
                           const Shared& s) {
  const int E = sizes.experts, width = E / 8, tiles = sizes.tiling.tiles, groups = sizes.groups;
  const int group = sizes.by_width(threadIdx.x), v = threadIdx.x - group * width;
  for (int base = 0; base < tiles; base += groups * kTableRows) {
    if (group < groups) {
      Vec row[kTableRows], sum{}, sum_before{};
#pragma unroll
      for (int j = 0; j < kTableRows; ++j) {
        const int i = base + j * groups + group;
        const int tile = i + mine < tiles ? i + mine : i + mine - tiles;
        row[j] = i < tiles ? counts[tile * width + v] : Vec{};
      }
#pragma unroll
      for (int j = 0; j < kTableRows; ++j) {
        add_pairs(&sum, row[j]);
        if (base + j * groups + group + mine >= tiles) add_pairs(&sum_before, row[j]);
      }
      s.partials[2 * group * width + v] = sum;
      s.partials[(2 * group + 1) * width + v] = sum_before;
    }
    __syncthreads();
#pragma unroll 1
    for (int w = threadIdx.x; w < E; w += kThreads) {  // two experts a word, totals then `before`
      int2 sum = base == 0 ? int2{} : reinterpret_cast<int2*>(s.totals)[w];
#pragma unroll 8
      for (int g = 0; g < groups; ++g) {
        const uint32_t two = reinterpret_cast<const uint32_t*>(s.partials)[g * E + w];
        sum.x += two & 0xffff;
        sum.y += two >> 16;
      }
      reinterpret_cast<int2*>(s.totals)[w] = sum;
      if (w >= E / 2) continue;
      reinterpret_cast<int2*>(s.blocks)[w] = {sizes.by_alignment(sum.x + A - 1),
                                              sizes.by_alignment(sum.y + A - 1)};
    }
    __syncthreads();
  }
}

// Rows of the tile's pairs: a group of lanes, as many as the power of two above K, holds one token.
__device__ void place_tile(const PlanParams& p, const PlanSizes& sizes, const Op& op,
                           const Tile& tile, const Shared& s) {
  const Segments& seg = s.segments;
  const TokenLanes lanes(p.exchange.top_k);
  const int K = p.exchange.top_k, per_warp = 32 >> lanes.shift;
  for (int first = tile.first + threadIdx.x / 32 * per_warp; first < tile.last;
       first += kWarps * per_warp) {
    const int token = first + (lane_id() >> lanes.shift);
    const bool is_pair = token < tile.last && lanes.k < K;
    int e = -1, row = -1;
    if (is_pair) {
      const uint32_t held = tile.held[(token - tile.first) * K + lanes.k];
      e = static_cast<int>(held) >> 16;
      if (e >= 0) {
        const int position = s.before[e] + static_cast<int>(held & 0xffff);
        if (position < seg.kept[e]) row = seg.start[e] + position;
      }
    }
    // `held` may be where the token's rows go: its lanes have read theirs before that.
    place_token(p.out, p.exchange, sizes, op.me, lanes, token, is_pair, e, row);
  }
}

// `sent`: this thread has published its words.
__device__ void plan_phases(const PlanParams& p, const PlanSizes& sizes, const Op& op, bool sent,
                            const Shared& s) {
  const Tiling& tiling = sizes.tiling;
  const int E = sizes.experts, A = p.exchange.alignment;
  const int first = min_int(blockIdx.x * tiling.per_block, tiling.tiles);
  const int last = min_int(first + tiling.per_block, tiling.tiles);
  const bool is_last = blockIdx.x == gridDim.x - 1;  // has the fewest tiles, mostly none
  auto* counts = reinterpret_cast<uint16_t*>(p.scratch);
  bool done = true;
  for (int i = first; done && i < last; ++i) {
    done = rank_tile(p, sizes, op, tile_of(p, tiling, s, i), counts + size_t(i) * E, s);
  }
  if (is_last && done) done = await_hellos(op);
  if (!op.meet(done && sent)) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) stamp(p.call, Stamp::kReady);
  const uint64_t broken = op.broken_word();  // on its way with the counts
  sum_counts(reinterpret_cast<const Vec*>(counts), sizes, A, first, s);
  for (int r = threadIdx.x / 32; r < op.R; r += kWarps) {
    const Wanted wanted{s.totals, s.blocks};
    if (p.exchange.batched) {
      batched_segments(sizes, A, wanted, r * sizes.local, s.segments);
    } else {
      ragged_segments(sizes, A, wanted, r * sizes.local, s.segments);
    }
  }
  if (__syncthreads_or(broken != 0)) return;
  for (int i = first; i < last; ++i) {
    place_tile(p, sizes, op, tile_of(p, tiling, s, i), s);
    if (i + 1 == last) break;
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < E; e += kThreads) s.before[e] += counts[size_t(i) * E + e];
    __syncthreads();
  }
  describe_rows(p.out, p.exchange, op.me, s.segments, blockIdx.x * kThreads + threadIdx.x,
                gridDim.x * kThreads);
  if (is_last && threadIdx.x < 32) describe_experts(p.out, p.exchange, op.me, s.segments, s.totals);
}

__device__ void plan_body(const PlanParams& p, const PlanSizes& sizes) {
#ifdef JAX_EP_EMULATION
  char* shared = dynamic_shared();
#else  // the same, but registers are allotted in another way
  extern __shared__ __align__(128) char shared[];
#endif
  const int word = (blockIdx.x + gridDim.x * (threadIdx.x / 32)) * 32 + lane_id();
  const Choices choices = choices_of(p.topk_idx, sizes.pairs, word);
  // They are on their way with the header.
  const Op op(p.call);
  const bool sent = publish(p, sizes, op, word, choices);
  if (!op.began_broken()) plan_phases(p, sizes, op, sent, Shared(shared, sizes));
  op.leave([&] { poison_plan(p.out, p.exchange); });
}

// One block an SM: all registers for loads in flight.
__global__ void __launch_bounds__(kThreads, 1)
    plan_kernel(const __grid_constant__ PlanParams p, const __grid_constant__ PlanSizes sizes) {
  plan_body(p, sizes);
}

__global__ void __launch_bounds__(kThreads, 1)
    plan_all_ranks(const PlanParams* p, const __grid_constant__ PlanSizes sizes) {
  plan_body(p[blockIdx.y], sizes);
}

}  // namespace

size_t plan_scratch_words(const Exchange& e) { return PlanSizes::table_words(e); }

cudaError_t launch_plan(const PlanParams* params, const Exchange& e, const Launch& how) {
  const PlanSizes sizes(e, how.num_sms);
  const size_t shared = Shared::bytes(sizes);
  const cudaError_t error = how.all_ranks ? allow_dynamic_shared(plan_all_ranks, shared)
                                          : allow_dynamic_shared(plan_kernel, shared);
  if (error != cudaSuccess) return error;
  if (how.all_ranks) {
    return launch_kernel(plan_all_ranks, dim3(how.num_sms, how.all_ranks), kThreads, shared,
                         how.stream, params, sizes);
  }
  return launch_kernel(plan_kernel, how.num_sms, kThreads, shared, how.stream, *params, sizes);
}

cudaError_t load_plan() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&plan_kernel));
}

}  // namespace jax_ep
