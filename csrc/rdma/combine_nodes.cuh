// SPDX-License-Identifier: Apache-2.0
// combine between nodes: a partial sum crosses the network once for each node that has a token's
// rows.
//
//   partial blocks of rank (d, j), per (chunk, source (n, l)):
//     await room in the ring to (d, l)                <-- emptied --   (d, l)
//     my rows of each token, added, rounded  -> partials[j] of (d, l)
//     filled                                                     -->   (d, l)
//   gateway blocks of rank (d, l), per (chunk, source node n):
//     await the L partials; await room in the ring to (n, l)
//                                                     <-- credit ---   (n, l)
//     each token's, added in rank order, rounded  -> send slot
//     emptied                                                    -->   each (d, j)
//     put, signal                                                -->   (n, l)
//   reduce blocks of rank (n, l), per chunk:
//     await the N messages
//     each token's, added in node order, rounded once  -> out
//     credit                                                     -->   each (d, l)
//
// Everything goes this way, a rank's own rows and those of the own node too; the own node's message
// is written where a message of another node would arrive. Only memory of the library is written by
// others, so nothing is lent. One message for each chunk and pair of nodes, even if it has no rows.
// Sums are of the same bits whatever the number of blocks. Partials travel in y's type.
#pragma once
#include "combine_stages.cuh"

namespace jax_ep {

template <typename T, typename Transport>
__device__ void combine_between_nodes(const WithTransport<NodeCombine, Transport>& q) {
  const CombineParams& p = q.combine;
  const Op op(p.call);
  const Rings rings(op, q.at);
  const Stages<T, Transport> stages(q, op, rings);
  const CombineRoles roles = split_combine_roles(gridDim.x);
  if (!op.began_broken()) {
    const int gateway = blockIdx.x - roles.partial, reduce = gateway - roles.gateway;
    if (gateway < 0) {
      stages.make_partials(blockIdx.x, roles.partial);
    } else if (reduce < 0) {
      stages.sum_node(gateway, roles.gateway);
    } else {
      stages.sum_nodes(reduce, roles.reduce);
    }
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
