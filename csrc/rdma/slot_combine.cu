// SPDX-License-Identifier: Apache-2.0
// combine of a small batch between nodes, over NVSHMEM.
#include <nvshmem_host.h>
// After it:
#include <device/nvshmem_defines.h>
#include <device/nvshmemx_defines.h>

#include "nvshmem_transport.cuh"
#include "slot_combine_nodes.cuh"

namespace jax_ep {

cudaError_t load_node_slot_combine() { return load_slot_combine_over<Nvshmem>(); }

cudaError_t launch_node_slot_combine(const SlotCombineParams& p, const RankElements& e, Element y,
                                     const Launch& how) {
  return launch_slot_combine_over(p, transport_of(p.call, e), y, how);
}

}  // namespace jax_ep
