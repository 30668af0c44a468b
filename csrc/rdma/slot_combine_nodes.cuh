// SPDX-License-Identifier: Apache-2.0
// combine of a small batch in a group that spans nodes (kernels/slot_combine.cuh): a partial of a
// token of another node goes there by one put, whose signal is the token's flag; the source adds
// those of each node and rounds, then adds the nodes'.
#pragma once
#include "../device/kernel.cuh"
#include "../kernels/slot_combine.cuh"
#include "launch.h"
#include "slot_op_nodes.cuh"
#include "variants.h"

namespace jax_ep {

template <typename Transport>
class NodeCombineOp : public NodeSlotOp<Transport> {
  using Base = NodeSlotOp<Transport>;

 public:
  using Base::Base;

  // By one warp: no put goes to every rank, so greetings of other nodes go by themselves.
  __device__ void greet() const {
    Base::greet();
    this->greet_other_nodes();
  }

  // By the data warps: partials of up to kSlotGroup of the block's peers' tokens, from the
  // `first`-th on, to ranks of other nodes.
  __device__ void put_partials(const SlotCombineParams& p, const SlotCombineSizes& sizes,
                               const SlotRow& lie, const Share& share, int first) const {
    const int bytes = lie.bytes + lie.scales * int(sizeof(float));
    data_sync();  // all tasks of these tokens have been stored
    for (int n = threadIdx.x / 32; n < min_int(kSlotGroup, share.peers - first); n += kDataWarps) {
      const Token token = share.peer(sizes.by_tokens, first + n);
      const size_t number = token.of_group(share.T);
      if (this->op.reaches(token.source) || p.token_rows[number * p.exchange.top_k] < 0) continue;
      const Inbox partials = this->outbox(token.source);
      this->put(token.source, partials, partials.slot(token.t), bytes, partials.flag(token.t));
    }
  }
};

template <typename T, typename Transport>
__global__ void __launch_bounds__(kSlotThreads, 1)
    node_slot_combine(const __grid_constant__ WithTransport<SlotCombineParams, Transport> p,
                      const __grid_constant__ SlotCombineSizes sizes) {
  slot_combine_body<T, NodeCombineOp<Transport>>(p, sizes, p.transport);
}

template <typename Transport>
cudaError_t launch_slot_combine_over(const SlotCombineParams& params, const Transport& transport,
                                     Element y, const Launch& how) {
  const WithTransport<SlotCombineParams, Transport> p{params, transport};
  const Exchange& e = params.exchange;
  const int blocks = min_int(how.num_sms, (e.num_ranks - 1) * e.num_tokens);
  return for_combine_variant(y, [&](auto type) {
    using T = decltype(type);
    const SlotCombineSizes sizes(e, blocks, params.hidden * int(sizeof(T)) / int(sizeof(Vec)));
    return launch_kernel(node_slot_combine<T, Transport>, blocks, kSlotThreads, 0, how.stream, p,
                         sizes);
  });
}

template <typename Transport>
cudaError_t load_slot_combine_over() {
  cudaFuncAttributes attributes;
  return for_each_combine_variant([&](auto type) {
    const auto kernel = &node_slot_combine<decltype(type), Transport>;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  });
}

}  // namespace jax_ep
