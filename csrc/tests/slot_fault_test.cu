// SPDX-License-Identifier: Apache-2.0
// What happens when something goes wrong with small batches, whole or in halves: a peer is absent,
// late, dead between its start and its done, or runs something else; words that it sent are
// missing; starts and dones do not take turns. Every case must end in bounded time, name who
// failed, write nothing that it may not, and leave a group that works after a reset. Each runs with
// plain launches, then with replayed graphs.
//
//   slot_fault_test [--devices 2]
#include <climits>
#include <thread>

#include "faults.h"

namespace jax_ep {
namespace {

constexpr SlotKind kKinds[] = {SlotKind::kDispatch, SlotKind::kCombine};
const Program kAll = kSlots + kHalves;

bool works(Scene& s) { return s.works(kSlots) && s.works(kHalves); }

// Rank 0 runs alone what a dead peer never joins, then its peer comes.
struct Alone {
  Program program;
  Operation waits;  // the operation of rank 0 that gives up
  Operation late;   // the first operation of the peer, which finds the group broken
  bool dispatches;
};
const Alone kAlone[] = {
    {kSlotDispatch, Operation::kDispatch, Operation::kDispatch, true},
    {kSlotCombine, Operation::kCombine, Operation::kCombine, false},
    {kStart + kDone, Operation::kDispatchDone, Operation::kDispatchStart, true},
    {kCombineStart + kCombineDone, Operation::kCombineDone, Operation::kCombineStart, false},
};

void a_peer_that_comes_too_late(Scene& s) {
  for (const Alone& one : kAlone) {
    EXPECT(works(s));
    s.mark_all();
    const double took = s.run(one.program, kNothing);
    EXPECT(took > 0.9 * kTimeout && took < 2 * kTimeout);
    EXPECT(is(s.fault(0), Fault::kTimeout, one.waits, 0, 1));
    EXPECT(says(s, "rank 0 gave up on rank 1"));
    EXPECT(one.dispatches ? s.rows_are_nan(0) && s.plan_is_none(0) : s.out_is_nan(0));
    EXPECT(s.run(Program(60, Step::kSlotCombine), kNothing) < kAtOnce);
    EXPECT(s.out_is_nan(0));
    s.mark(0);
    const Bytes before[] = {s.slots_of(0, kKinds[0]), s.slots_of(0, kKinds[1])};
    EXPECT(s.run(kNothing, one.program) < kAtOnce);
    EXPECT(is(s.fault(1), Fault::kPeer, one.late, 1, 0));
    EXPECT(s.rows_are(0, kMark) && s.out_is(0, kMark));
    EXPECT(one.dispatches ? s.rows_are_nan(1) : s.out_is_nan(1));
    for (SlotKind kind : kKinds) EXPECT(s.slots_of(0, kind) == before[size_t(kind)]);
    s.restart();
  }
}

// It may push, as the slots are not lent; what it delivers is right, or nothing.
void a_late_peer_that_was_not_told(Scene& s) {
  for (const Program& one : {kSlotDispatch, kStart + kDone}) {
    EXPECT(works(s));
    s.run(one, kNothing);
    s.write(1, s.broken(), 0);
    s.mark(0);
    s.poison(1);
    EXPECT(s.run(kNothing, one) < 2 * kTimeout);
    EXPECT(s.rows_are(0, kMark));
    EXPECT(s.rows_are_right(1) || s.rows_are_nan(1));
    s.restart();
  }
}

// Each word that a done needs is awaited: it gives up, and says on what, if only that one is not
// there.
void a_peer_whose_words_are_missing(Scene& s) {
  const SlotLayout lie = slot_layout(s.slots);
  const struct {
    SlotKind kind;
    size_t offset, bytes;
    Phase phase;
  } missing[] = {
      {SlotKind::kDispatch, 0, sizeof(uint64_t), Phase::kReady},
      {SlotKind::kDispatch, lie.flags, lie.words - lie.flags, Phase::kRows},
      {SlotKind::kDispatch, lie.words, lie.rows - lie.words, Phase::kRouting},
      {SlotKind::kCombine, 0, sizeof(uint64_t), Phase::kReady},
      {SlotKind::kCombine, lie.flags, lie.words - lie.flags, Phase::kRows},
  };
  for (const auto& one : missing) {
    const bool is_dispatch = one.kind == SlotKind::kDispatch;
    const Program start = is_dispatch ? kStart : kCombineStart,
                  done = is_dispatch ? kDone : kCombineDone;
    EXPECT(works(s));
    s.mark(0);
    EXPECT(s.run(start, start) < kAtOnce);
    s.erase(0, s.last_from_rank_1(one.kind) + one.offset, one.bytes);
    EXPECT(s.run(done, kNothing) < 2 * kTimeout);
    EXPECT(is(s.fault(0), Fault::kTimeout,
              is_dispatch ? Operation::kDispatchDone : Operation::kCombineDone, 0, 1));
    EXPECT(s.fault(0).phase == static_cast<uint32_t>(one.phase));
    EXPECT(is_dispatch ? s.rows_are_nan(0) : s.out_is_nan(0));
    s.restart();
  }
}

// A start that nobody joins returns; its done waits for the peer's.
void a_start_returns_and_its_done_waits(Scene& s) {
  EXPECT(works(s));
  s.poison_all();
  EXPECT(s.run(kStart, kNothing) < kAtOnce);
  EXPECT(s.group.describe_fault().empty());
  EXPECT(s.rows_are_nan(0));
  if (s.replayed) {
    s.prepare(0, kDone);
    s.prepare(1, kStart);
  }
  const double waited = s.seconds([&] {
    s.issue(0, kDone);
    std::this_thread::sleep_for(std::chrono::duration<double>(kTimeout / 4));
    s.issue(1, kStart);
  });
  EXPECT(waited > kTimeout / 4 && waited < kTimeout);
  EXPECT(s.run(kNothing, kDone) < kAtOnce);
  EXPECT(s.run_all(kCombineStart) < kAtOnce);
  EXPECT(s.run_all(kCombineDone) < kAtOnce);
  EXPECT(s.all_right());
}

// One of each kind may be in flight, in any order, and a done may run again.
void one_in_flight_of_each_kind(Scene& s) {
  EXPECT(works(s));
  for (const Program& order :
       {kStart + kCombineStart + kCombineDone + kDone,
        kStart + kCombineStart + kDone + kCombineDone,
        kCombineStart + kStart + kCombineDone + kDone, kStart + kSlotCombine + kDone + kDone,
        kCombineStart + kSlotDispatch + kCombineDone + kCombineDone}) {
    s.poison_all();
    EXPECT(s.run_all(order + order) < kAtOnce);
    EXPECT(s.all_right());
  }
}

void halves_that_do_not_take_turns(Scene& s) {
  const std::string before_done = "began before the done of start", no_start = "the last one was 0";
  const struct {
    Program program;
    Operation guilty;
    std::string what;
  } wrong[] = {
      {kStart + kStart, Operation::kDispatchStart, before_done},
      {kStart + kSlotDispatch, Operation::kDispatch, before_done},
      {kStart + kDone + kStart + kStart, Operation::kDispatchStart, before_done},
      {kDone, Operation::kDispatchDone, no_start},
      {kCombineStart + kCombineStart, Operation::kCombineStart, before_done},
      {kCombineStart + kSlotCombine, Operation::kCombine, before_done},
      {kCombineDone, Operation::kCombineDone, no_start},
  };
  for (const auto& w : wrong) {
    EXPECT(works(s));
    s.restart();  // no start so far
    s.mark_all();
    EXPECT(s.run_all(w.program) < kAtOnce);
    const int first = s.fault(0).fault == uint32_t(Fault::kInFlight) ? 0 : 1;
    EXPECT(is(s.fault(first), Fault::kInFlight, w.guilty, first, first));
    EXPECT(says(s, w.what));
    s.restart();
  }
}

// The others are told, and deliver what is right or nothing.
void one_rank_whose_halves_do_not_take_turns(Scene& s) {
  EXPECT(works(s));
  s.mark(0);
  s.poison(1);
  EXPECT(s.run(kStart + kStart + kDone, kStart + kDone) < kAtOnce);
  EXPECT(is(s.fault(0), Fault::kInFlight, Operation::kDispatchStart, 0, 0));
  EXPECT(s.rows_are_nan(0));
  EXPECT(s.rows_are_right(1) || s.rows_are_nan(1));
  EXPECT(s.run(kNothing, kStart) < kAtOnce);
  EXPECT(s.fault(1).fault == uint32_t(Fault::kPeer) && s.fault(1).awaited == 0);
}

void the_done_of_another_start(Scene& s) {
  EXPECT(works(s));
  s.restart();
  EXPECT(s.run_all(kStart + kDone) < kAtOnce);
  const int first = s.ticket();
  EXPECT(s.run_all(kStart) < kAtOnce);
  EXPECT(s.ticket() == first + 1);
  s.set_ticket(first);
  s.mark(0);
  EXPECT(s.run_all(kDone) < kAtOnce);
  EXPECT(is(s.fault(0), Fault::kInFlight, Operation::kDispatchDone, 0, 0));
  EXPECT(says(s, "rank 0 wants start 1, but the last one was 2"));
  EXPECT(s.rows_are_nan(0));
}

void a_peer_that_dies_between_start_and_done(Scene& s) {
  EXPECT(works(s));
  s.poison_all();
  EXPECT(s.run_all(kStart) < kAtOnce);
  EXPECT(s.run(kDone, kNothing) < kAtOnce);  // what it had sent is enough
  EXPECT(s.rows_are_right(0));
  s.mark(0);
  EXPECT(s.run(kCombineStart + kCombineDone, kNothing) < 2 * kTimeout);
  EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kCombineDone, 0, 1));
  EXPECT(s.out_is_nan(0));
  // Should it come back, its done delivers nothing.
  s.mark(1);
  EXPECT(s.run(kNothing, kDone) < kAtOnce);
  EXPECT(is(s.fault(1), Fault::kPeer, Operation::kDispatchDone, 1, 0));
  EXPECT(s.rows_are_nan(1));
}

