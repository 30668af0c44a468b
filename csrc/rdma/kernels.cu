// SPDX-License-Identifier: Apache-2.0
// The kernels between nodes over NVSHMEM.
#include <nvshmem_host.h>
// After it:
#include <device/nvshmem_defines.h>
#include <device/nvshmemx_defines.h>

#include "launch.cuh"
#include "nvshmem_transport.cuh"

namespace jax_ep {

cudaError_t load_node_kernels() { return load_kernels_over<Nvshmem>(); }

cudaError_t launch_node_routing(const NodeRouting& p, const RankElements& e, const Launch& how) {
  return launch_routing_over(p, transport_of(p.call, e), how);
}
cudaError_t launch_node_dispatch(const NodeDispatch& p, const RankElements& e, Element x, Wire wire,
                                 const Launch& how) {
  return launch_dispatch_over(p, transport_of(p.dispatch.call, e), x, wire, how);
}
cudaError_t launch_node_combine(const NodeCombine& p, const RankElements& e, Element y,
                                const Launch& how) {
  return launch_combine_over(p, transport_of(p.combine.call, e), y, how);
}

}  // namespace jax_ep
