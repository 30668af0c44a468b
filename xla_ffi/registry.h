// SPDX-License-Identifier: Apache-2.0
// The groups of this process by signature: mesh axes, their sizes, and the axes of the group. Entries
// live as long as the process: an executable, or a CUDA graph inside it, may come back to them.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "../csrc/runtime/group.h"

namespace jax_ep {

struct Member {
  Group* group = nullptr;
  int rank = -1;
};

// Make or restart the groups of one signature: one for each list of devices. Throws
// std::runtime_error.
void initialize_groups(const std::string& signature, const std::vector<std::vector<int>>& devices,
                       double timeout_s);

// Take all groups out of use.
void finalize_groups();

// The group that `device` belongs to under `signature`; `group` is null if there is none.
Member find_member(std::string_view signature, int device);

// What went wrong first in any group; empty if nothing did.
std::string describe_faults();

// One line for each group: signature, devices, bytes of control blocks.
std::vector<std::string> describe_groups();

}  // namespace jax_ep
