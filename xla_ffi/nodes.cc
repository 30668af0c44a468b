// SPDX-License-Identifier: Apache-2.0
#include "nodes.h"

#include <algorithm>
#include <stdexcept>

#include "rdma_library.h"

namespace jax_ep {

RingLayout rings_of(int num_ranks, int node_ranks, const RingSize& rings, const SlotSize& slots,
                    Field* fields) {
  const size_t at = control_layout(num_ranks).total, bytes = slot_bytes(num_ranks, slots);
  const size_t outboxes = outbox_bytes(num_ranks, slots);
  if (fields != nullptr) {
    *fields++ = {"slots", "rank r: [kind][parity][r]", at, bytes};
    *fields++ = {"outboxes", "this rank: [parity][rank]", at + bytes, outboxes};
  }
  return ring_layout(num_ranks / node_ranks, node_ranks, rings, at + bytes + outboxes, fields);
}

Nodes nodes_in(const Piece& piece, const std::vector<int>& devices) {
  const int R = static_cast<int>(devices.size()), L = piece.node_ranks;
  if (piece.elements.size() != devices.size() || R > kMaxRanks || L < 1 || R % L != 0) {
    throw std::runtime_error("group: expected at most " + std::to_string(kMaxRanks) +
                             " ranks in nodes of one size, and an element for each, got " +
                             std::to_string(R) + " in nodes of " + std::to_string(L) + " and " +
                             std::to_string(piece.elements.size()) + " elements");
  }
  Nodes nodes{
      L, rings_of(R, L, piece.rings, piece.slots), {}, std::vector<char*>(R), &rdma_library()};
  std::copy(piece.elements.begin(), piece.elements.end(), nodes.elements.element);
  const auto here = std::find_if(devices.begin(), devices.end(), [](int d) { return d >= 0; });
  const int me = static_cast<int>(here - devices.begin());
  for (int r = me / L * L; r < std::min(me / L * L + L, R); ++r) {
    void* mine = reinterpret_cast<void*>(piece.address);
    nodes.control[r] = r == me ? static_cast<char*>(mine)
                               : static_cast<char*>(rdma_library().peer(mine, piece.elements[r]));
    if (nodes.control[r] == nullptr) {
      throw std::runtime_error("expected NVLink between all GPUs of a node, got rank " +
                               std::to_string(r) + " that rank " + std::to_string(me) +
                               " reaches by puts only: Config(gpus_per_node=1) makes a node of "
                               "each GPU");
    }
  }
  return nodes;
}

}  // namespace jax_ep
