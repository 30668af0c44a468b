// SPDX-License-Identifier: Apache-2.0
// Small batches on the emulated machine, whose memory shows stores to peers late and in any order,
// inside a node and between nodes, against the host, bit for bit; and what becomes of them when a
// rank stays away, or a word.
//
//   slots_test [--cases N] [--seed S] [--ranks R [--local L]] [--nodes] [--faults]
#include "../options.h"
#include "../random_case.h"
#include "series.h"
#include "slot_world.h"

namespace jax_ep {
namespace {

// Bounds of waits, in ms of the machine.
constexpr double kForever = 1e9, kShort = 25;
constexpr int kExchanges = 9;  // of a case, in a row: each set of slots is used several times
constexpr SlotSize kSlots{24, 8192};

class Series {
 public:
  explicit Series(uint64_t seed) : rng_(seed), cases_(rng_, {true, true, 3}), seed_(seed) {}

  Case next_case(const Layout& layout) {
    Case c = cases_.next(layout.ranks);
    if (layout.spans_nodes()) c.ranks_per_node = layout.local;
    return c;
  }
  // Some of the same shape with other values, some of others; ranks run ahead of each other as far
  // as they may. Sometimes rank 0 only takes: then nothing but greetings holds it up in combines.
  std::vector<Step> fill(SlotWorld& w, const Layout& layout) {
    Case c;
    const bool takes = chance(0.25);
    for (int i = 0; i < kExchanges; ++i) {
      if (i == 0 || chance(0.25)) {
        c = next_case(layout);
      } else {
        cases_.refill(c);
      }
      if (takes) std::fill_n(c.topk_idx.begin(), c.x.num_pairs(), -1);
      w.add(c, pick_results(c));
    }
    return takes ? combines_last(w) : pick_steps(w);
  }
  Results pick_results(const Case& c) { return random_results(c, rng_); }
  size_t below(size_t n) { return rng_() % n; }
  bool chance(double p) { return cases_.chance(p); }
  uint64_t seed() const { return seed_; }

 private:
  std::vector<Step> combines_last(SlotWorld& w) {
    std::vector<Step> steps;
    for (SlotKind kind : {SlotKind::kDispatch, SlotKind::kCombine}) {
      for (size_t i = 0; i < kExchanges; ++i) steps.push_back({i, kind, Half::kBoth});
    }
    for (size_t i = 0; i < kExchanges; ++i) w[i].is_combined = true;
    return steps;
  }
  // Whole and in halves; a combine may end while the next dispatch is on its way. Some exchanges
  // have no combine, some several.
  std::vector<Step> pick_steps(SlotWorld& w) {
    std::vector<Step> steps;
    bool open = false;
    size_t combine = 0;  // that is open
    auto close = [&] {
      if (open) steps.push_back({combine, SlotKind::kCombine, Half::kDone});
      open = false;
    };
    for (size_t i = 0; i < kExchanges; ++i) {
      if (chance(0.5)) {
        steps.push_back({i, SlotKind::kDispatch, Half::kBoth});
      } else {
        steps.push_back({i, SlotKind::kDispatch, Half::kStart});
        if (chance(0.5)) close();
        steps.push_back({i, SlotKind::kDispatch, Half::kDone});
      }
      for (size_t j = i; chance(0.6); j = chance(0.5) ? j : below(i + 1)) {
        close();
        open = chance(0.5);
        combine = j;
        w[j].is_combined = true;
        steps.push_back({j, SlotKind::kCombine, open ? Half::kStart : Half::kBoth});
      }
    }
    close();
    return steps;
  }

