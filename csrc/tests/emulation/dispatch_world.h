// SPDX-License-Identifier: Apache-2.0
// All ranks of a group, on the emulated machine with weak memory: plans and dispatches of the large
// path, in a row, whose words and rows travel through the same memory.
#pragma once
#include <array>

#include "../node_checks.h"
#include "host_arrays.h"
#include "kernel.h"
#include "weak_group.h"

namespace jax_ep {

// A dispatch of all ranks, by a plan of their own or the host's.
struct Dispatch {
  Case c;
  bool is_planned = false;
  HostPlan plan = {};
  std::vector<RankArrays> a = {};

  size_t row_bytes() const { return size_t(c.x.num_rows) * row_bytes_of(c); }
  size_t scale_bytes() const {
    return delivers_scales(c) ? c.x.num_rows * (c.hidden / kScaleBlock) * sizeof(float) : 0;
  }
  size_t scalar_bytes() const { return c.x.num_rows * sizeof(float); }
};

// What peers write in each rank's memory, behind the control block: of each dispatch, by Output.
struct DispatchPlaces {
  std::vector<std::array<size_t, kMaxOutputs>> outputs;
  size_t end;

  explicit DispatchPlaces(const std::vector<Dispatch>& all) {
    end = control_layout(all[0].c.x.num_ranks).total;
    auto place = [this](size_t bytes) {
      const size_t at = end;
      end = round_up(end + bytes, 128) + 128;
      return at;
    };
    for (const Dispatch& o : all) {
      const size_t rows = place(o.row_bytes()), scales = place(o.scale_bytes());
      outputs.push_back({rows, scales, place(o.scalar_bytes())});
    }
  }
};

class DispatchWorld {
 public:
  DispatchWorld(std::vector<Dispatch> all, uint64_t seed, double timeout_ms)
      : dispatches(std::move(all)),
        places_(dispatches),
        group(ranks(), ranks(), places_.end, seed, timeout_ms) {
    for (int r = 0; r < ranks(); ++r) {
      const size_t first = group.at.total;
      std::memset(group.mine(r) + first, 0xff, places_.end - first);
      std::vector<emulation::WeakMemory::Region> stored = {group.ready_of(r)};
      for (size_t i = 0; i < dispatches.size(); ++i) {
        // What is stored by no word of ours: rows that are quantised, scales and scalars.
        const bool plain = dispatches[i].c.wire != Wire::kCopy;
        const size_t from = places_.outputs[i][plain ? 0 : 1];
        stored.push_back({from, places_.outputs[i][2] + dispatches[i].scalar_bytes() - from});
      }
      group.memory.let_store(r, stored);
    }
    for (size_t i = 0; i < dispatches.size(); ++i) {
      Dispatch& o = dispatches[i];
      o.plan = host_plan(o.c.x, o.c.topk_idx);
      for (int r = 0; r < ranks(); ++r) {
        o.a.push_back(host_arrays(o.c, r, memory_));
        if (!o.is_planned) copy_plan(o.plan, o.c.x, r, o.a[r].plan);
        const auto& at = places_.outputs[i];
        o.a[r].rows = group.mine(r) + at[0];
        o.a[r].row_scales = reinterpret_cast<float*>(group.mine(r) + at[1]);
        o.a[r].row_scalars = reinterpret_cast<float*>(group.mine(r) + at[2]);
      }
    }
  }

  // Of rank r: plan and dispatch, or one of them.
  void issue(size_t i, int r) {
    if (dispatches[i].is_planned) issue_plan(i, r);
    issue_dispatch(i, r);
  }
  void issue_plan(size_t i, int r) {
    const Dispatch& o = dispatches[i];
    PlanParams p = plan_params(o.c, o.a[r], group.peers(r));
    p.call.signature += mark_of(i, r);
    launch_plan(&p, o.c.x, launch_of(o, r));
  }
  void issue_dispatch(size_t i, int r) {
    const Dispatch& o = dispatches[i];
    DispatchParams p = dispatch_params(o.c, o.a[r], group.peers(r));
    p.call.signature += mark_of(i, r);
    for (int k = 0; k < kMaxOutputs; ++k) p.call.lent.output[k].offset = places_.outputs[i][k];
    p.wire_percent = o.c.wire_percent;
    const Element x = o.c.prequantized ? Element::kFp8 : o.c.type;
    launch_dispatch(&p, x, o.c.wire, o.c.hidden, launch_of(o, r));
  }
  // Run what has been issued.
  void run() { group.run(kMostTurns); }

  // Results of the first one, of all ranks, set to a value; whether a rank's are what it leaves
  // that gives up.
  void mark(char value) {
    const Dispatch& o = dispatches[0];
    for (const RankArrays& a : o.a) {
      std::memset(a.rows, value, o.row_bytes());
      std::memset(a.row_scales, value, o.scale_bytes());
      std::memset(a.row_scalars, value, o.scalar_bytes());
      if (!o.is_planned) continue;
      std::memset(a.plan.pair_row, value, o.c.x.num_pairs() * sizeof(int32_t));
      std::memset(a.plan.counts, value, o.c.x.local_experts() * sizeof(int32_t));
    }
  }
  bool is_poisoned(int r) const {
    const Dispatch& o = dispatches[0];
    return is_poison(o.a[r].rows, o.row_bytes()) && is_poison(o.a[r].row_scales, o.scale_bytes()) &&
           (!o.c.weights || is_poison(o.a[r].row_scalars, o.scalar_bytes()));
  }
  bool is_plan_poisoned(int r) const {
    const Exchange& x = dispatches[0].c.x;
    const PlanArrays& plan = dispatches[0].a[r].plan;
    return is_poison(plan.pair_row, x.num_pairs() * sizeof(int32_t)) &&
           std::all_of(plan.counts, plan.counts + x.local_experts(), [](int n) { return n == 0; });
  }

  std::vector<Dispatch> dispatches;
  int mistaken = -1;  // the rank that takes each operation for another one

 private:
  static constexpr uint64_t kMostTurns = 3'000'000;

  int ranks() const { return dispatches[0].c.x.num_ranks; }
  static Launch launch_of(const Dispatch& o, int r) {
    return {o.c.num_sms, reinterpret_cast<cudaStream_t>(size_t(r)), 0};
  }
  uint32_t mark_of(size_t i, int r) const { return 16 * uint32_t(i + 1) + (r == mistaken ? 8 : 0); }

  const DispatchPlaces places_;
  std::deque<Bytes> memory_;

 public:
  WeakGroup group;
};

}  // namespace jax_ep
