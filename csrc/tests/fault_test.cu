// SPDX-License-Identifier: Apache-2.0
// What happens when something goes wrong on the large path: two ranks, one of which is absent,
// late, stuck, or runs something else. Every case must end in bounded time, name who failed, write
// nothing into memory that is no longer lent, and leave a group that works after a reset. Each runs
// with plain launches, then with replayed graphs.
//
//   fault_test [--devices 2]
#include <climits>

#include "faults.h"

namespace jax_ep {
namespace {

void a_peer_that_comes_too_late(Scene& s) {
  EXPECT(s.works());
  s.mark_all();
  EXPECT(s.run(kDispatch, kNothing) < 2 * kTimeout);
  EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kDispatch, 0, 1));
  EXPECT(says(s, "rank 0 gave up on rank 1"));
  EXPECT(s.rows_are_nan(0));
  // Later operations of the program return at once.
  EXPECT(s.run(Program(60, Step::kCombine), kNothing) < kAtOnce);
  EXPECT(s.out_is_nan(0));
  // The late peer finds the group broken and writes nothing.
  s.mark(0);
  EXPECT(s.run(kNothing, kDispatch) < kAtOnce);
  EXPECT(s.rows_are(0, kMark));
  EXPECT(s.rows_are_nan(1));
  EXPECT(is(s.fault(1), Fault::kPeer, Operation::kDispatch, 1, 0));
}

void a_peer_that_never_plans(Scene& s) {
  EXPECT(s.works());
  EXPECT(s.run(kPlan, kNothing) < 2 * kTimeout);
  EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kPlan, 0, 1));
  for (int counts : s.h.a.counts[0]->host()) EXPECT(counts == 0);
  EXPECT(s.plan_is_none(0));
}

// The peer's late kernel must not push even if it was not told: only the lease says so.
void a_late_peer_that_was_not_told(Scene& s) {
  EXPECT(s.works());
  s.run(kDispatch, kNothing);
  s.write(1, s.broken(), 0);
  s.mark_all();
  EXPECT(s.run(kNothing, kDispatch) < kAtOnce);
  EXPECT(is(s.fault(1), Fault::kRevoked, Operation::kDispatch, 1, 0));
  EXPECT(s.rows_are(0, kMark));
  EXPECT(s.rows_are_nan(1));
}

// A peer that took the lease and then stopped: the owner waits for it, but not for ever.
void a_peer_that_dies_while_pushing(Scene& s) {
  EXPECT(s.works());
  s.mark(0);
  const double took = s.seconds([&] {
    const uint64_t lease = s.dispatch_until_lent();
    EXPECT(lease != 0);
    s.write(0, s.lease_of_rank_1(), lease | kTaken);
  });
  EXPECT(took > 1.4 * kTimeout && took < 2 * kTimeout);
  EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kDispatch, 0, 1));
  EXPECT(s.rows_are_nan(0));
}

// The owner poisons its rows, and so gives them back, after the peer's last push and at once.
void a_peer_that_pushes_while_the_owner_gives_up(Scene& s) {
  EXPECT(s.works());
  const double took = s.seconds([&] {
    const uint64_t lease = s.dispatch_until_lent();
    EXPECT(lease != 0);
    s.write(0, s.lease_of_rank_1(), lease | kTaken);
    for (int i = 0; i < 100000 && s.read(0, s.broken()) == 0; ++i) {
    }
    s.push_mark(0);
    s.write(0, s.left_by_rank_1(), lease);
  });
  EXPECT(took > kTimeout && took < 1.4 * kTimeout);
  EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kDispatch, 0, 1));
  EXPECT(s.rows_are_nan(0));
}

void another_operation_on_one_rank(Scene& s) {
  EXPECT(s.works());
  s.mark_all();
  EXPECT(s.run(kDispatch, kCombine) < kAtOnce);  // seen at once, no need to wait
  EXPECT(is_mismatch(s, Operation::kDispatch, Operation::kCombine));
  EXPECT(s.rows_are_nan(0));
  EXPECT(s.out_is_nan(1));
}

void a_plan_against_a_dispatch(Scene& s) {
  EXPECT(s.works());
  s.mark(0);
  EXPECT(s.run(kDispatch, kPlan) < 2 * kTimeout);
  EXPECT(says(s, "gave up on rank"));
  EXPECT(s.rows_are_nan(0));
  EXPECT(s.plan_is_none(1));
}

template <typename P>
void another_shape_of(Scene& s, const Program& one, Operation operation) {
  EXPECT(s.works());
  s.mark_all();
  EXPECT(run_in_another_shape<P>(s, one) < kAtOnce);
  EXPECT(is_mismatch(s, operation, operation));
  for (int r = 0; r < 2; ++r) {
    const int part = r == 1 ? 2 : 1;  // rank 1's rows are half as wide, in the same buffers
    if (operation == Operation::kDispatch) EXPECT(s.rows_are_nan(r, part));
    if (operation == Operation::kCombine) EXPECT(s.out_is_nan(r, part));
    if (operation == Operation::kPlan) EXPECT(s.plan_is_none(r));
  }
  s.restart();
}

