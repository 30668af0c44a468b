// SPDX-License-Identifier: Apache-2.0
// dispatch of a small batch in a group that spans nodes (kernels/slot_dispatch.cuh), and what each
// rank puts to those of other nodes:
//
//   words of all its tokens   one put for each rank, whose signal is the hello
//   a token's row             one put for each rank that it names, whose signal is the token's flag
//
// Rows are stored, and quantised, once for all of these. Words are packed: two for every four
// choices.
#pragma once
#include "../kernels/slot_dispatch.cuh"
#include "launch.h"
#include "slot_op_nodes.cuh"
#include "variants.h"

namespace jax_ep {

template <typename Transport>
class NodeDispatchOp : public NodeSlotOp<Transport> {
  using Base = NodeSlotOp<Transport>;

 public:
  // `parts`: of a token's choices.
  __device__ NodeDispatchOp(const Call& call, SlotKind kind, Half half, const int32_t* ticket,
                            const Transport& transport, int parts)
      : Base(call, kind, half, ticket, transport), parts_(parts) {}

  __device__ const uint64_t* arrived_words(int source, int t, int h) const {
    if (this->op.reaches(source)) return Base::arrived_words(source, t, h);
    return this->inbox(source).words(0) + 2 * (t * parts_ + h);
  }

  // By the data warps: words of all my tokens to some of the ranks of other nodes. If a choice is
  // out of range they stay away: who pushes that token's words refuses it.
  __device__ void put_words(const SlotDispatchParams& p, const SlotDispatchSizes& sizes) const {
    const Op& op = this->op;
    const int others = op.R - op.call.peers.node_ranks;
    for (int i = blockIdx.x; i < others; i += gridDim.x) {
      const int rank = op.node_last() + i < op.R ? op.node_last() + i : op.node_last() + i - op.R;
      const Inbox to = this->outbox(rank);
      if (!data_and(store_words(p, sizes, to.words(0)))) return;
      if (threadIdx.x >= 32) continue;
      const int bytes = 2 * p.exchange.num_tokens * parts_ * int(sizeof(uint64_t));
      this->put(rank, to, to.words(0), bytes, to.hello());
    }
  }

  // By one warp: whether the words of all ranks of other nodes have come, for this lane.
  __device__ bool await_other_nodes() const {
    bool here = true;
    for (int r = lane_id(); r < this->op.R; r += 32) {
      if (!this->op.reaches(r)) here &= this->await(this->inbox(r).hello(), r, Phase::kRouting);
    }
    return here;
  }

  // By the data warps: the rows of up to kSlotGroup of the block's own tokens, from the `from`-th
  // on, to the ranks of other nodes that they name; puts are dealt out to the warps.
  __device__ void put_rows(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                           const SlotRow& lie, int from, int own) const {
    const Op& op = this->op;
    const int scalars = p.scalars != nullptr ? p.exchange.top_k : 0;
    const int bytes = lie.bytes + (lie.scales + scalars) * int(sizeof(float));
    const Inbox rows = this->outbox(op.me);
    const int warp = threadIdx.x / 32;
    data_sync();  // all tasks of these tokens have been stored
    int number = 0;
    for (int i = from; i < min_int(from + kSlotGroup, own); ++i) {
      const int t = blockIdx.x + i * gridDim.x;
      const RankSet named = named_by(p, sizes.plan, choice_of_lane(p, t));
      for (int r = 0; r < op.R; ++r) {
        if (op.reaches(r) || !named.has(r)) continue;
        if (number++ % kDataWarps != warp) continue;
        this->put(r, rows, rows.slot(t), bytes, rows.flag(t));
      }
    }
  }

 private:
  // This thread's share of them; false: one of its choices is out of range.
  __device__ bool store_words(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                              uint64_t* words) const {
    const int K = p.exchange.top_k, parts = p.exchange.num_tokens * parts_;
    bool valid = true;
    for (int i = threadIdx.x; i < parts; i += kDataThreads) {
      const int t = sizes.by_parts(i), first = kPart * (i - t * parts_);
      int choice[kPart];
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        choice[j] = first + j < K ? p.topk_idx[t * K + first + j] : -1;
        valid &= choice[j] >= -1 && choice[j] < p.exchange.num_experts;
      }
      words[2 * i] = make_word(word_tag(this->tag), choice[0], choice[1]);
      words[2 * i + 1] = make_word(word_tag(this->tag), choice[2], choice[3]);
    }
    return valid;
  }

  const int parts_;
};

template <Wire W, typename T, typename Transport>
__global__ void __launch_bounds__(kSlotThreads, 1)
    node_slot_dispatch(const __grid_constant__ WithTransport<SlotDispatchParams, Transport> p,
                       const __grid_constant__ SlotDispatchSizes sizes) {
  slot_dispatch_body<W, T, NodeDispatchOp<Transport>>(p, sizes, p.transport, sizes.parts);
}

template <typename Transport>
cudaError_t launch_slot_dispatch_over(const SlotDispatchParams& params, const Transport& transport,
                                      Element x, Wire wire, const Launch& how) {
  const WithTransport<SlotDispatchParams, Transport> p{params, transport};
  const Exchange& e = params.exchange;
  const int blocks = min_int(how.num_sms, e.num_ranks * e.num_tokens);
  return for_dispatch_variant(x, wire, [&](auto w, auto type) {
    constexpr Wire W = decltype(w)::value;
    using T = decltype(type);
    const SlotDispatchSizes sizes = slot_dispatch_sizes<W, T>(e, blocks, params.hidden, x);
    return launch_kernel(node_slot_dispatch<W, T, Transport>, blocks, kSlotThreads,
                         SlotShared::bytes(e), how.stream, p, sizes);
  });
}

template <typename Transport>
cudaError_t load_slot_dispatch_over() {
  cudaFuncAttributes attributes;
  return for_each_dispatch_variant([&](auto w, auto type) {
    const auto kernel = &node_slot_dispatch<decltype(w)::value, decltype(type), Transport>;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  });
}

}  // namespace jax_ep
