// SPDX-License-Identifier: Apache-2.0
// Options of the test programs: `--name N` sets a number, `--name` alone a switch.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <string>

namespace jax_ep {

struct Option {
  const char* name;
  int* number = nullptr;
  bool* on = nullptr;
};

// False, and says why: an option that is not there, or a number that is missing.
inline bool take_options(int argc, char** argv, std::initializer_list<Option> options) {
  for (int i = 1; i < argc; ++i) {
    const Option* found = nullptr;
    for (const Option& option : options) {
      if (std::string(argv[i]) == option.name) found = &option;
    }
    if (found == nullptr || (found->number != nullptr && i + 1 == argc)) {
      std::fprintf(stderr, "%s: %s\n", argv[i], found ? "expected a number" : "unknown option");
      return false;
    }
    if (found->number != nullptr) {
      *found->number = std::atoi(argv[++i]);
    } else {
      *found->on = true;
    }
  }
  return true;
}

}  // namespace jax_ep
