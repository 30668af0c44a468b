// SPDX-License-Identifier: Apache-2.0
// plan and dispatch of the large path on the emulated machine, whose memory shows stores to peers
// late and in any order, against the host, bit for bit; and what becomes of them when a rank stays
// away, sends to an expert that there is not, or takes an operation for another one.
//
//   dispatch_test [--cases N] [--seed S] [--ranks R] [--faults]
#include "../random_case.h"
#include "dispatch_world.h"
#include "large.h"

namespace jax_ep {
namespace {

// Bounds of waits, in ms of the machine.
constexpr double kForever = 1e9, kShort = 100;
constexpr int kDispatches = 2, kPlans = 5;  // of a case, in a row

class Series {
 public:
  explicit Series(uint64_t seed) : rng_(seed), cases_(rng_, {true, false, 5}) {}

  std::vector<Dispatch> next(int ranks, int count) {
    std::vector<Dispatch> all;
    for (int i = 0; i < count; ++i) all.push_back(next_dispatch(ranks));
    return all;
  }
  // Few tokens, of whose rows several warps push segments, or so many that several are a chunk.
  Dispatch next_dispatch(int ranks) {
    Dispatch o;
    Case& c = o.c;
    c = cases_.next(ranks);
    const bool many = ranks <= 3 && cases_.chance(0.05), wide = cases_.chance(0.1),
               long_rows = !many && cases_.chance(0.3);
    if (wide) c.x.num_experts = ranks * cases_.pick(5, 80);
    if (many) {
      c.x.num_tokens = kMaxChunks + cases_.pick(1, 100);
      c.x.top_k = cases_.pick(1, 2);
      c.hidden = c.wire == Wire::kCopy && !c.prequantized ? 8 : kScaleBlock;
    }
    if (wide || many) {
      c.x.num_rows = ranks * c.x.num_pairs() / c.x.alignment * c.x.alignment;
      c.x.batched = 0;
    }
    if (long_rows) {
      c.x.num_tokens = cases_.pick(1, 4);
      c.hidden *= cases_.pick(2, 12);
    }
    constexpr int kPercent[] = {0, 20, 80};
    c.wire_percent = kPercent[cases_.pick(0, 2)];
    cases_.refill(c);
    o.is_planned = cases_.chance(0.5);
    return o;
  }

