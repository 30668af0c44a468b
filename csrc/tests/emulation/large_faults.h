// SPDX-License-Identifier: Apache-2.0
// What becomes of an operation of the large path when a rank stays away, or flags: of a world with
// one operation, for which ranks wait a short time.
#pragma once
#include "../expect.h"
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

}  // namespace jax_ep
