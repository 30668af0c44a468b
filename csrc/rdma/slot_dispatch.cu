// SPDX-License-Identifier: Apache-2.0
// dispatch of a small batch between nodes, over NVSHMEM.
#include <nvshmem_host.h>
// After it:
#include <device/nvshmem_defines.h>
#include <device/nvshmemx_defines.h>

#include "nvshmem_transport.cuh"
#include "slot_dispatch_nodes.cuh"

namespace jax_ep {

cudaError_t load_node_slot_dispatch() { return load_slot_dispatch_over<Nvshmem>(); }

cudaError_t launch_node_slot_dispatch(const SlotDispatchParams& p, const RankElements& e, Element x,
                                      Wire wire, const Launch& how) {
  return launch_slot_dispatch_over(p, transport_of(p.call, e), x, wire, how);
}

}  // namespace jax_ep
