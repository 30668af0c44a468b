// SPDX-License-Identifier: Apache-2.0
// dispatch between nodes: a row crosses the network once for each node that wants it.
//
//   source rank (n, l)                          rank (d, l), of another node d
//     send blocks, per (chunk, node d):           forward blocks, per (chunk, node n):
//       await room in d's ring        <--credit--   ...
//       rows that d wants, once each,               await the message
//       and where they go there                     per row: store it to all its rows here, push
//         -> send slot, packed                        it to its first row on each other rank of
//     put blocks: packed messages, put, signal -->    this node that wants it
//                                                   done[(n, l)][chunk] on these ranks
//                                                   credit -> (n, l)
//     wire blocks: as in kernels/dispatch.cu, to the ranks of my node
//     local blocks: the same, over the chunks of all other ranks
//
// The rank with the source's index forwards its rows under its own leases. So a rank sees one done
// flag for each source and chunk, wherever the source is, and rows are written by exactly one
// party, as inside a node. There is one message for each chunk and node, even if no row goes there:
// both sides know the numbers of messages without counting. Why nobody waits for ever, however
// short the rings: docs/multi_node_protocol.md.
#pragma once
#include "../kernels/dispatch_local.cuh"
#include "dispatch_messages.cuh"

namespace jax_ep {

// `held`: for each warp, as many floats as a row has scales, in shared memory.
template <Wire W, typename T, typename Transport>
__device__ void dispatch_between_nodes(const WithTransport<NodeDispatch, Transport>& q,
                                       float* held) {
  const DispatchParams& p = q.dispatch;
  const Op op(p.call);
  const Rings rings(op, q.at);
  const NodeRoles roles = split_node_roles(gridDim.x, rings.L, q.percent);
  const Body b{p, op, Roles{roles.wire, roles.local}, q.shape.chunk,
               ceil_div(p.exchange.num_tokens, q.shape.chunk)};
  if (!op.began_broken()) {
    const Messages<W, T, Transport> messages(q, b, rings);
    const int send = blockIdx.x - roles.wire, put = send - roles.send;
    const int forward = put - roles.put;
    if (blockIdx.x == 0) lend_outputs(op);
    if (send < 0) {
      push_tokens<W, T>(b);
    } else if (put < 0) {
      messages.send(send, roles.send);
    } else if (forward < 0) {
      messages.put(put, roles.put);
    } else if (forward < roles.forward) {
      messages.forward(forward, roles.forward);
    } else {
      zero_unowned(b);
    }
    work_locally<W, T, true>(b, held + threadIdx.x / 32 * (p.hidden / kScaleBlock));
  }
  op.leave(
      [&] {
        tell_other_nodes(op, q.transport);
        poison_dispatch(p);
      },
      [&] { rings.advance(b.chunks, 0); });
}

}  // namespace jax_ep
