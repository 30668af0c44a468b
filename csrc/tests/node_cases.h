// SPDX-License-Identifier: Apache-2.0
// Random exchanges between nodes, and what they must come to.
#pragma once
#include "rank_arrays.h"
#include "semantics.h"

namespace jax_ep {

// An exchange of `nodes` nodes, its rings, and blocks of its launches.
struct NodeCase {
  Case c;
  int nodes;
  RingSize rings;
  int blocks;
  NodeShares percent = {};
};

// What combine gets, of all ranks.
struct Results {
  std::vector<Bytes> y;
  std::vector<std::vector<float>> weights;
};

inline Results random_results(const Case& c, std::mt19937& rng) {
  Results results;
  std::normal_distribution<float> normal(0, 2);
  for (int r = 0; r < c.x.num_ranks; ++r) {
    const size_t n = size_t(c.x.num_rows) * c.hidden;
    Bytes values(n * size_of(c.type));
    for (size_t i = 0; i < n; ++i) set_element(values, c.type, i, normal(rng));
    std::vector<float> weights(c.x.num_rows);
    for (float& v : weights) v = normal(rng);
    results.y.push_back(values);
    results.weights.push_back(weights);
  }
  return results;
}

class NodeCases {
 public:
  // `most_tokens` of a rank, `most_slots` of a ring, if all share alike.
  NodeCases(uint64_t seed, int most_tokens, int most_slots)
      : rng_(seed), most_tokens_(most_tokens), most_slots_(most_slots) {}

  NodeCase next(int nodes, int ranks_per_node) {
    NodeCase n;
    n.nodes = nodes;
    n.c.ranks_per_node = ranks_per_node;
    pick_sizes(n.c, nodes * ranks_per_node);
    pick_routing(n.c);
    pick_rows(n.c);
    const int rings = std::max(nodes, ranks_per_node) - 1;  // of a kind, at most
    n.rings.slots = rings * (chance(0.5) ? 1 : pick(1, most_slots_));
    n.rings.slot_bytes = pick_slot_bytes(n.c);
    n.blocks = pick(kLeastDispatchBlocks, 6);
    return n;
  }

  Results pick_results(const Case& c) { return random_results(c, rng_); }

 private:
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); }
  bool chance(double p) { return std::uniform_real_distribution<double>()(rng_) < p; }

  void pick_sizes(Case& c, int R) {
    Exchange& x = c.x;
    const int local = pick(1, 3);
    x.num_ranks = R;
    x.num_experts = R * local;
    x.num_tokens = chance(0.1) ? 1 : pick(2, most_tokens_);
    x.top_k = pick(1, 5);
    x.alignment = chance(0.5) ? 1 : pick(2, 8);
    const int pairs = R * x.num_tokens * std::min(x.top_k, local), A = x.alignment;
    const int worst = (pairs + (A - 1) * std::min(local, pairs)) / A * A;
    x.num_rows = chance(0.6) ? worst : std::max(A, pick(1, worst) / A * A);
    c.type = static_cast<Element>(pick(0, 2));
    const int kind = pick(0, 3);
    c.prequantized = kind == 3;
    if (kind == 1) c.wire = Wire::kQuantized;
    if (kind == 2) c.wire = Wire::kDequantized;
    c.hidden = kind == 0 ? int(16 / size_of(c.type)) * pick(1, 150) : kScaleBlock * pick(1, 5);
    c.power_of_two = chance(0.3);
    c.zero_tail = chance(0.3);
    c.weights = chance(0.7);
  }

  // Even, skewed, or all to one node; some pairs name no expert, some an expert twice; sometimes
  // a rank sends nothing.
  void pick_routing(Case& c) {
    const Exchange& x = c.x;
    const double none = chance(0.5) ? 0.0 : 0.4, skew = chance(0.3) ? 3.0 : 0.0;
    const int per_node = c.ranks_per_node * x.local_experts();
    const int only = chance(0.25) ? pick(0, x.num_experts / per_node - 1) : -1;
    for (int i = 0; i < x.num_ranks * x.num_pairs(); ++i) {
      const int from = only < 0 ? x.num_experts : per_node;
      const double u = std::uniform_real_distribution<double>()(rng_);
      const int e = std::min(int(std::pow(u, 1 + skew) * from), from - 1);
      c.topk_idx.push_back(chance(none) ? -1 : only < 0 ? e : only * per_node + e);
    }
    if (chance(0.2)) {
      const int r = pick(0, x.num_ranks - 1);
      std::fill_n(c.topk_idx.begin() + r * x.num_pairs(), x.num_pairs(), -1);
    }
  }

  void pick_rows(Case& c) {
    std::normal_distribution<float> normal(0, 3);
    const size_t T = c.x.num_tokens, n = T * c.hidden;
    for (int r = 0; r < c.x.num_ranks; ++r) {
      Bytes rows(n * (c.prequantized ? 1 : size_of(c.type)));
      for (size_t i = 0; i < n; ++i) {
        if (c.prequantized) {
          rows[i] = char(pick(0, 255));
        } else {
          set_element(rows, c.type, i, normal(rng_));
        }
      }
      c.rows_in.push_back(rows);
      std::vector<float> scales(T * (c.hidden / kScaleBlock)), scalars(T * c.x.top_k);
      for (float& s : scales) s = normal(rng_);
      for (float& s : scalars) s = normal(rng_);
      c.scales_in.push_back(scales);
      c.scalars_in.push_back(scalars);
    }
  }

  // From what holds one token of either operation to what holds their largest chunks.
  int pick_slot_bytes(const Case& c) {
    const MessageShape d = dispatch_shape(c, kAnySlot), s = combine_shape(c, kAnySlot);
    auto bytes = [](MessageShape shape, int tokens) {
      shape.chunk = tokens;
      return shape.bytes(tokens);
    };
    const size_t least = std::max(bytes(d, 1), bytes(s, 1));
    const int most = std::max(most_slot_bytes(d), most_slot_bytes(s));
    return chance(0.5) ? most : int(round_up(pick(int(least), most), 128));
  }

  std::mt19937 rng_;
  int most_tokens_, most_slots_;
};

// Tokens of a rank that another node wants: so many rows cross to it, one copy for all its ranks.
inline size_t rows_between_nodes(const Case& c, const HostPlan& plan, int rank, int node) {
  const size_t T = c.x.num_tokens, K = c.x.top_k;
  size_t rows = 0;
  for (size_t t = 0; t < T; ++t) {
    bool wanted = false;
    for (size_t k = 0; k < K; ++k) {
      const size_t pair = (rank * T + t) * K + k;
      wanted |= plan.pair_row[pair] >= 0 && plan.pair_rank[pair] / c.ranks_per_node == node;
    }
    rows += wanted;
  }
  return rows;
}

}  // namespace jax_ep
