// SPDX-License-Identifier: Apache-2.0
// The kernels between nodes over peers' memory, compiled once for the programs that run them.
#include "../rdma/launch.cuh"
#include "../rdma/slot_combine_nodes.cuh"
#include "../rdma/slot_dispatch_nodes.cuh"
#include "rdma_transport.cuh"

namespace jax_ep {

template cudaError_t launch_routing_over(const NodeRouting&, const PeerTransport&, const Launch&);
template cudaError_t launch_dispatch_over(const NodeDispatch&, const PeerTransport&, Element, Wire,
                                          const Launch&);
template cudaError_t launch_combine_over(const NodeCombine&, const PeerTransport&, Element,
                                         const Launch&);
template cudaError_t load_kernels_over<PeerTransport>();
template cudaError_t launch_slot_dispatch_over(const SlotDispatchParams&, const PeerTransport&,
                                               Element, Wire, const Launch&);
template cudaError_t launch_slot_combine_over(const SlotCombineParams&, const PeerTransport&,
                                              Element, const Launch&);
template cudaError_t load_slot_dispatch_over<PeerTransport>();
template cudaError_t load_slot_combine_over<PeerTransport>();

}  // namespace jax_ep
