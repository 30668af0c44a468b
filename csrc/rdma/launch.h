// SPDX-License-Identifier: Apache-2.0
// Arguments and launchers of the kernels between nodes. The rank's control block and rings are in
// NVSHMEM's heap, laid out alike on all ranks of the group; `Call::peers` names its node.
#pragma once
#include "../kernels/launch.h"
#include "layout.h"

namespace jax_ep {

// Before each plan, whose kernel follows on the stream.
struct NodeRouting {
  Call call;                // Operation::kRouting
  uint32_t plan_signature;  // of the plan
  Exchange exchange;
  const int32_t* topk_idx;  // [T, K]
  RingLayout at;
};

struct NodeDispatch {
  DispatchParams dispatch;
  RingLayout at;
  MessageShape shape;       // from dispatch_message
  NodeShares percent = {};  // of blocks
};

struct NodeCombine {
  CombineParams combine;  // without `partials`
  RingLayout at;
  MessageShape shape;       // from combine_message
  NodeShares percent = {};  // of blocks
};

// What a kernel takes: one of these, and the network.
template <typename Params, typename Transport>
struct WithTransport : Params {
  Transport transport;
};

// Which of NVSHMEM's processing elements each rank of the group is.
struct RankElements {
  int16_t element[kMaxRanks];
};

// The launchers of libjax_ep_rdma.so. `how.num_sms` is raised to the least that has all roles. A
// combine's partials travel in y's type.
cudaError_t load_node_kernels();
cudaError_t load_node_slot_dispatch();
cudaError_t load_node_slot_combine();
cudaError_t launch_node_routing(const NodeRouting& p, const RankElements& e, const Launch& how);
cudaError_t launch_node_dispatch(const NodeDispatch& p, const RankElements& e, Element x, Wire wire,
                                 const Launch& how);
cudaError_t launch_node_combine(const NodeCombine& p, const RankElements& e, Element y,
                                const Launch& how);
cudaError_t launch_node_slot_dispatch(const SlotDispatchParams& p, const RankElements& e, Element x,
                                      Wire wire, const Launch& how);
cudaError_t launch_node_slot_combine(const SlotCombineParams& p, const RankElements& e, Element y,
                                     const Launch& how);

}  // namespace jax_ep