template <typename P>
void another_shape_of(Scene& s, const Program& program, Operation operation) {
  EXPECT(works(s));
  s.mark_all();
  EXPECT(run_in_another_shape<P>(s, program) < kAtOnce);
  EXPECT(is_mismatch(s, operation, operation));
  constexpr bool dispatches = std::is_same_v<P, SlotDispatchParams>;
  for (int r = 0; r < 2; ++r) {
    const int part = r == 1 ? 2 : 1;  // rank 1's rows are half as wide, in the same buffers
    EXPECT(dispatches ? s.rows_are_nan(r, part) : s.out_is_nan(r, part));
  }
  s.restart();
}

void another_shape_on_one_rank(Scene& s) {
  another_shape_of<SlotDispatchParams>(s, kSlotDispatch, Operation::kDispatch);
  another_shape_of<SlotDispatchParams>(s, kStart + kDone, Operation::kDispatchDone);
  another_shape_of<SlotCombineParams>(s, kSlotCombine, Operation::kCombine);
  another_shape_of<SlotCombineParams>(s, kCombineStart + kCombineDone, Operation::kCombineDone);
}

// Kinds and paths have flags of their own, so that nothing tells before the timeout.
void another_operation_on_one_rank(Scene& s) {
  const std::pair<Program, Program> different[] = {{kSlotDispatch, kSlotCombine},
                                                   {kSlotDispatch, kPlan},
                                                   {kDispatch, kSlotDispatch},
                                                   {kSlotCombine, kCombine},
                                                   {kStart + kDone, kCombineStart + kCombineDone}};
  for (const auto& [of_rank_0, of_rank_1] : different) {
    EXPECT(s.works());
    EXPECT(works(s));
    s.poison_all();
    EXPECT(s.run(of_rank_0, of_rank_1) < 2 * kTimeout);
    EXPECT(says(s, "gave up on rank"));
    for (int r = 0; r < 2; ++r) {
      EXPECT(s.fault(r).fault != 0);
      EXPECT(s.rows_are_nan(r) && s.out_is_nan(r));
    }
    s.restart();
  }
}

