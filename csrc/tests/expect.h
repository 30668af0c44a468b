// SPDX-License-Identifier: Apache-2.0
// EXPECT(condition): say where it fails and count it; the program's exit status is the count's.
#pragma once
#include <cstdio>

namespace jax_ep {

inline int failures = 0;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
      ++::jax_ep::failures;                                                \
    }                                                                      \
  } while (0)

}  // namespace jax_ep
