// SPDX-License-Identifier: Apache-2.0
// combine between nodes: a partial sum crosses the network once for each node that has a token's
// rows.
//
//   partial blocks of rank (d, j), per (chunk, source (n, l)), l not j:
//     await room in the ring to (d, l)                <-- emptied --   (d, l)
//     my rows of each token, added, rounded  -> partials[j] of (d, l)
//     filled                                                     -->   (d, l)
//   gateway blocks of rank (d, l), per (chunk, source (n, l)), n not d:
//     await the L - 1 partials; await room in the ring to (n, l)
//                                                     <-- credit ---   (n, l)
//     each token's and my own, added in rank order, rounded  -> send slot, packed
//     emptied                                                    -->   each (d, j)
//   put blocks: packed messages, put, signal                     -->   (n, l)
//   reduce blocks of rank (n, l), per chunk:
//     await the N - 1 messages, and the L - 1 partials of my node
//     each token's: my node's as a gateway adds it, the nodes' in order, rounded once  -> out
//     emptied, credit                                            -->   each (n, j), each (d, l)
//
// What a rank or a node adds to its own tokens stays in registers, rounded as if it had travelled.
// Only memory of the library is written by others, so nothing is lent. One message for each chunk
// and other node, even if it has no rows. Sums are of the same bits whatever the number of blocks.
// Partials travel in y's type. Blocks that have done their part join those that reduce.
#pragma once
#include "combine_stages.cuh"

namespace jax_ep {

template <typename T, typename Transport>
__device__ void combine_between_nodes(const WithTransport<NodeCombine, Transport>& q) {
  __shared__ OwnRows own;
  const CombineParams& p = q.combine;
  const Op op(p.call);
  const Rings rings(op, q.at);
  const Stages<T, Transport> stages(q, op, rings, own);
  const CombineRoles roles =
      split_combine_roles(gridDim.x, op.R, rings.L, p.exchange.top_k, q.percent);
  if (!op.began_broken()) {
    const int gateway = blockIdx.x - roles.partial, put = gateway - roles.gateway;
    const int reduce = put - roles.put;
    bool good = true;
    if (gateway < 0) {
      good = stages.make_partials(blockIdx.x, roles.partial);
    } else if (put < 0) {
      good = stages.sum_node(gateway, roles.gateway);
    } else if (reduce < 0) {
      good = put_messages(op, rings, q.transport, q.shape, stages.chunks(), put, roles.put,
                          [&](int i) { return rings.other(i); });
      good = __syncthreads_and(good);
    }
    if (good) stages.sum_nodes(reduce < 0 ? roles.reduce : reduce, roles.reduce);
  }
  op.leave(
      [&] {
        tell_other_nodes(op, q.transport);
        const size_t tokens = p.exchange.num_tokens;
        if (p.y != nullptr) poison_bytes(p.out, tokens * p.hidden * sizeof(T));
        if (p.row_scalars != nullptr) {
          poison_bytes(p.scalars, tokens * p.exchange.top_k * sizeof(float));
        }
      },
      [&] { rings.advance(stages.chunks(), stages.chunks()); });
}

}  // namespace jax_ep