 private:
  std::mt19937 rng_;
  RandomCases cases_;
};

void check(const Dispatch& o, size_t i) {
  const int before = failures;
  const Exchange& x = o.c.x;
  for (int r = 0; r < x.num_ranks; ++r) {
    if (o.is_planned) check_plan(x, o.plan, r, o.a[r].plan);
    check_dispatch(o.c, o.plan, r, o.a[r].rows, o.a[r].row_scales, o.a[r].row_scalars);
  }
  if (failures == before) return;
  std::printf(
      "  dispatch %zu: R=%d E=%d T=%d K=%d rows=%d A=%d batched=%d H=%d type=%d wire=%d pre=%d "
      "weights=%d blocks=%d wire_percent=%d planned=%d\n",
      i, x.num_ranks, x.num_experts, x.num_tokens, x.top_k, x.num_rows, x.alignment, x.batched,
      o.c.hidden, int(o.c.type), int(o.c.wire), o.c.prequantized, o.c.weights, o.c.num_sms,
      o.c.wire_percent, o.is_planned);
}

void dispatches_in_a_row(uint64_t seed, int ranks) {
  DispatchWorld w(Series(seed).next(ranks, kDispatches), seed, kForever);
  for (int r = 0; r < ranks; ++r) {
    for (size_t i = 0; i < w.dispatches.size(); ++i) w.issue(i, r);
  }
  w.run();
  for (size_t i = 0; i < w.dispatches.size(); ++i) check(w.dispatches[i], i);
  for (const FaultRecord& f : w.group.records) check_no_fault(f);
}

// Nothing but the plans' own protocol keeps a rank from running ahead.
void plans_in_a_row(uint64_t seed, int ranks) {
  std::vector<Dispatch> all = Series(seed).next(ranks, kPlans);
  for (Dispatch& o : all) o.is_planned = true;
  DispatchWorld w(all, seed, kForever);
  for (int r = 0; r < ranks; ++r) {
    for (size_t i = 0; i < w.dispatches.size(); ++i) w.issue_plan(i, r);
  }
  w.run();
  for (const Dispatch& o : w.dispatches) {
    for (int r = 0; r < ranks; ++r) check_plan(o.c.x, o.plan, r, o.a[r].plan);
  }
  for (const FaultRecord& f : w.group.records) check_no_fault(f);
}

// One rank's blocks that only work locally begin when everybody else has ended: peers do not wait
// for them.
void local_blocks_are_late(uint64_t seed, int ranks) {
  Dispatch o = Series(seed).next_dispatch(ranks);
  o.is_planned = false;  // whose blocks have to meet
  DispatchWorld w({o}, seed, kForever);
  Case& c = w.dispatches[0].c;
  c.num_sms = std::max(2, c.num_sms);
  c.wire_percent = std::max(20, c.wire_percent);
  w.group.machine.crowd(seed % ranks, split_roles(c.num_sms, ranks, c.wire_percent).wire);
  for (int r = 0; r < ranks; ++r) w.issue(0, r);
  w.run();
  check(w.dispatches[0], 0);
}

void run_case(uint64_t seed, int ranks) {
  dispatches_in_a_row(seed, ranks);
  plans_in_a_row(seed, ranks);
  if (ranks > 1) local_blocks_are_late(seed, ranks);
}

DispatchWorld failing_world(uint64_t seed, int ranks) {
  return DispatchWorld({Series(seed).next_dispatch(ranks)}, seed, kShort);
}

// One rank's error, which the others, who cannot go on without its words, hear of.
void a_choice_is_out_of_range(uint64_t seed, int ranks, int rank) {
  Dispatch o = Series(seed).next_dispatch(ranks);
  o.is_planned = true;
  DispatchWorld w({o}, seed, kShort);
  w.mark(kMark);
  w.dispatches[0].a[rank].topk_idx[o.c.x.num_pairs() / 2] = o.c.x.num_experts;
  for (int r = 0; r < ranks; ++r) w.issue(0, r);
  w.run();
  for (int r = 0; r < ranks; ++r) {
    EXPECT(w.group.records[r].fault == uint32_t(r == rank ? Fault::kRouting : Fault::kPeer));
    EXPECT(w.is_plan_poisoned(r) && w.is_poisoned(r));
  }
}

// A rank that takes an operation for another one, a plan or a dispatch, is found by who hears of it
// first.
void a_rank_is_mistaken(uint64_t seed, int ranks, int rank, bool is_plan) {
  Dispatch o = Series(seed).next_dispatch(ranks);
  o.is_planned = is_plan;
  DispatchWorld w({o}, seed, kShort);
  w.mistaken = rank;
  w.mark(kMark);
  for (int r = 0; r < ranks; ++r) is_plan ? w.issue_plan(0, r) : w.issue_dispatch(0, r);
  w.run();
  bool found = false;
  for (int r = 0; r < ranks; ++r) {
    found |= w.group.records[r].fault == uint32_t(Fault::kMismatch);
    EXPECT(w.group.records[r].fault != uint32_t(Fault::kTimeout));
    EXPECT(is_plan ? w.is_plan_poisoned(r) : w.is_poisoned(r));
  }
  EXPECT(found);
}

int run_all_faults(int count, int seed, const std::vector<int>& groups) {
  for (int i = 0; i < count; ++i) {
    const int ranks = groups[i % groups.size()], rank = i / int(groups.size()) % ranks;
    a_choice_is_out_of_range(seed * 1000003ull + i, ranks, rank);
    for (bool is_plan : {true, false}) {
      a_rank_is_mistaken(seed * 1000003ull + i, ranks, rank, is_plan);
    }
  }
  return run_faults(count, seed, groups, failing_world);
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  return jax_ep::run_large(argc, argv, jax_ep::run_case, jax_ep::run_all_faults);
}