  std::mt19937 rng_;
  RandomCases cases_;
  const uint64_t seed_;
};

// One put for each token and rank of another node that it goes to, each way, and one of routing for
// each rank.
void check_puts(SlotWorld& w, const std::vector<Step>& steps, int R) {
  for (int from = 0; from < R; ++from) {
    for (int to = 0; to < R; ++to) {
      size_t want = 0;
      for (const Step& step : steps) {
        if (w.share_node(from, to) || step.half == Half::kDone) continue;
        const SlotExchange& e = w[step.exchange];
        const bool back = step.kind == SlotKind::kCombine;
        want += back ? 0 : 1;
        const size_t T = e.c.x.num_tokens, K = e.c.x.top_k;
        for (size_t t = 0; t < T; ++t) {
          bool goes = false;
          for (size_t k = 0; k < K; ++k) {
            const size_t pair = ((back ? to : from) * T + t) * K + k;
            const bool there = e.plan.pair_rank[pair] == (back ? from : to);
            goes |= there && (!back || e.plan.pair_row[pair] >= 0);
          }
          want += goes;
        }
      }
      EXPECT((w.network.puts[{from, to}] == want));
    }
  }
}

void describe(const Case& c, size_t i) {
  const Exchange& x = c.x;
  std::printf(
      "  exchange %zu: R=%d nodes of %d E=%d T=%d K=%d rows=%d A=%d batched=%d H=%d type=%d "
      "wire=%d pre=%d "
      "weights=%d fp8_combine=%d blocks=%d\n",
      i, x.num_ranks, c.ranks_per_node, x.num_experts, x.num_tokens, x.top_k, x.num_rows,
      x.alignment, x.batched, c.hidden, int(c.type), int(c.wire), c.prequantized, c.weights,
      c.quantized_partials, c.num_sms);
}

void exchange(uint64_t seed, const Layout& layout) {
  const int R = layout.ranks;
  Series series(seed);
  SlotWorld w(layout, kSlots, seed, kForever);
  const std::vector<Step> steps = series.fill(w, layout);
  for (int r = 0; r < R; ++r) {
    for (const Step& step : steps) w.issue(r, step);
  }
  w.run();
  for (size_t i = 0; i < w.size(); ++i) {
    const int before = failures;
    const SlotExchange& e = w[i];
    for (int r = 0; r < R; ++r) {
      const RankArrays& a = e.a[r];
      check_plan(e.c.x, e.plan, r, e.a[r].plan);
      check_dispatch(e.c, e.plan, r, a.rows, a.row_scales, a.row_scalars);
      if (e.is_combined) {
        expect_same("combined", r, a.out,
                    host_combine(e.c, e.plan, e.results.y, e.results.weights, r));
      }
    }
    if (failures != before) describe(e.c, i);
  }
  check_puts(w, steps, R);
  for (const FaultRecord& f : w.group.records) check_no_fault(f);
}

// One rank's blocks that have nothing to send in a dispatch begin when everybody else has ended: no
// peer waits for them. First come those with own tokens, and with words for a rank of another node.
void receiving_blocks_are_late(uint64_t seed, const Layout& layout) {
  const int R = layout.ranks;
  Series series(seed);
  Case c = series.next_case(layout);
  c.num_sms = R * c.x.num_tokens;
  SlotWorld w(layout, kSlots, seed, kForever);
  w.add(c, series.pick_results(c));
  w.group.machine.crowd(seed % R, std::max(c.x.num_tokens, R - layout.local));
  for (int r = 0; r < R; ++r) w.issue(r, {0, SlotKind::kDispatch, Half::kBoth});
  w.run();
  const int before = failures;
  const SlotExchange& e = w[0];
  for (int r = 0; r < R; ++r) {
    check_plan(e.c.x, e.plan, r, e.a[r].plan);
    check_dispatch(e.c, e.plan, r, e.a[r].rows, e.a[r].row_scales, e.a[r].row_scalars);
  }
  if (failures != before) describe(e.c, 0);
}

void run_case(uint64_t seed, const Layout& layout) {
  exchange(seed, layout);
  if (layout.ranks > 1) receiving_blocks_are_late(seed, layout);
}

// Results of a rank, before an operation.
constexpr char kMark = 0x11;

// A dispatch, whole or in halves, then a combine, of the ranks that `comes(rank, kind)`; until a
// rank gives up on another one.
class Failure {
 public:
  Failure(uint64_t seed, const Layout& layout)
      : series_(seed), w_(layout, kSlots, seed, kShort), R_(layout.ranks) {
    Case c;
    do {
      c = series_.next_case(layout);
      c.x.num_experts = R_;  // one of each rank
      for (int& e : c.topk_idx) e = int(series_.below(R_));
    } while (c.x.num_tokens < 8 || c.x.top_k < 4 || c.x.batched);
    c.x.num_rows = R_ * c.x.num_pairs() / c.x.alignment * c.x.alignment;
    w_.add(c, series_.pick_results(c));
    halves_ = series_.chance(0.5);
  }

