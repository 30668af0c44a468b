// SPDX-License-Identifier: Apache-2.0
// The kernel between nodes and its launcher, for a host compiler.
#include "../../rdma/slot_combine_nodes.cuh"
#include "network.h"

namespace jax_ep {

cudaError_t launch_slot_combine_between_nodes(const SlotCombineParams& p,
                                              const emulation::EmulatedTransport& transport,
                                              Element y, const Launch& how) {
  return launch_slot_combine_over(p, transport, y, how);
}

}  // namespace jax_ep
