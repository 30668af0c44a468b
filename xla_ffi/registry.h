// SPDX-License-Identifier: Apache-2.0
// The groups of this process by signature: mesh axes, their sizes, and the axes of the group.
// Entries live as long as the process: an executable, or a CUDA graph inside it, may come back to
// them.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "../csrc/runtime/group.h"
#include "nodes.h"

namespace jax_ep {

struct Member {
  Group* group = nullptr;
  int rank = -1;
  unsigned long long* stats = nullptr;  // where it records timings, if it does
};

// The group called `key`, made if it is new: see Group's constructor. True while ranks of other
// processes are still to be attached.
bool make_group(const std::string& key, const std::vector<int>& devices, int slot_tokens,
                int slot_row_bytes);

// The same of a group that spans nodes and has `piece`.
bool make_node_group(const std::string& key, const std::vector<int>& devices, const Piece& piece);

// What another process needs of a rank here, as Group has it, and the same from another process.
// The caller closes the descriptors.
std::vector<Exported> export_rank(const std::string& key, int rank, uint64_t in_pool);
void attach_rank(const std::string& key, int rank, const std::vector<Exported>& exported);

// Start a generation of the group `key` and put it in use under `signature`.
void start_group(const std::string& signature, const std::string& key, uint64_t generation,
                 double timeout_s, int ranks_per_device);

// Whether a rank here, in a group in use under `signature`, failed or was told of a failure.
bool is_broken(const std::string& signature);

// Whether operations of the groups under `signature` record timings from now on.
void record_stats(const std::string& signature, bool on);

// What a rank here has recorded: `words` for each operation (layout/stats.h).
struct RankStats {
  int device, rank, words;
  std::vector<uint64_t> records;
};

// Of all ranks here, in groups in use, that record timings or have.
std::vector<RankStats> read_stats();

// Take all groups out of use.
void finalize_groups();

// The group that `device` belongs to under `signature`; `group` is null if there is none.
Member find_member(std::string_view signature, int device);

// What went wrong first in any group; empty if nothing did.
std::string describe_faults();

// One line for each group: signature, devices, bytes of control blocks.
std::vector<std::string> describe_groups();

}  // namespace jax_ep