  // `before`: what happens in front of the operation of kind `last`.
  template <typename Comes>
  void run(SlotKind last, Comes&& comes, const std::function<void()>& before = [] {}) {
    for (int r = 0; r < R_; ++r) w_.mark(0, r, kMark);
    if (last == SlotKind::kDispatch) before();
    issue(SlotKind::kDispatch, [&](int r) { return last == SlotKind::kCombine || comes(r); });
    if (last == SlotKind::kCombine) {
      w_.run();
      for (const FaultRecord& f : w_.group.records) check_no_fault(f);
      for (int r = 0; r < R_; ++r) w_.mark(0, r, kMark);
      began_ = w_.group.machine.time;
      before();
      issue(SlotKind::kCombine, comes);
    }
    w_.run();
  }
  // Rank `r` has given up on `awaited` in time, or has heard of it; its results are NaN.
  void expect_given_up(int r, int awaited, SlotKind kind) {
    const FaultRecord& f = w_.group.records[r];
    if (f.fault == uint32_t(Fault::kTimeout)) EXPECT(f.awaited == awaited);
    EXPECT(f.fault == uint32_t(Fault::kTimeout) || f.fault == uint32_t(Fault::kPeer));
    expect_poison(r, kind);
  }
  void expect_poison(int r, SlotKind kind) {
    EXPECT(w_.group.records[r].rank == r && w_.group.records[r].fault != 0);
    EXPECT(w_.group.machine.time - began_ < 3 * kShort * 1e6);
    const SlotExchange& e = w_[0];
    const bool rows = kind == SlotKind::kDispatch;
    const char* first = rows ? e.a[r].rows : e.a[r].out;
    const size_t bytes = rows ? size_t(e.c.x.num_rows) * row_bytes_of(e.c)
                              : size_t(e.c.x.num_tokens) * e.c.hidden * size_of(e.c.type);
    EXPECT(is_poison(first, bytes));
  }
  bool is(int r, Fault fault) const { return w_.group.records[r].fault == uint32_t(fault); }
  bool timed_out(int r) const { return is(r, Fault::kTimeout); }
  SlotWorld& world() { return w_; }

 private:
  template <typename Comes>
  void issue(SlotKind kind, Comes&& comes) {
    for (int r = 0; r < R_; ++r) {
      if (!comes(r)) continue;
      if (!halves_) w_.issue(r, {0, kind, Half::kBoth});
      if (halves_) w_.issue(r, {0, kind, Half::kStart});
      if (halves_) w_.issue(r, {0, kind, Half::kDone});
    }
  }

