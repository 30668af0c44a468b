// SPDX-License-Identifier: Apache-2.0
// All ranks of a group that spans nodes, on the emulated machine: arenas, arrays, operations.
#pragma once
#include <stdexcept>
#include <string>

#include "../../kernels/plan_exchange.cuh"
#include "../../rdma/combine_nodes.cuh"
#include "../../rdma/dispatch_nodes.cuh"
#include "../../rdma/exchange_routing.cuh"
#include "../node_cases.h"
#include "host_arrays.h"
#include "network.h"

namespace jax_ep {

using emulation::EmulatedTransport;

template <typename Params>
using Over = WithTransport<Params, EmulatedTransport>;

constexpr int kRoutingThreads = 64, kRoutingBlocks = 2;

// Whether the word of a pair of the group is here, as the plan may expect of other nodes.
inline bool has_word(const Op& op, int pairs, int pair) {
  const int source = pair / pairs;
  const uint64_t* words = op.block(op.me).routing(plan_parity(op), source);
  return op.reaches(source) || tag_of(words[pair % pairs / 2]) == word_tag(op.tag);
}

// The plan's exchange inside a node, and what it gathers: all of the group's choices, if nothing
// went wrong. Its arrays come from the host.
inline void emulate_plan(const PlanParams& p, const PlanSizes& sizes, int* gathered) {
  const int word = blockIdx.x * blockDim.x + threadIdx.x;
  const Op op(p.call);
  const bool sent = publish(p, sizes, op, word, choices_of(p.topk_idx, sizes.pairs, word));
  if (!op.began_broken()) {
    const int all = op.R * sizes.pairs, warps = gridDim.x * blockDim.x / 32;
    bool done = true;
    for (int first = word / 32 * 32; done && first < all; first += 32 * warps) {
      int expert[kGathered];
      const int pair = first + lane_id();
      const bool early = pair < all && !has_word(op, sizes.pairs, pair);
      done = gather(p, sizes, op, first, min_int(first + 32, all), expert);
      if (pair < all) gathered[pair] = early ? -3 : expert[0];
    }
    if (done && blockIdx.x == 0) done = await_hellos(op);
    op.meet(done && sent);
  }
  op.leave([] {});
}

class World {
 public:
  World(const NodeCase& n, uint64_t seed, double timeout_ms)
      : n_(n),
        c_(n.c),
        R_(n.c.x.num_ranks),
        plan_(host_plan(c_.x, c_.topk_idx)),
        at_(control_layout(R_)),
        rings_(ring_layout(n.nodes, c_.ranks_per_node, n.rings, at_.total)),
        machine(seed),
        records(R_),
        gathered(R_, std::vector<int>(R_ * c_.x.num_pairs(), -2)) {
    std::vector<char*> bases;
    for (int r = 0; r < R_; ++r) {
      arenas_.emplace_back(rings_.total + 128);
      const auto base = reinterpret_cast<uintptr_t>(arenas_.back().data());
      bases.push_back(reinterpret_cast<char*>(round_up(base, 128)));
    }
    network = std::make_unique<emulation::Network>(machine, bases, rings_.total);
    for (int r = 0; r < R_; ++r) {
      Header& header = *reinterpret_cast<Header*>(bases[r] + at_.header);
      header.generation = 1;
      header.timeout_ns = uint64_t(timeout_ms * 1e6);
      header.record = &records[r];
      peers_.push_back(node_peers(c_, r, bases.data()));
      a.push_back(host_arrays(c_, r, memory_));
      copy_plan(plan_, c_.x, r, a[r].plan);
    }
  }

