// SPDX-License-Identifier: Apache-2.0
// How the plan's kernel shares out its work. The host works it out, once a launch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace jax_ep {

constexpr int kPlanThreads = 512;  // of a block, which ranks one tile at a time
constexpr int kPlanWarps = kPlanThreads / 32;
constexpr int kMostTiles = 128;
constexpr int kLeastTilePairs = kPlanThreads;
constexpr int kMostTilePairs = 4096;
constexpr int kTableRows = 8;  // of the table of counts, on their way to one thread together
static_assert(kTableRows * kMostTilePairs < 1 << 16, "their sums fit 16 bits");

// Tiles are neighbouring runs of the group's tokens, source rank * T + token. With many tiles each
// is ranked sooner, with few they are summed sooner.
struct Tiling {
  int tokens;     // of a tile
  int tiles;      // at most kMostTiles, unless they are as large as they may be
  int per_block;  // neighbouring tiles of one block; 1, unless they are as large as they may be

  Tiling(const Exchange& x, int num_blocks) {
    const int all = x.num_ranks * x.num_tokens;
    const int even = ceil_div(all, min_int(num_blocks, kMostTiles));
    const int least = ceil_div(kLeastTilePairs, x.top_k), most = kMostTilePairs / x.top_k;
    tokens = min_int(most, max_int(least, even));
    tiles = ceil_div(all, tokens);
    per_block = ceil_div(tiles, num_blocks);
  }
};

// Division by a number that is the same for all threads, of n from 0 on.
class Divider {
 public:
  explicit Divider(int divisor) : divisor_(divisor), reciprocal_(0xffffffffu / divisor_) {}
  JAX_EP_HD int operator()(int n) const {
    const uint32_t low = static_cast<uint64_t>(n) * reciprocal_ >> 32;  // right or one below
    return static_cast<int>(low + (n - low * divisor_ >= divisor_));
  }

 private:
  uint32_t divisor_;
  uint32_t reciprocal_;
};

struct PlanSizes {
  Tiling tiling;
  int experts;        // E, such that a row of 16-bit counts is whole 16-byte vectors
  int local;          // experts of a rank
  int pairs;          // of a rank
  int held;           // pairs of a tile, in whole vectors of words
  int most_blocks;    // of A rows, in a rank's buffer
  int expert_rows;    // batched: rows of an expert
  int groups;         // of threads that sum the table of counts, each `experts / 8` of them
  Divider by_tokens;  // of a rank
  Divider by_pairs;
  Divider by_local;
  Divider by_alignment;
  Divider by_width;  // threads of a group

  PlanSizes(const Exchange& x, int num_blocks)
      : tiling(x, num_blocks),
        experts(padded_experts(x)),
        local(x.local_experts()),
        pairs(x.num_pairs()),
        held(ceil_div(tiling.tokens * x.top_k, 4) * 4),
        most_blocks(x.num_rows / x.alignment),
        expert_rows(x.num_rows / local),
        groups(min_int(kPlanThreads / (experts / 8), ceil_div(tiling.tiles, kTableRows))),
        by_tokens(x.num_tokens),
        by_pairs(pairs),
        by_local(local),
        by_alignment(x.alignment),
        by_width(experts / 8) {}

  static int padded_experts(const Exchange& x) { return ceil_div(x.num_experts, 8) * 8; }

  // Of the table of counts, for any number of blocks.
  static size_t table_words(const Exchange& x) {
    return size_t(Tiling(x, kMostTiles).tiles) * padded_experts(x) / 2;
  }
};

}  // namespace jax_ep
