// SPDX-License-Identifier: Apache-2.0
// The kernel between nodes and its launcher, for a host compiler.
#include "../../rdma/slot_dispatch_nodes.cuh"
#include "network.h"

namespace jax_ep {

cudaError_t launch_slot_dispatch_between_nodes(const SlotDispatchParams& p,
                                               const emulation::EmulatedTransport& transport,
                                               Element x, Wire wire, const Launch& how) {
  return launch_slot_dispatch_over(p, transport, x, wire, how);
}

}  // namespace jax_ep
