// SPDX-License-Identifier: Apache-2.0
// Cases of a program on the emulated machine, each repeatable by its number and the seed.
#pragma once
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../expect.h"

namespace jax_ep {

// `go(seed of the case, group)` for groups in turn; the exit status.
template <typename Group, typename Go>
int run_series(int count, int seed, const std::vector<Group>& groups, Go&& go) {
  for (int i = 0; i < count; ++i) {
    const int before = failures;
    go(seed * 1000003ull + i, groups[i % groups.size()]);
    if (failures != before) std::printf("case %d of seed %d\n", i, seed);
  }
  std::printf("%d cases, %d differences\n", count, failures);
  return failures != 0;
}

}  // namespace jax_ep