// Replayed, the graphs are those of `works`: only what the device reads has changed.
void routing_out_of_range(Scene& s) {
  const int last = s.c.x.num_pairs() - 1;
  for (int bad : {8, -2, 1 << 16, (1 << 16) + 3, INT_MIN}) {  // 16 bits of some are good
    for (const Program& exchange : {kSlots, kHalves}) {
      EXPECT(works(s));
      s.mark_all();
      const Bytes before = s.slots_of(0, SlotKind::kCombine);
      s.set_choice(1, bad == 8 ? last : 5, bad);
      EXPECT(s.run_all(exchange) < kAtOnce);
      const bool whole = exchange.size() == 2;
      EXPECT(is(s.fault(1), Fault::kRouting,
                whole ? Operation::kDispatch : Operation::kDispatchStart, 1, 1));
      EXPECT(s.fault(0).fault == uint32_t(Fault::kPeer) && s.fault(0).awaited == 1);
      EXPECT(says(s, "topk_idx " + std::to_string(bad) + ", expected -1 to 7"));
      for (int r = 0; r < 2; ++r) EXPECT(s.rows_are_nan(r) && s.out_is_nan(r));
      EXPECT(s.slots_of(0, SlotKind::kCombine) == before);  // nothing was combined
      s.restart();
    }
  }
}

