// SPDX-License-Identifier: Apache-2.0
// Exchanges between nodes on the emulated machine, over a network that does the worst it may,
// against the host, bit for bit; and what becomes of them when a rank fails.
//
//   nodes_test [--cases N] [--seed S] [--nodes N --local L] [--faults]
#include <cstdlib>

#include "../node_checks.h"
#include "../options.h"
#include "world.h"

namespace jax_ep {
namespace {

struct Layout {
  int nodes, local;
};

// Bounds of waits, in ms of the machine.
constexpr double kForever = 1e9, kLong = 500, kShort = 30;

// One copy of a row for each node, whatever else is in the messages: heads and places.
void check_bytes(World& w, const Case& c, const MessageShape& shape, bool back) {
  const int R = c.x.num_ranks, L = c.ranks_per_node;
  const size_t chunks = ceil_div(c.x.num_tokens, shape.chunk);
  for (int source = 0; source < R; ++source) {
    for (int other = 0; other < R; ++other) {
      size_t want = 0;
      if (source / L != other / L && source % L == other % L) {
        want = chunks * shape.rows_at() +
               rows_between_nodes(c, w.host(), source, other / L) * shape.row_bytes;
      }
      EXPECT((back ? w.sent(other, source) : w.sent(source, other)) == want);
    }
  }
}

// Operations one after the other, each checked; then many issued at once, so that ranks run ahead
// of each other.
void exchange(const NodeCase& n, NodeCases& cases, uint64_t seed) {
  const Case& c = n.c;
  World w(n, seed, kForever);
  const int R = c.x.num_ranks;
  const Results results = cases.pick_results(c);
  auto each = [&](auto&& f) {
    for (int r = 0; r < R; ++r) f(r);
  };
  each([&](int r) {
    std::copy(results.y[r].begin(), results.y[r].end(), w.a[r].y);
    std::copy(results.weights[r].begin(), results.weights[r].end(), w.a[r].weights);
  });
  auto dispatched = [&](int r) {
    const RankArrays& a = w.a[r];
    check_dispatch(c, w.host(), r, a.rows, a.row_scales, a.row_scalars);
  };
  auto combined = [&](int r) {
    check_combine(c, w.host(), results, r, w.a[r].out, w.a[r].scalars_out);
  };
  each([&](int r) { w.plan(r); });
  w.run();
  each([&](int r) { expect_same("choices", r, w.gathered[r].data(), c.topk_idx); });
  w.network->sent.clear();
  each([&](int r) { w.dispatch(r); });
  w.run();
  each(dispatched);
  check_bytes(w, c, dispatch_shape(c, w.slot_bytes()), false);
  w.network->sent.clear();
  each([&](int r) { w.combine(r); });
  w.run();
  each(combined);
  check_bytes(w, c, combine_shape(c, w.slot_bytes()), true);
  // Plans in a row: only their own hellos keep them apart.
  each([&](int r) {
    std::fill(w.gathered[r].begin(), w.gathered[r].end(), -2);
    for (int i = 0; i < 4; ++i) w.plan(r);
  });
  w.run();
  each([&](int r) { expect_same("choices", r, w.gathered[r].data(), c.topk_idx); });
  each([&](int r) {
    w.poison_results(r);
    w.combine_scalars(r);
  });
  w.run();
  each([&](int r) {
    const size_t row = c.hidden * size_of(c.type);
    if (c.weights) check_scalars(c, w.host(), results, r, w.a[r].scalars_out);
    expect_same("nothing", r, w.a[r].out, Bytes(c.x.num_tokens * row, char(0xff)));
  });
  each([&](int r) {
    w.poison_results(r);
    for (int i = 0; i < 2; ++i) {
      w.combine(r);
      w.plan(r);
      w.dispatch(r);
      w.dispatch(r);
      w.combine(r);
    }
  });
  w.run();
  each(dispatched);
  each(combined);
  each([&](int r) { check_no_fault(w.records[r]); });
}

bool is(const FaultRecord& f, Fault fault) { return f.fault == static_cast<uint32_t>(fault); }

// Every rank but `absent` has given up before `most_ms`; its rows, or its sums, are NaN.
void expect_given_up(const World& w, const Case& c, int absent, double most_ms, bool back) {
  EXPECT(w.machine.time < most_ms * 1e6);
  for (int r = 0; r < c.x.num_ranks; ++r) {
    if (r == absent) continue;
    EXPECT(w.records[r].fault != 0);
    const size_t bytes = back ? size_t(c.x.num_tokens) * c.hidden * size_of(c.type)
                              : size_t(c.x.num_rows) * row_bytes_of(c);
    const char* results = back ? w.a[r].out : w.a[r].rows;
    EXPECT(std::all_of(results, results + bytes, [](char byte) { return byte == char(0xff); }));
  }
}

// A rank that stays away from the plan, from a dispatch or from a combine.
void a_rank_is_absent(const NodeCase& n, uint64_t seed, int absent) {
  for (int missing = 0; missing < 3; ++missing) {
    World w(n, seed + missing, kShort);
    for (int r = 0; r < n.c.x.num_ranks; ++r) {
      if (missing > 0 || r != absent) w.plan(r);
    }
    if (missing > 0) w.run();
    const uint64_t begin = w.machine.time;
    for (int r = 0; r < n.c.x.num_ranks; ++r) {
      if (missing > 1 || r != absent) w.dispatch(r);
    }
    if (missing > 1) w.run();
    for (int r = 0; r < n.c.x.num_ranks; ++r) {
      if (missing > 1 && r != absent) w.combine(r);
    }
    w.run();
    expect_given_up(w, n.c, absent, begin / 1e6 + 4 * kShort, missing == 2);
    bool timed_out = false;
    for (const FaultRecord& f : w.records) {
      timed_out |= is(f, Fault::kTimeout);
      // Everybody awaits everybody's routing; later waits go hop by hop.
      if (missing == 0 && is(f, Fault::kTimeout)) EXPECT(f.awaited == absent);
    }
    EXPECT(timed_out);
  }
}

// A choice out of range is one rank's error; the others learn of it long before they would give up,
// although that rank may not get as far as its dispatch.
void a_choice_is_out_of_range(const NodeCase& n, uint64_t seed, int rank) {
  for (bool goes_on : {false, true}) {
    World w(n, seed + goes_on, kLong);
    w.a[rank].topk_idx[0] = n.c.x.num_experts;
    for (int r = 0; r < n.c.x.num_ranks; ++r) {
      w.plan(r);
      if (goes_on || r != rank) w.dispatch(r);
    }
    w.run();
    EXPECT(is(w.records[rank], Fault::kRouting));
    expect_given_up(w, n.c, -1, kLong / 2, false);
  }
}

// A rank that runs another operation than the others, or other shapes.
void a_rank_is_mistaken(const NodeCase& n, uint64_t seed, int rank) {
  for (int step = 0; step < 3; ++step) {
    World w(n, seed + step, kLong);
    for (int r = 0; r < n.c.x.num_ranks; ++r) {
      w.plan(r, step == 0 && r == rank);
      w.dispatch(r, step == 1 && r == rank);
    }
    if (step == 2) w.run();
    for (int r = 0; r < n.c.x.num_ranks; ++r) {
      if (step == 2) w.combine(r, r == rank);
    }
    w.run();
    expect_given_up(w, n.c, -1, kLong / 2, step == 2);
    bool mismatch = false;
    for (const FaultRecord& f : w.records) mismatch |= is(f, Fault::kMismatch);
    EXPECT(mismatch);
  }
}

int run(int count, int seed, const std::vector<Layout>& layouts) {
  NodeCases cases(seed, 14, 3);
  for (int i = 0; i < count; ++i) {
    const Layout& layout = layouts[i % layouts.size()];
    const NodeCase n = cases.next(layout.nodes, layout.local);
    const int before = failures;
    exchange(n, cases, seed * 1000003ull + i);
    if (failures != before) describe(i, n);
  }
  std::printf("%d cases, %d differences\n", count, failures);
  return failures != 0;
}

int run_faults(int seed, const std::vector<Layout>& layouts) {
  NodeCases cases(seed, 14, 2);
  for (const Layout& layout : layouts) {
    const int R = layout.nodes * layout.local, before = failures;
    const NodeCase n = cases.next(layout.nodes, layout.local);
    a_rank_is_absent(n, seed, R - 1);
    a_rank_is_absent(n, seed, 0);
    a_choice_is_out_of_range(n, seed, R / 2);
    a_rank_is_mistaken(n, seed, R - 1);
    if (failures != before) describe(0, n);
  }
  std::printf("faults of %zu layouts, %d failures\n", layouts.size(), failures);
  return failures != 0;
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  int cases = 8, seed = 1, nodes = 0, local = 0;
  bool faults = false;
  const bool known = jax_ep::take_options(argc, argv,
                                          {{"--cases", &cases},
                                           {"--seed", &seed},
                                           {"--nodes", &nodes},
                                           {"--local", &local},
                                           {"--faults", nullptr, &faults}});
  if (!known) return 2;
  std::vector<jax_ep::Layout> layouts = {{2, 1}, {2, 2}, {4, 2}, {2, 4}};
  if (nodes > 0) layouts = {{nodes, std::max(local, 1)}};
  return faults ? jax_ep::run_faults(seed, layouts) : jax_ep::run(cases, seed, layouts);
}