  Series series_;
  SlotWorld w_;
  const int R_;
  bool halves_;
  uint64_t began_ = 0;
};

constexpr SlotKind kKinds[] = {SlotKind::kDispatch, SlotKind::kCombine};

void a_rank_is_absent(uint64_t seed, const Layout& layout, int absent) {
  for (SlotKind kind : kKinds) {
    Failure f(seed, layout);
    f.run(kind, [&](int r) { return r != absent; });
    bool timed_out = false;
    for (int r = 0; r < layout.ranks; ++r) {
      if (r == absent) continue;
      f.expect_given_up(r, absent, kind);
      timed_out |= f.timed_out(r);
    }
    EXPECT(timed_out);
  }
}

// Flags of the rows that rank `from` has sent to rank `to`.
void flags_do_not_come(uint64_t seed, const Layout& layout, int from, int to) {
  const SlotLayout lie = slot_layout(kSlots);
  for (SlotKind kind : kKinds) {
    Failure f(seed, layout);
    SlotWorld& w = f.world();
    const int sets = w.inboxes() / layout.ranks / 2;
    for (int set = 0; set < sets; ++set) {
      const size_t flags = w.inbox(int(kind) * sets + set, from) + lie.flags;
      if (w.share_node(from, to)) {
        w.group.memory.lose(to, {flags, lie.words - lie.flags});
      } else {
        w.network.lose(to, flags, lie.words - lie.flags);
      }
    }
    f.run(kind, [](int) { return true; });
    f.expect_given_up(to, from, kind);
    EXPECT(f.timed_out(to));
    EXPECT(w.group.records[to].phase == uint32_t(Phase::kRows));
  }
}

// One rank's error, which the others, who cannot go on without its words, hear of.
void a_choice_is_out_of_range(uint64_t seed, const Layout& layout, int rank) {
  Failure f(seed, layout);
  f.world()[0].a[rank].topk_idx[5] = layout.ranks;
  f.run(SlotKind::kDispatch, [](int) { return true; });
  for (int r = 0; r < layout.ranks; ++r) {
    f.expect_poison(r, SlotKind::kDispatch);
    EXPECT(f.is(r, r == rank ? Fault::kRouting : Fault::kPeer));
  }
}

// A rank that takes an operation for another one is found by who hears of it first.
void a_rank_is_mistaken(uint64_t seed, const Layout& layout, int rank) {
  for (SlotKind kind : kKinds) {
    Failure f(seed, layout);
    f.run(kind, [](int) { return true; }, [&] { f.world().mistaken = rank; });
    bool found = false;
    for (int r = 0; r < layout.ranks; ++r) {
      f.expect_poison(r, kind);
      found |= f.is(r, Fault::kMismatch);
      EXPECT(!f.timed_out(r));
    }
    EXPECT(found);
  }
}

int run_faults(int seed, const std::vector<Layout>& layouts) {
  for (const Layout& layout : layouts) {
    const int last = layout.ranks - 1;
    a_rank_is_absent(seed, layout, last);
    a_rank_is_absent(seed + 1, layout, 0);
    flags_do_not_come(seed, layout, last, 0);
    flags_do_not_come(seed + 1, layout, 0, last);
    a_choice_is_out_of_range(seed, layout, last);
    a_rank_is_mistaken(seed, layout, 0);
  }
  std::printf("faults of groups of %zu sizes, %d failures\n", layouts.size(), failures);
  return failures != 0;
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  int cases = 8, seed = 1, ranks = 0, local = 0;
  bool nodes = false, faults = false;
  const bool known = jax_ep::take_options(argc, argv,
                                          {{"--cases", &cases},
                                           {"--seed", &seed},
                                           {"--ranks", &ranks},
                                           {"--local", &local},
                                           {"--nodes", nullptr, &nodes},
                                           {"--faults", nullptr, &faults}});
  if (!known) return 2;
  std::vector<jax_ep::Layout> layouts = {{2, 2}, {4, 4}, {3, 3}, {1, 1}};
  if (faults) layouts = {{2, 2}, {3, 3}};
  if (nodes) layouts = {{2, 1}, {4, 2}, {8, 2}, {8, 4}};
  if (nodes && faults) layouts = {{2, 1}, {4, 2}};
  if (ranks > 0) layouts = {{ranks, local > 0 ? local : ranks}};
  if (faults) return jax_ep::run_faults(seed, layouts);
  return jax_ep::run_series(cases, seed, layouts, jax_ep::run_case);
}