  // Issue one operation of rank r; `other` makes it another one than its peers'.
  void plan(int r, bool other = false) {
    Over<NodeRouting> p{routing_of(c_, a[r], peers_[r], rings_), transport(r)};
    PlanParams q = plan_params(c_, a[r], peers_[r]);
    q.call.signature += other;
    p.plan_signature += other;
    launch(r, "routing", kRoutingBlocks, kRoutingThreads, [p] { exchange_routing(p); });
    launch(r, "plan", kRoutingBlocks, kRoutingThreads,
           [this, q, r] { emulate_plan(q, PlanSizes(c_.x, kRoutingBlocks), gathered[r].data()); });
  }
  void dispatch(int r, bool other = false) {
    Over<NodeDispatch> p{dispatch_of(c_, a[r], peers_[r], rings_), transport(r)};
    p.dispatch.call.signature += other;
    if (c_.wire == Wire::kCopy) return dispatch_as<Wire::kCopy, float>(r, p);
    by_type([&](auto type) {
      using T = decltype(type);
      if (c_.wire == Wire::kQuantized) return dispatch_as<Wire::kQuantized, T>(r, p);
      dispatch_as<Wire::kDequantized, T>(r, p);
    });
  }
  void combine(int r, bool other = false) {
    Over<NodeCombine> p{combine_of(c_, a[r], peers_[r], rings_), transport(r)};
    p.combine.call.signature += other;
    combine_as(r, p);
  }
  // Scalars alone come back, as when only weights have a gradient.
  void combine_scalars(int r) {
    Over<NodeCombine> p{combine_of(c_, a[r], peers_[r], rings_), transport(r)};
    p.combine.y = nullptr;
    p.shape = combine_message(c_.x, 0, rings_.slot_bytes);
    combine_as(r, p);
  }

  // Ones, as at first.
  void poison_results(int r) {
    const size_t rows = c_.x.num_rows, tokens = c_.x.num_tokens;
    std::memset(a[r].rows, 0xff, rows * row_bytes_of(c_));
    std::memset(a[r].out, 0xff, tokens * c_.hidden * size_of(c_.type));
    std::fill_n(a[r].scalars_out, c_.x.num_pairs(), 7.0f);
  }

  // Run what has been issued.
  void run() {
    machine.run([this] { network->move(); }, kMostTurns);
    network->deliver_all();
  }

  const HostPlan& host() const { return plan_; }
  uint64_t slot_bytes() const { return rings_.slot_bytes; }
  // What was sent of messages from one rank to another.
  size_t& sent(int from, int to) { return network->sent[{from, to}]; }

 private:
  static constexpr uint64_t kMostTurns = 3'000'000;

  EmulatedTransport transport(int r) const { return {network.get(), r}; }
  void launch(int r, const std::string& what, int blocks, int threads, std::function<void()> body) {
    machine.launch(r, what + " of rank " + std::to_string(r), blocks, threads, std::move(body));
  }
  template <typename Go>
  void by_type(Go&& go) {
    if (c_.type == Element::kBf16) return go(__nv_bfloat16{});
    if (c_.type == Element::kF16) return go(__half{});
    go(float{});
  }
  template <Wire W, typename T>
  void dispatch_as(int r, const Over<NodeDispatch>& p) {
    launch(r, "dispatch", n_.blocks, kThreads, [this, p] {
      static thread_local std::vector<float> held(kWarps * (c_.hidden / kScaleBlock));
      dispatch_between_nodes<W, T>(p, held.data());
    });
  }

  void combine_as(int r, const Over<NodeCombine>& p) {
    by_type([&](auto type) {
      launch(r, "combine", std::max(n_.blocks - 1, kLeastCombineBlocks), kStageThreads,
             [p] { combine_between_nodes<decltype(type)>(p); });
    });
  }

  const NodeCase& n_;
  const Case& c_;
  const int R_;
  const HostPlan plan_;
  const ControlLayout at_;
  const RingLayout rings_;
  std::vector<Bytes> arenas_;
  std::deque<Bytes> memory_;
  std::vector<Peers> peers_;

 public:
  emulation::Machine machine;
  std::unique_ptr<emulation::Network> network;
  std::vector<FaultRecord> records;
  std::vector<std::vector<int>> gathered;  // [rank]: all choices, as its plan has learnt them
  std::vector<RankArrays> a;
};

}  // namespace jax_ep
