// SPDX-License-Identifier: Apache-2.0
// Random exchanges inside a node: shapes, options, routing, rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "case.h"

namespace jax_ep {

class RandomCases {
 public:
  struct Options {
    bool small = false, slots = false;
    int most_blocks = 16;
  };
  RandomCases(std::mt19937& rng, const Options& o) : rng_(rng), o_(o) {}

  Case next(int num_ranks) {
    Case c;
    pick_exchange(c, num_ranks);
    pick_kind(c);
    refill(c);
    return c;
  }
  // Other choices and values in the same shapes.
  void refill(Case& c) {
    c.topk_idx.clear();
    c.rows_in.clear();
    c.scales_in.clear();
    c.scalars_in.clear();
    pick_routing(c);
    for (int r = 0; r < c.x.num_ranks; ++r) pick_rows(c);
  }

  // What the caller draws besides.
  int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); }
  bool chance(double p) { return std::uniform_real_distribution<double>()(rng_) < p; }

 private:
  void pick_exchange(Case& c, int R) {
    Exchange& x = c.x;
    x.num_ranks = R;
    wide_ = !o_.small && !o_.slots && chance(0.15);  // large for the plan alone
    const int local = wide_ ? pick(1, kMaxExperts / R) : pick(1, o_.small ? 4 : 24);
    x.num_experts = R * local;
    x.num_tokens = chance(0.1) ? 1 : pick(1, o_.small ? 24 : !o_.slots && chance(0.1) ? 300 : 80);
    x.top_k = pick(1, chance(0.2) ? 32 : 8);
    if (o_.slots) x.top_k = std::min(x.top_k, kMaxSlotPairs / (R * x.num_tokens));
    x.alignment = chance(0.5) ? 1 : pick(2, 16);
    x.batched = !wide_ && chance(0.25);
    if (wide_) x.num_tokens = pick(1, 8000 / x.top_k);
    const int T = x.num_tokens, K = x.top_k, A = x.alignment;
    if (x.batched) {
      const int C = chance(0.5) ? R * T : std::max(1, pick(1, R * T));
      x.num_rows = local * C;
    } else {
      const int pairs = R * T * std::min(K, local);
      const int worst = (pairs + (A - 1) * std::min(local, pairs)) / A * A;
      x.num_rows = chance(0.5) ? worst : std::max(A, pick(1, worst) / A * A);
    }
  }

  void pick_kind(Case& c) {
    c.type = static_cast<Element>(pick(0, 2));
    const int kind = pick(0, 3);
    c.prequantized = kind == 3;
    if (kind == 1) c.wire = Wire::kQuantized;
    if (kind == 2) c.wire = Wire::kDequantized;
    const bool long_rows = c.x.num_ranks * c.x.num_rows <= 4096 && chance(0.3);  // the host's time
    if (kind != 0) {
      const int most = wide_ ? 1 : o_.small ? 3 : !long_rows ? 9 : o_.slots ? 32 : 80;
      c.hidden = kScaleBlock * pick(1, most);
    } else {
      const int long_most = o_.slots ? 400 : 900;
      const int most = wide_ ? 4 : o_.small ? 40 : chance(0.1) ? long_most : 70;
      c.hidden = int(16 / size_of(c.type)) * pick(1, most);
    }
    c.power_of_two = chance(0.3);
    c.zero_tail = chance(0.3);
    c.quantized_partials = c.hidden % kScaleBlock == 0 && chance(0.5);
    c.weights = chance(0.7);
    c.num_sms = pick(1, o_.most_blocks);
  }

  // Even or skewed; some pairs name no expert; sometimes rank 0 sends nothing.
  void pick_routing(Case& c) {
    const Exchange& x = c.x;
    const double none = chance(0.5) ? 0.0 : 0.4, skew = chance(0.3) ? 3.0 : 0.0;
    for (int i = 0; i < x.num_ranks * x.num_pairs(); ++i) {
      const double u = std::uniform_real_distribution<double>()(rng_);
      const int e = int(std::pow(u, 1 + skew) * x.num_experts);
      c.topk_idx.push_back(chance(none) ? -1 : std::min(e, x.num_experts - 1));
    }
    if (chance(0.2)) std::fill_n(c.topk_idx.begin(), x.num_pairs(), -1);
  }

  void pick_rows(Case& c) {
    std::normal_distribution<float> normal(0, 3);
    const size_t T = c.x.num_tokens, n = T * c.hidden;
    const bool quantizes = c.wire != Wire::kCopy;
    Bytes rows(n * (c.prequantized ? 1 : size_of(c.type)));
    for (size_t i = 0; i < n; ++i) {
      const bool zero = quantizes && i < kScaleBlock;  // a block of zeros
      if (c.prequantized) {
        rows[i] = char(pick(0, 255));
      } else {
        set_element(rows, c.type, i, zero ? 0.0f : normal(rng_));
      }
    }
    std::vector<float> scales(T * (c.hidden / kScaleBlock)), scalars(T * c.x.top_k);
    for (float& s : scales) s = normal(rng_);
    for (float& s : scalars) s = normal(rng_);
    if (chance(0.3)) {  // words of ones, NaN in every type
      if (!quantizes) set_ones(rows.data(), rows.size());
      set_ones(scalars.data(), scalars.size() * sizeof(float));
      set_ones(scales.data(), scales.size() * sizeof(float));
    }
    c.rows_in.push_back(rows);
    c.scales_in.push_back(scales);
    c.scalars_in.push_back(scalars);
  }
  // A few words of 32 bits.
  void set_ones(void* to, size_t bytes) {
    for (int i = 0; i < 4 && bytes > 0; ++i) {
      std::memset(static_cast<char*>(to) + pick(0, int(bytes / 4) - 1) * 4, 0xff, 4);
    }
  }

  std::mt19937& rng_;
  const Options o_;
  bool wide_ = false;
};

}  // namespace jax_ep
