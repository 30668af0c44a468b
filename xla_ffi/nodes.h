// SPDX-License-Identifier: Apache-2.0
// Groups that span nodes: their place in NVSHMEM's arena, and the launches of their handlers.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "../csrc/runtime/nodes.h"

namespace jax_ep {

// What a group that spans nodes has of the arena, at the same offset on all ranks.
struct Piece {
  uint64_t address;  // on this rank
  int node_ranks;
  std::vector<int> elements;  // NVSHMEM's rank of each rank of the group
  RingSize rings;
  SlotSize slots;
};

constexpr int kPieceFields = 2 + kRingFields;

// Where what `num_ranks` ranks have behind their control block lies: slots, outboxes, rings; and
// the rings.
RingLayout rings_of(int num_ranks, int node_ranks, const RingSize& rings, const SlotSize& slots,
                    Field* fields = nullptr);

// Where the ranks of this process's node have the piece; `devices` as Group takes them. Throws
// std::runtime_error if a rank of the node is out of reach.
Nodes nodes_in(const Piece& piece, const std::vector<int>& devices);

}  // namespace jax_ep
