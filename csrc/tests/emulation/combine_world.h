// SPDX-License-Identifier: Apache-2.0
// All ranks of a group, on the emulated machine with weak memory: combines of the large path, in a
// row, whose partials travel through the same memory.
#pragma once
#include <memory>

#include "../node_checks.h"
#include "host_arrays.h"
#include "kernel.h"
#include "weak_memory.h"

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

class CombineWorld {
 public:
  CombineWorld(std::vector<Combine> all, uint64_t seed, double timeout_ms)
      : combines(std::move(all)),
        R_(combines[0].c.x.num_ranks),
        at_(control_layout(R_)),
        machine(seed),
        memory(machine, R_, lay_out()),
        records(R_) {
    for (int r = 0; r < R_; ++r) {
      char* mine = memory.seen_by(r, r);
      Header& header = *reinterpret_cast<Header*>(mine + at_.header);
      header.generation = 1;
      header.timeout_ns = uint64_t(timeout_ms * 1e6);
      header.record = &records[r];
      auto* mapping = reinterpret_cast<char**>(mine + at_.mapping);
      for (int s = 0; s < R_; ++s) mapping[s * kMaxAllocations] = memory.seen_by(r, s);
      std::memset(mine + partials_, 0xff, end_ - partials_);
      const size_t plain =
          has_fp8() ? partials_ : scalars_[0];  // what is stored by no word of ours
      memory.let_store(r, {{at_.ready + r * sizeof(Ready), sizeof(Ready)}, {plain, end_ - plain}});
    }
    for (size_t i = 0; i < combines.size(); ++i) {
      Combine& o = combines[i];
      o.plan = host_plan(o.c.x, o.c.topk_idx);
      for (int r = 0; r < R_; ++r) {
        o.a.push_back(host_arrays(o.c, r, memory_));
        copy_plan(o.plan, o.c.x, r, o.a[r].plan);
        std::copy(o.results.y[r].begin(), o.results.y[r].end(), o.a[r].y);
        std::copy(o.results.weights[r].begin(), o.results.weights[r].end(), o.a[r].weights);
        o.a[r].scalars_out = reinterpret_cast<float*>(memory.seen_by(r, r) + scalars_[i]);
      }
    }
  }

  void issue(size_t i, int r) {
    const Combine& o = combines[i];
    CombineParams p = combine_params(o.c, o.a[r], peers(r));
    p.call.signature += 16 * uint32_t(i + 1);
    p.call.lent.output[0].offset = partials_;
    p.call.lent.output[1].offset = scalars_[i];
    p.call.lent.bytes[0] = o.partial_bytes();
    p.call.lent.bytes[1] = o.scalar_bytes();
    p.partials = memory.seen_by(r, r) + partials_;
    p.wire_percent = o.c.wire_percent;
    if (!o.has_y) p.y = nullptr;
    p.row_scalars = o.has_scalars ? o.a[r].weights : nullptr;
    shared_of_launches = o.shared;
    const Wire wire = o.is_fp8() ? Wire::kQuantized : Wire::kCopy;
    launch_combine(&p, o.c.type, wire, {o.c.num_sms, reinterpret_cast<cudaStream_t>(size_t(r)), 0});
  }
  // Run what has been issued.
  void run() {
    machine.run([this] { memory.move(); }, kMostTurns);
    memory.deliver_all();
  }

  // What rank `from` says of its pushes never comes to rank `to`.
  void lose_flags(int from, int to) {
    constexpr size_t kFlags = kMaxChunks * sizeof(uint64_t);
    memory.lose(to, {at_.done + from * kFlags, kFlags});
  }

  std::vector<Combine> combines;

 private:
  static constexpr uint64_t kMostTurns = 3'000'000;

  // What peers write in each rank's memory, behind the control block; its end.
  size_t lay_out() {
    size_t partials = 0;
    for (const Combine& o : combines) partials = std::max(partials, o.partial_bytes());
    partials_ = at_.total;
    end_ = round_up(partials_ + partials, 128);
    for (const Combine& o : combines) {
      scalars_.push_back(end_);
      end_ = round_up(end_ + o.scalar_bytes(), 128);
    }
    end_ += 128;
    return end_;
  }
  bool has_fp8() const {
    return std::any_of(combines.begin(), combines.end(),
                       [](const Combine& o) { return o.is_fp8(); });
  }
  Peers peers(int r) {
    Peers p{};
    p.at = at_;
    p.rank = r;
    p.num_ranks = p.node_ranks = R_;
    for (int s = 0; s < R_; ++s) p.control[s] = memory.seen_by(r, s);
    return p;
  }

  const int R_;
  const ControlLayout at_;
  size_t partials_ = 0, end_ = 0;
  std::vector<size_t> scalars_;
  std::deque<Bytes> memory_;

 public:
  emulation::Machine machine;
  emulation::WeakMemory memory;
  std::vector<FaultRecord> records;
};

}  // namespace jax_ep
