// SPDX-License-Identifier: Apache-2.0
// All ranks of a group, on the emulated machine with weak memory: combines of the large path, in a
// row, whose partials travel through the same memory.
#pragma once
#include "../node_checks.h"
#include "host_arrays.h"
#include "kernel.h"
#include "weak_group.h"

namespace jax_ep {

// A combine of all ranks, from the host's plan.
struct Combine {
  Case c;
  Results results;  // what comes back; scalars are the rows' weights
  bool has_y = true, has_scalars = true;
  int shared;  // bytes of a block
  HostPlan plan = {};
  std::vector<RankArrays> a = {};

  bool is_fp8() const { return has_y && c.quantized_partials; }
  size_t partial_bytes() const {
    const size_t row = is_fp8() ? fp8_partial_bytes(c.hidden) : c.hidden * size_of(c.type);
    return has_y ? size_t(c.x.num_tokens) * partial_slots(c.x) * row : 0;
  }
  size_t out_bytes() const { return size_t(c.x.num_tokens) * c.hidden * size_of(c.type); }
  size_t scalar_bytes() const { return c.x.num_pairs() * sizeof(float); }
};

// What peers write in each rank's memory, behind the control block.
struct CombinePlaces {
  size_t partials, end;
  std::vector<size_t> scalars;  // of each combine

  explicit CombinePlaces(const std::vector<Combine>& all) {
    size_t most = 0;
    for (const Combine& o : all) most = std::max(most, o.partial_bytes());
    partials = control_layout(all[0].c.x.num_ranks).total;
    end = round_up(partials + most, 128);
    for (const Combine& o : all) {
      scalars.push_back(end);
      end = round_up(end + o.scalar_bytes(), 128);
    }
    end += 128;
  }
};

class CombineWorld {
 public:
  CombineWorld(std::vector<Combine> all, uint64_t seed, double timeout_ms)
      : combines(std::move(all)),
        places_(combines),
        group(ranks(), ranks(), places_.end, seed, timeout_ms) {
    for (int r = 0; r < ranks(); ++r) {
      std::memset(group.mine(r) + places_.partials, 0xff, places_.end - places_.partials);
      // What is stored by no word of ours.
      const size_t plain = has_fp8() ? places_.partials : places_.scalars[0];
      group.memory.let_store(r, {group.ready_of(r), {plain, places_.end - plain}});
    }
    for (size_t i = 0; i < combines.size(); ++i) {
      Combine& o = combines[i];
      o.plan = host_plan(o.c.x, o.c.topk_idx);
      for (int r = 0; r < ranks(); ++r) {
        o.a.push_back(host_arrays(o.c, r, memory_));
        copy_plan(o.plan, o.c.x, r, o.a[r].plan);
        std::copy(o.results.y[r].begin(), o.results.y[r].end(), o.a[r].y);
        std::copy(o.results.weights[r].begin(), o.results.weights[r].end(), o.a[r].weights);
        o.a[r].scalars_out = reinterpret_cast<float*>(group.mine(r) + places_.scalars[i]);
      }
    }
  }

  void issue(size_t i, int r) {
    const Combine& o = combines[i];
    CombineParams p = combine_params(o.c, o.a[r], group.peers(r));
    p.call.signature += 16 * uint32_t(i + 1);
    p.call.lent.output[0].offset = places_.partials;
    p.call.lent.output[1].offset = places_.scalars[i];
    p.call.lent.bytes[0] = o.partial_bytes();
    p.call.lent.bytes[1] = o.scalar_bytes();
    p.partials = group.mine(r) + places_.partials;
    p.wire_percent = o.c.wire_percent;
    if (!o.has_y) p.y = nullptr;
    p.row_scalars = o.has_scalars ? o.a[r].weights : nullptr;
    shared_of_launches = o.shared;
    const Wire wire = o.is_fp8() ? Wire::kQuantized : Wire::kCopy;
    launch_combine(&p, o.c.type, wire, {o.c.num_sms, reinterpret_cast<cudaStream_t>(size_t(r)), 0});
  }
  // Run what has been issued.
  void run() { group.run(kMostTurns); }

  // Results of the first one, of all ranks, set to a value; whether a rank's are what it leaves
  // that gives up.
  void mark(char value) {
    const Combine& o = combines[0];
    for (const RankArrays& a : o.a) {
      std::memset(a.out, value, o.out_bytes());
      std::memset(a.scalars_out, value, o.scalar_bytes());
    }
  }
  bool is_poisoned(int r) const {
    const Combine& o = combines[0];
    return (!o.has_y || is_poison(o.a[r].out, o.out_bytes())) &&
           (!o.has_scalars || is_poison(o.a[r].scalars_out, o.scalar_bytes()));
  }

  std::vector<Combine> combines;

 private:
  static constexpr uint64_t kMostTurns = 3'000'000;

  int ranks() const { return combines[0].c.x.num_ranks; }
  bool has_fp8() const {
    return std::any_of(combines.begin(), combines.end(),
                       [](const Combine& o) { return o.is_fp8(); });
  }

  const CombinePlaces places_;
  std::deque<Bytes> memory_;

 public:
  WeakGroup group;
};

}  // namespace jax_ep
