// SPDX-License-Identifier: Apache-2.0
// The programs that test operations of the large path; and what becomes of one when a rank stays
// away, or flags: of a world with one operation, for which ranks wait a short time.
#pragma once
#include "../expect.h"
#include "../options.h"
#include "series.h"
#include "weak_group.h"

namespace jax_ep {

// What results are before an operation that fails, which is not what they are then.
constexpr char kMark = 0x11;

template <typename World>
void a_rank_is_absent(World w, int absent) {
  w.mark(kMark);
  const int ranks = w.group.ranks();
  for (int r = 0; r < ranks; ++r) {
    if (r != absent) w.issue(0, r);
  }
  w.run();
  bool timed_out = false;
  for (int r = 0; r < ranks; ++r) {
    if (r == absent) continue;
    const FaultRecord& f = w.group.records[r];
    if (f.fault == uint32_t(Fault::kTimeout)) {
      timed_out = true;  // of its peers' rows a rank may await those of who waits itself
      EXPECT(f.awaited == absent || f.phase == uint32_t(Phase::kRows));
    } else {
      EXPECT(f.fault == uint32_t(Fault::kPeer));
    }
    EXPECT(w.is_poisoned(r));
  }
  EXPECT(timed_out);
}

template <typename World>
void flags_do_not_come(World w, int from, int to) {
  w.mark(kMark);
  w.group.lose_flags(from, to);
  for (int r = 0; r < w.group.ranks(); ++r) w.issue(0, r);
  w.run();
  const FaultRecord& f = w.group.records[to];
  EXPECT(f.fault == uint32_t(Fault::kTimeout) && f.awaited == from);
  EXPECT(f.phase == uint32_t(Phase::kRows));
  EXPECT(w.is_poisoned(to));
}

// `make(seed, ranks)` gives a world.
template <typename Make>
int run_faults(int count, int seed, const std::vector<int>& groups, Make&& make) {
  for (int i = 0; i < count; ++i) {
    const int ranks = groups[i % groups.size()];
    const int rank = i / int(groups.size()) % ranks;
    const uint64_t s = seed * 1000003ull + i;
    a_rank_is_absent(make(s, ranks), rank);
    flags_do_not_come(make(s, ranks), rank, (rank + 1) % ranks);
  }
  std::printf("%d cases of faults, %d failures\n", count, failures);
  return failures != 0;
}

// A program: `go(seed of the case, ranks)` for groups in turn, or `faults(count, seed, groups)`;
// the exit status.
template <typename Go, typename Faults>
int run_large(int argc, char** argv, Go&& go, Faults&& faults) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  int cases = 8, seed = 1, ranks = 0;
  bool fails = false;
  const bool known = take_options(
      argc, argv,
      {{"--cases", &cases}, {"--seed", &seed}, {"--ranks", &ranks}, {"--faults", nullptr, &fails}});
  if (!known) return 2;
  std::vector<int> groups = {2, 3, 5, 1, 4};
  if (fails) groups = {2, 3};
  if (ranks > 0) groups = {ranks};
  return fails ? faults(cases, seed, groups) : run_series(cases, seed, groups, go);
}

}  // namespace jax_ep