void sixty_operations_without_a_peer(Scene& s) {
  const Program all = operations(60, kAll);
  for (int generation = 0; generation < 2; ++generation) {  // old graphs serve the new one
    s.poison_all();
    EXPECT(s.run_all(all) < kAtOnce);
    EXPECT(s.all_right());
    s.mark_all();
    EXPECT(s.run(all, kNothing) < 2 * kTimeout);
    EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kDispatch, 0, 1));
    EXPECT(s.rows_are_nan(0) && s.out_is_nan(0));
    EXPECT(s.rows_are(1, kMark) && s.out_is(1, kMark));
    s.mark(0);
    EXPECT(s.run(kNothing, all) < kAtOnce);
    EXPECT(is(s.fault(1), Fault::kPeer, Operation::kDispatch, 1, 0));
    EXPECT(s.rows_are(0, kMark) && s.out_is(0, kMark));
    EXPECT(s.rows_are_nan(1) && s.out_is_nan(1));
    s.restart();
  }
}

void sixty_operations_whose_peer_dies(Scene& s) {
  const Operation failing[] = {
      Operation::kDispatch,      // nothing of this round was done
      Operation::kCombine,       // only the dispatch
      Operation::kDispatchDone,  // a start does not wait
      Operation::kCombineDone,   // started: enough for rank 0's done
      Operation::kCombineDone,  Operation::kDispatch,
  };
  for (int after = 30; after < 36; ++after) {
    EXPECT(works(s));
    s.mark(0);
    s.poison(1);
    EXPECT(s.run(operations(60, kAll), operations(after, kAll)) < 2 * kTimeout);
    EXPECT(is(s.fault(0), Fault::kTimeout, failing[after % 6], 0, 1));
    EXPECT(says(s, "rank 0 gave up on rank 1"));
    EXPECT(s.rows_are_nan(0) && s.out_is_nan(0));
    EXPECT(s.rows_are_right(1) && s.out_is_right(1));  // what came before is whole
    s.restart();
  }
}

// Two streams of one rank, which nothing orders: the second operation finds the first one there.
void two_operations_at_once(Scene& s) {
  EXPECT(works(s));
  s.mark(0);
  if (s.replayed) s.prepare(0, kSlotCombine);
  EXPECT(s.seconds([&] {
    EXPECT(s.issue_until_it_runs(0, kSlotDispatch));
    s.issue_aside(0, kSlotCombine);
  }) < kAtOnce);
  EXPECT(is(s.fault(0), Fault::kBusy, Operation::kCombine, 0, 0));
  EXPECT(says(s, "while another operation of the group was running"));
  EXPECT(s.rows_are_nan(0) || s.out_is_nan(0));
}

constexpr Named kCases[] = {
    {"a peer that comes too late", a_peer_that_comes_too_late},
    {"a late peer that was not told", a_late_peer_that_was_not_told},
    {"a peer whose words are missing", a_peer_whose_words_are_missing},
    {"a start returns and its done waits", a_start_returns_and_its_done_waits},
    {"one in flight of each kind", one_in_flight_of_each_kind},
    {"halves that do not take turns", halves_that_do_not_take_turns},
    {"one rank whose halves do not take turns", one_rank_whose_halves_do_not_take_turns},
    {"the done of another start", the_done_of_another_start},
    {"a peer that dies between start and done", a_peer_that_dies_between_start_and_done},
    {"another shape on one rank", another_shape_on_one_rank},
    {"another operation on one rank", another_operation_on_one_rank},
    {"routing out of range", routing_out_of_range},
    {"sixty operations without a peer", sixty_operations_without_a_peer},
    {"sixty operations whose peer dies", sixty_operations_whose_peer_dies},
    {"two operations at once", two_operations_at_once},
};

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  return jax_ep::run_faults(argc, argv, jax_ep::kCases, jax_ep::kAll);
}
