// SPDX-License-Identifier: Apache-2.0
// What a group that spans nodes has besides its ranks: N nodes of L, control blocks and rings in
// NVSHMEM's arena, and the kernels between nodes.
#pragma once
#include <vector>

#include "../rdma/library.h"

namespace jax_ep {

struct Nodes {
  int node_ranks;              // L: rank n * L + l is the l-th of node n
  RingLayout at;               // offsets from the start of a control block, `total` bytes in all
  RankElements elements;       // of NVSHMEM
  std::vector<char*> control;  // [R]: as this process addresses it; null on other nodes
  const rdma::Table* library;
};

}  // namespace jax_ep
