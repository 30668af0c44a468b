// SPDX-License-Identifier: Apache-2.0
// Exchanges between nodes on GPUs against the host, bit for bit, over peers' memory instead of a
// network: all ranks in one process.
//
//   rdma_test [--cases N] [--seed S] [--nodes N --local L] [--devices D] [--tokens T] [--slots S]
//             [--replays N] [--faults]
//
// Rank r runs on device r % D, each rank on its own stream. Each case also runs as a CUDA graph of
// each rank, replayed `--replays` times, and through slots, if it fits, whole and in halves.
// --faults: absent ranks instead.
#include <cstdlib>

#include "node_checks.h"
#include "options.h"
#include "rdma_world.cuh"

namespace jax_ep {
namespace {

struct Options {
  int cases = 24, seed = 1, nodes = 0, local = 1, devices = 1, tokens = 60, slots = 4, replays = 8;
  bool faults = false;
};

constexpr double kDeadline = 60;  // seconds, of any part of a case

template <typename T>
void expect_plan(const RdmaWorld& w, const char* name, int r, const int* got,
                 const std::vector<T>& all, int num_ranks) {
  const size_t count = all.size() / num_ranks;
  const std::vector<T> want(all.begin() + r * count, all.begin() + (r + 1) * count);
  expect_same(name, r, w.host(r, got, count).data(), want);
}

// The operations of each way between nodes.
const std::vector<Step> kLarge = {Step::kPlan, Step::kDispatch, Step::kCombine},
                        kSmall = {Step::kSmallDispatch, Step::kSmallCombine},
                        kHalves = {Step::kDispatchStart, Step::kDispatchDone, Step::kCombineStart,
                                   Step::kCombineDone};

void check(const RdmaWorld& w, const Case& c, const HostPlan& plan, const Results& results,
           bool scalars) {
  const size_t rows = c.x.num_rows, pairs = c.x.num_pairs(), R = c.x.num_ranks;
  const size_t row = c.hidden * size_of(c.type), scales = c.hidden / kScaleBlock;
  for (int r = 0; r < int(R); ++r) {
    const RankArrays& a = w.a[r];
    expect_plan(w, "pair_row", r, a.plan.pair_row, plan.pair_row, R);
    expect_plan(w, "token_rows", r, a.plan.token_rows, plan.token_rows, R);
    expect_plan(w, "row_pair", r, a.plan.row_pair, plan.row_pair, R);
    check_dispatch(c, plan, r, w.host(r, a.rows, rows * row_bytes_of(c)).data(),
                   w.host(r, a.row_scales, rows * scales).data(),
                   w.host(r, a.row_scalars, rows).data());
    expect_same("combined", r, w.host(r, a.out, c.x.num_tokens * row).data(),
                host_combine(c, plan, results.y, results.weights, r));
    if (scalars && c.weights) {
      check_scalars(c, plan, results, r, w.host(r, a.scalars_out, pairs).data());
    }
    check_no_fault(w.records[r]);
  }
}

void exchange(const NodeCase& n, const Results& results, const Options& o, uint32_t adverse,
              const std::vector<Step>& steps) {
  const Case& c = n.c;
  const HostPlan plan = host_plan(c.x, c.topk_idx);
  RdmaWorld w(n, o.devices, kDeadline / 2, adverse);
  auto prepare = [&] {
    for (int r = 0; r < c.x.num_ranks; ++r) {
      w.poison(r, w.a[r].rows, size_t(c.x.num_rows) * row_bytes_of(c));
      w.poison(r, w.a[r].out, size_t(c.x.num_tokens) * c.hidden * size_of(c.type));
      RdmaWorld::copy_in(w.a[r].y, results.y[r].data(), results.y[r].size());
      RdmaWorld::copy_in(w.a[r].weights, results.weights[r].data(), results.weights[r].size() * 4);
    }
  };
  for (bool as_graph : {false, true}) {
    prepare();
    for (int i = 0; i < (as_graph ? o.replays : 2); ++i) w.issue_all(steps, as_graph);
    w.wait(kDeadline);
    check(w, c, plan, results, &steps == &kLarge);
  }
}

int run(const Options& o) {
  const std::vector<std::pair<int, int>> layouts =
      o.nodes > 0 ? std::vector<std::pair<int, int>>{{o.nodes, o.local}}
                  : std::vector<std::pair<int, int>>{{2, 1}, {2, 2}, {4, 2}, {2, 4}};
  NodeCases cases(o.seed, o.tokens, o.slots);
  for (int i = 0; i < o.cases; ++i) {
    const auto& [nodes, local] = layouts[i % layouts.size()];
    const NodeCase n = cases.next(nodes, local);
    const int before = failures;
    if (i % 10 == 0) std::printf("case %d\n", i);
    const Results results = cases.pick_results(n.c);
    for (const auto* steps : {&kLarge, &kSmall, &kHalves}) {
      if (steps != &kLarge && slots_for(n.c).tokens == 0) continue;
      exchange(n, results, o, i % 3 == 0 ? 0 : o.seed * 1000 + i, *steps);
    }
    if (failures != before) describe(i, n);
  }
  std::printf("%d cases, %d differences\n", o.cases, failures);
  return failures != 0;
}

// The last rank stays away from one step. The others give up in bounded time, and their rows or
// sums are NaN.
void a_rank_is_absent(const NodeCase& n, int devices, const std::vector<Step>& steps,
                      size_t missing) {
  constexpr double kTimeout = 0.5;
  const Case& c = n.c;
  RdmaWorld w(n, devices, kTimeout, 0);
  for (size_t i = 0; i < missing; ++i) {
    w.issue_all({steps[i]});
    w.wait(kDeadline);
  }
  const int others = c.x.num_ranks - 1;
  for (int r = 0; r < others; ++r) w.issue(r, steps[missing]);
  EXPECT(w.wait(kDeadline) < 4 * kTimeout);
  bool timed_out = false;
  for (int r = 0; r < others; ++r) {
    const FaultRecord& f = w.records[r];
    EXPECT(f.fault != 0);
    timed_out |= f.fault == static_cast<uint32_t>(Fault::kTimeout);
    const size_t out = size_t(c.x.num_tokens) * c.hidden * size_of(c.type);
    const size_t rows = size_t(c.x.num_rows) * row_bytes_of(c);
    const Bytes got =
        missing + 1 == steps.size() ? w.host(r, w.a[r].out, out) : w.host(r, w.a[r].rows, rows);
    EXPECT(std::all_of(got.begin(), got.end(), [](char byte) { return byte == char(0xff); }));
  }
  EXPECT(timed_out);
}

int run_faults(const Options& o) {
  NodeCases cases(o.seed, o.tokens, o.slots);
  for (const auto& [nodes, local] : {std::pair{2, 1}, {2, 2}, {4, 2}}) {
    const NodeCase n = cases.next(nodes, local);
    for (const auto* steps : {&kLarge, &kSmall}) {
      for (size_t missing = 0; missing < steps->size(); ++missing) {
        a_rank_is_absent(n, o.devices, *steps, missing);
      }
    }
  }
  std::printf("absent ranks: %d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  jax_ep::Options o;
  const bool known = jax_ep::take_options(argc, argv,
                                          {{"--cases", &o.cases},
                                           {"--seed", &o.seed},
                                           {"--nodes", &o.nodes},
                                           {"--local", &o.local},
                                           {"--devices", &o.devices},
                                           {"--tokens", &o.tokens},
                                           {"--slots", &o.slots},
                                           {"--replays", &o.replays},
                                           {"--faults", nullptr, &o.faults}});
  if (!known) return 2;
  try {
    jax_ep::prepare_devices(o.devices);
    return o.faults ? jax_ep::run_faults(o) : jax_ep::run(o);
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    std::_Exit(3);  // kernels may hang: nothing waits for them
  }
}
