// SPDX-License-Identifier: Apache-2.0
// All ranks of a group, on the emulated machine with weak memory, and between nodes, if it spans
// several, over a network that does the worst it may: exchanges through slots, several in a row.
#pragma once
#include <deque>
#include <memory>

#include "../node_checks.h"
#include "../slot_params.h"
#include "host_arrays.h"
#include "network.h"
#include "weak_group.h"

namespace jax_ep {

// One exchange: a dispatch and a combine of what `results` says, of all ranks.
struct SlotExchange {
  Case c;
  HostPlan plan;
  Results results;
  std::vector<RankArrays> a;
  bool is_combined = false;
};

// An operation, or a half of one, that all ranks run in the same order.
struct Step {
  size_t exchange;
  SlotKind kind;
  Half half;
};

// In node_slot_dispatch.cc and node_slot_combine.cc.
cudaError_t launch_slot_dispatch_between_nodes(const SlotDispatchParams& p,
                                               const emulation::EmulatedTransport& transport,
                                               Element x, Wire wire, const Launch& how);
cudaError_t launch_slot_combine_between_nodes(const SlotCombineParams& p,
                                              const emulation::EmulatedTransport& transport,
                                              Element y, const Launch& how);

// The ranks of a group, in nodes of `local`.
struct Layout {
  int ranks, local;
  bool spans_nodes() const { return local < ranks; }
};

class SlotWorld {
 public:
  SlotWorld(const Layout& layout, const SlotSize& slots, uint64_t seed, double timeout_ms)
      : layout_(layout),
        R_(layout.ranks),
        at_(control_layout(R_)),
        slots_(slots),
        group(R_, layout.local, bytes(), seed, timeout_ms),
        network(group.machine, homes(), bytes()) {
    const SlotLayout lie = slot_layout(slots);
    for (int r = 0; r < R_; ++r) {
      std::vector<emulation::WeakMemory::Region> sent;
      for (int i = 0; i < inboxes() / R_; ++i) sent.push_back({inbox(i, r), lie.total});
      group.memory.let_store(r, sent);
      for (int i = 0; i < inboxes(); ++i) {
        char* inbox = group.mine(r) + at_.total + i * lie.total;
        std::memset(inbox + lie.rows, 0xff, lie.total - lie.rows);
      }
    }
  }

  // `results`: what the experts make of it. Inputs are the case's, all other arrays ones.
  size_t add(const Case& c, const Results& results) {
    exchanges_.push_back({c, host_plan(c.x, c.topk_idx), results, {}, false});
    SlotExchange& e = exchanges_.back();
    for (int r = 0; r < R_; ++r) {
      e.a.push_back(host_arrays(c, r, memory_));
      std::copy(results.y[r].begin(), results.y[r].end(), e.a[r].y);
      std::copy(results.weights[r].begin(), results.weights[r].end(), e.a[r].weights);
    }
    return exchanges_.size() - 1;
  }
  void issue(int r, const Step& step) {
    SlotExchange& e = exchanges_[step.exchange];
    const Case& c = e.c;
    const auto stream = reinterpret_cast<cudaStream_t>(uintptr_t(r));
    const Launch how{c.num_sms, stream, 0};
    const emulation::EmulatedTransport transport{&network, r};
    if (step.kind == SlotKind::kDispatch) {
      const SlotDispatchParams p = slot_dispatch_params(c, e.a[r], call(r, step), step.half);
      const Element x = c.prequantized ? Element::kFp8 : c.type;
      if (layout_.spans_nodes()) {
        launch_slot_dispatch_between_nodes(p, transport, x, c.wire, how);
      } else {
        launch_slot_dispatch(&p, c.x, x, c.wire, c.hidden, how);
      }
    } else {
      const SlotCombineParams p = slot_combine_params(c, e.a[r], call(r, step), step.half);
      if (layout_.spans_nodes()) {
        launch_slot_combine_between_nodes(p, transport, c.type, how);
      } else {
        launch_slot_combine(&p, c.x, c.type, c.hidden, how);
      }
    }
  }
  // Run what has been issued.
  void run() {
    auto move = [this] {
      group.memory.move();
      network.move();
    };
    group.machine.run(move, kMostTurns);
    group.memory.deliver_all();
    network.deliver_all();
  }

  SlotExchange& operator[](size_t i) { return exchanges_[i]; }
  bool share_node(int r, int s) const { return r / layout_.local == s / layout_.local; }
  size_t size() const { return exchanges_.size(); }
  // Results of rank r, as they are before anything is written to them, set to another value.
  void mark(size_t exchange, int r, char value) {
    SlotExchange& e = exchanges_[exchange];
    std::memset(e.a[r].rows, value, size_t(e.c.x.num_rows) * row_bytes_of(e.c));
    std::memset(e.a[r].out, value, size_t(e.c.x.num_tokens) * e.c.hidden * size_of(e.c.type));
  }

  // Number i of those that `source` fills in each rank's memory: by kind, then by set.
  size_t inbox(int i, int source) const {
    return at_.total + (size_t(i) * R_ + source) * slot_layout(slots_).total;
  }
  int inboxes() const { return int(slot_bytes(R_, slots_) / slot_layout(slots_).total); }

 private:
  static constexpr uint64_t kMostTurns = 4'000'000;

  size_t bytes() const {
    const size_t outboxes = layout_.spans_nodes() ? outbox_bytes(R_, slots_) : 0;
    return at_.total + slot_bytes(R_, slots_) + outboxes;
  }
  std::vector<char*> homes() const {
    std::vector<char*> homes;
    for (int r = 0; r < R_; ++r) homes.push_back(group.mine(r));
    return homes;
  }
  Call call(int r, const Step& step) const {
    Peers p = group.peers(r);
    p.slots = slot_layout(slots_);
    Call call = slot_call(p, step.kind, step.half);
    call.signature += 16 * uint32_t(step.exchange + 1) + (r == mistaken ? 8 : 0);
    return call;
  }

  const Layout layout_;
  const int R_;
  const ControlLayout at_;
  const SlotSize slots_;
  std::deque<Bytes> memory_;
  std::deque<SlotExchange> exchanges_;

 public:
  WeakGroup group;
  emulation::Network network;
  int mistaken = -1;  // the rank that takes each operation for another one
};

}  // namespace jax_ep