void another_shape_on_one_rank(Scene& s) {
  another_shape_of<PlanParams>(s, kPlan, Operation::kPlan);
  another_shape_of<DispatchParams>(s, kDispatch, Operation::kDispatch);
  another_shape_of<CombineParams>(s, kCombine, Operation::kCombine);
}

// Replayed, the graphs are those of `works`: only what the device reads has changed.
void routing_out_of_range(Scene& s) {
  const int last = s.c.x.num_pairs() - 1;
  for (int bad : {8, -2, 1 << 16, (1 << 16) + 3, INT_MIN}) {  // 16 bits of some are good
    EXPECT(s.works());
    s.mark_all();
    s.set_choice(1, bad == 8 ? last : 5, bad);
    EXPECT(s.run(kExchange, kExchange) < kAtOnce);
    EXPECT(is(s.fault(1), Fault::kRouting, Operation::kPlan, 1, 1));
    EXPECT(is(s.fault(0), Fault::kPeer, Operation::kPlan, 0, 1));
    EXPECT(says(s, "topk_idx " + std::to_string(bad) + ", expected -1 to 7"));
    for (int r = 0; r < 2; ++r) EXPECT(s.rows_are_nan(r) && s.out_is_nan(r));
    s.restart();
  }
}

void sixty_operations_without_a_peer(Scene& s) {
  const Program all = operations(60);
  for (int generation = 0; generation < 2; ++generation) {  // old graphs serve the new one
    s.poison_all();
    EXPECT(s.run(all, all) < kAtOnce);
    EXPECT(s.all_right());
    s.mark_all();
    EXPECT(s.run(all, kNothing) < 2 * kTimeout);
    EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kPlan, 0, 1));
    EXPECT(s.rows_are_nan(0) && s.out_is_nan(0));
    EXPECT(s.rows_are(1, kMark) && s.out_is(1, kMark));
    s.mark(0);
    EXPECT(s.run(kNothing, all) < kAtOnce);
    EXPECT(is(s.fault(1), Fault::kPeer, Operation::kPlan, 1, 0));
    EXPECT(s.rows_are(0, kMark) && s.out_is(0, kMark));
    EXPECT(s.rows_are_nan(1) && s.out_is_nan(1));
    s.restart();
  }
}

void sixty_operations_whose_peer_dies(Scene& s) {
  const Operation failing[] = {Operation::kPlan, Operation::kDispatch, Operation::kCombine};
  for (int after : {30, 31, 32}) {
    EXPECT(s.works());
    s.mark(0);
    s.poison(1);
    EXPECT(s.run(operations(60), operations(after)) < 2 * kTimeout);
    EXPECT(is(s.fault(0), Fault::kTimeout, failing[after % 3], 0, 1));
    EXPECT(says(s, "rank 0 gave up on rank 1"));
    EXPECT(s.rows_are_nan(0) && s.out_is_nan(0));
    EXPECT(s.rows_are_right(1) && s.out_is_right(1));  // what came before is whole
    s.restart();
  }
}

// Two streams of one rank, which nothing orders: the second operation finds the first one there.
void two_operations_at_once(Scene& s) {
  EXPECT(s.works());
  s.mark(0);
  if (s.replayed) s.prepare(0, kCombine);
  EXPECT(s.seconds([&] {
    EXPECT(s.dispatch_until_lent() != 0);
    s.issue_aside(0, kCombine);
  }) < kAtOnce);
  EXPECT(is(s.fault(0), Fault::kBusy, Operation::kCombine, 0, 0));
  EXPECT(says(s, "while another operation of the group was running"));
  EXPECT(s.rows_are_nan(0) || s.out_is_nan(0));
}

// Whether they overlap is chance: right results, or a fault.
void two_operations_at_once_with_a_peer(Scene& s) {
  for (int i = 0; i < 20; ++i) {
    EXPECT(s.works());
    s.poison_all();
    if (s.replayed) s.prepare(0, kCombine);
    EXPECT(s.seconds([&] {
      s.issue(1, kDispatch);
      s.issue(0, kDispatch);
      s.issue_aside(0, kCombine);
      s.issue(1, kCombine);
    }) < 2 * kTimeout);
    EXPECT(s.all_right() || !s.group.describe_fault().empty());
    s.restart();
  }
}

constexpr Named kCases[] = {
    {"a peer that comes too late", a_peer_that_comes_too_late},
    {"a peer that never plans", a_peer_that_never_plans},
    {"a late peer that was not told", a_late_peer_that_was_not_told},
    {"a peer that dies while pushing", a_peer_that_dies_while_pushing},
    {"a peer that pushes while the owner gives up", a_peer_that_pushes_while_the_owner_gives_up},
    {"another operation on one rank", another_operation_on_one_rank},
    {"a plan against a dispatch", a_plan_against_a_dispatch},
    {"another shape on one rank", another_shape_on_one_rank},
    {"routing out of range", routing_out_of_range},
    {"sixty operations without a peer", sixty_operations_without_a_peer},
    {"sixty operations whose peer dies", sixty_operations_whose_peer_dies},
    {"two operations at once", two_operations_at_once},
    {"two operations at once, with a peer", two_operations_at_once_with_a_peer},
};

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  return jax_ep::run_faults(argc, argv, jax_ep::kCases, jax_ep::kExchange);
}
