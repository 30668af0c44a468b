// SPDX-License-Identifier: Apache-2.0
// All ranks of a group in one process, on one GPU or several: the arrays of an exchange, and how
// its operations are issued.
#pragma once
#include <memory>
#include <stdexcept>

#include "../runtime/group.h"
#include "../runtime/stats_ring.h"
#include "case.h"

namespace jax_ep {

// Device memory of one rank, poisoned with ones (NaN, -1) when made and by `poison`.
template <typename T>
class Buffer {
 public:
  Buffer(int device, size_t count) : device_(device), count_(count) {
    require(cudaSetDevice(device), "cudaSetDevice");
    require(cudaMalloc(&data_, bytes() + 16), "cudaMalloc");
    poison();
  }
  Buffer(int device, const std::vector<T>& host) : Buffer(device, host.size()) {
    require(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void poison() {
    require(cudaSetDevice(device_), "cudaSetDevice");
    require(cudaMemset(data_, 0xff, bytes() + 16), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  T* data() const { return data_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  std::vector<T> host() const {
    std::vector<T> h(count_);
    require(cudaMemcpy(h.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return h;
  }

 private:
  int device_;
  size_t count_;
  T* data_ = nullptr;
};

template <typename T>
using Buffers = std::vector<std::unique_ptr<Buffer<T>>>;

// The arrays of one exchange, per rank.
struct Arrays {
  Buffers<int> topk_idx, pair_rank, pair_row, row_pair, token_rows, token_slot, expert_ids, counts,
      group_sizes, num_dropped, scratch, dispatch_ticket, combine_ticket;
  Buffers<char> x, rows, y, out, partials;
  Buffers<float> scales, scalars, row_scales, row_scalars, weights, scalars_out;
};

class Harness {
 public:
  Harness(Group& group, const Case& c) : group_(group), c_(c) {
    const Exchange& x = c.x;
    const size_t R = x.num_ranks, T = x.num_tokens, K = x.top_k, rows = x.num_rows, H = c.hidden;
    for (size_t r = 0; r < R; ++r) {
      const int d = group.devices()[r];
      auto ints = [&](Buffers<int>& b, size_t n) {
        b.push_back(std::make_unique<Buffer<int>>(d, n));
      };
      auto floats = [&](Buffers<float>& b, size_t n) {
        b.push_back(std::make_unique<Buffer<float>>(d, n));
      };
      auto chars = [&](Buffers<char>& b, size_t n) {
        b.push_back(std::make_unique<Buffer<char>>(d, n));
      };
      const auto first = c.topk_idx.begin() + r * T * K;
      a.topk_idx.push_back(
          std::make_unique<Buffer<int>>(d, std::vector<int>(first, first + T * K)));
      a.x.push_back(std::make_unique<Buffer<char>>(d, c.rows_in[r]));
      if (c.prequantized) a.scales.push_back(std::make_unique<Buffer<float>>(d, c.scales_in[r]));
      a.scalars.push_back(std::make_unique<Buffer<float>>(d, c.scalars_in[r]));
      for (auto* b : {&a.pair_rank, &a.pair_row}) ints(*b, T * K);
      for (auto* b : {&a.row_pair, &a.expert_ids}) ints(*b, rows);
      ints(a.token_rows, R * T * K);
      ints(a.token_slot, R * T);
      for (auto* b : {&a.counts, &a.group_sizes}) ints(*b, x.local_experts());
      for (auto* b : {&a.num_dropped, &a.dispatch_ticket, &a.combine_ticket}) ints(*b, 1);
      ints(a.scratch, plan_scratch_words(x));
      chars(a.rows, rows * row_bytes());
      chars(a.y, rows * H * size_of(c.type));
      chars(a.out, T * H * size_of(c.type));
      chars(a.partials,
            T * partial_slots(x) *
                (c.quantized_partials ? fp8_partial_bytes(c.hidden) : H * size_of(c.type)));
      for (auto* b : {&a.row_scalars, &a.weights}) floats(*b, rows);
      floats(a.row_scales, rows * (H / kScaleBlock));
      floats(a.scalars_out, T * K);
      cudaStream_t s;
      require(cudaSetDevice(d), "cudaSetDevice");
      require(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreate");
      streams.push_back(s);
    }
  }
  ~Harness() {
    for (size_t r = 0; r < streams.size(); ++r) {
      cudaSetDevice(group_.devices()[r]);
      cudaStreamDestroy(streams[r]);
    }
  }

  Element x_type() const { return c_.prequantized ? Element::kFp8 : c_.type; }
  bool delivers_scales() const { return c_.prequantized || c_.wire == Wire::kQuantized; }
  size_t row_bytes() const { return c_.hidden * (delivers_scales() ? 1 : size_of(c_.type)); }

  // Operations that are issued from now on record timings.
  void record_stats() {
    for (int d : group_.devices()) {
      stats_.push_back(std::make_unique<StatsRing>(d, group_.num_ranks()));
    }
  }

  // Issue one operation on every rank; `only` limits it to one rank.
  void plan(int only = -1) {
    run<PlanParams>(
        only, [&](int r) { return plan_params(r); },
        [&](const PlanParams* p, const Launch& how) { return launch_plan(p, c_.x, how); });
  }
  void dispatch(int only = -1) {
    run<DispatchParams>(
        only, [&](int r) { return dispatch_params(r); },
        [&](const DispatchParams* p, const Launch& how) {
          return launch_dispatch(p, x_type(), c_.wire, c_.hidden, how);
        });
  }
  void combine(int only = -1) {
    run<CombineParams>(
        only, [&](int r) { return combine_params(r); },
        [&](const CombineParams* p, const Launch& how) {
          const Wire wire = c_.quantized_partials ? Wire::kQuantized : Wire::kCopy;
          return launch_combine(p, c_.type, wire, how);
        });
  }

  // The same through slots, plan included; halves too.
  void slot_dispatch(int only = -1, Half half = Half::kBoth) {
    run<SlotDispatchParams>(
        only, [&](int r) { return slot_dispatch_params(r, half); },
        [&](const SlotDispatchParams* p, const Launch& how) {
          return launch_slot_dispatch(p, c_.x, x_type(), c_.wire, c_.hidden, how);
        });
  }
  void slot_combine(int only = -1, Half half = Half::kBoth) {
    run<SlotCombineParams>(
        only, [&](int r) { return slot_combine_params(r, half); },
        [&](const SlotCombineParams* p, const Launch& how) {
          return launch_slot_combine(p, c_.x, c_.type, c_.hidden, how);
        });
  }

  void synchronize() {
    for (size_t r = 0; r < streams.size(); ++r) {
      require(cudaSetDevice(group_.devices()[r]), "cudaSetDevice");
      require(cudaStreamSynchronize(streams[r]), "cudaStreamSynchronize");
    }
    const std::string fault = group_.describe_fault();
    if (!fault.empty()) throw std::runtime_error(fault);
  }

  Arrays a;
  std::vector<cudaStream_t> streams;

 private:
  Call call(int r, Operation o) const {
    Call c{};
    c.peers = group_.peers(r);
    if (!stats_.empty()) c.stats = stats_[r]->words();
    c.operation = o;
    c.signature = 0x1234 + static_cast<uint32_t>(o);
    return c;
  }
  template <typename B>
  void lend(Call& c, int slot, const B& b) const {
    group_.locate(0, b->data(), &c.lent.output[slot]);
    c.lent.bytes[slot] = b->bytes();
  }
  PlanArrays plan_arrays(int r) const {
    PlanArrays p{};
    p.pair_rank = a.pair_rank[r]->data();
    p.pair_row = a.pair_row[r]->data();
    p.row_pair = a.row_pair[r]->data();
    p.token_rows = a.token_rows[r]->data();
    p.token_slot = a.token_slot[r]->data();
    p.expert_ids = a.expert_ids[r]->data();
    p.counts = a.counts[r]->data();
    p.group_sizes = a.group_sizes[r]->data();
    p.num_dropped = a.num_dropped[r]->data();
    return p;
  }
  PlanParams plan_params(int r) const {
    PlanParams p{};
    p.call = call(r, Operation::kPlan);
    p.exchange = c_.x;
    p.topk_idx = a.topk_idx[r]->data();
    p.out = plan_arrays(r);
    p.scratch = a.scratch[r]->data();
    return p;
  }
  DispatchParams dispatch_params(int r) const {
    DispatchParams p{};
    p.call = call(r, Operation::kDispatch);
    p.exchange = c_.x;
    p.hidden = c_.hidden;
    p.row_bytes = int(row_bytes());
    p.zero_tail = c_.zero_tail;
    p.x = a.x[r]->data();
    p.scales = c_.prequantized ? a.scales[r]->data() : nullptr;
    p.scalars = c_.weights ? a.scalars[r]->data() : nullptr;
    p.pair_rank = a.pair_rank[r]->data();
    p.pair_row = a.pair_row[r]->data();
    p.row_pair = a.row_pair[r]->data();
    p.token_rows = a.token_rows[r]->data();
    p.rows = a.rows[r]->data();
    p.row_scales = delivers_scales() ? a.row_scales[r]->data() : nullptr;
    p.row_scalars = c_.weights ? a.row_scalars[r]->data() : nullptr;
    p.power_of_two_scales = c_.power_of_two;
    p.wire_percent = c_.wire_percent;
    lend(p.call, 0, a.rows[r]);
    lend(p.call, 1, a.row_scales[r]);
    lend(p.call, 2, a.row_scalars[r]);
    return p;
  }
  CombineParams combine_params(int r) const {
    CombineParams p{};
    p.call = call(r, Operation::kCombine);
    p.exchange = c_.x;
    p.hidden = c_.hidden;
    p.y = a.y[r]->data();
    p.weights = c_.weights ? a.weights[r]->data() : nullptr;
    p.row_scalars = c_.weights ? a.weights[r]->data() : nullptr;
    p.pair_rank = a.pair_rank[r]->data();
    p.pair_row = a.pair_row[r]->data();
    p.row_pair = a.row_pair[r]->data();
    p.token_rows = a.token_rows[r]->data();
    p.token_slot = a.token_slot[r]->data();
    p.out = a.out[r]->data();
    p.scalars = a.scalars_out[r]->data();
    p.partials = a.partials[r]->data();
    p.power_of_two_scales = c_.power_of_two;
    p.wire_percent = c_.wire_percent;
    lend(p.call, 0, a.partials[r]);
    lend(p.call, 1, a.scalars_out[r]);
    return p;
  }

  // Both halves have one signature, whatever operation they are called.
  Call slot_call(int r, Operation whole, Operation start, Operation done, Half half) const {
    Call c = call(r, whole);
    if (half == Half::kStart) c.operation = start;
    if (half == Half::kDone) c.operation = done;
    return c;
  }
  SlotDispatchParams slot_dispatch_params(int r, Half half) const {
    SlotDispatchParams p{};
    p.call = slot_call(r, Operation::kDispatch, Operation::kDispatchStart, Operation::kDispatchDone,
                       half);
    p.exchange = c_.x;
    p.half = half;
    p.hidden = c_.hidden;
    p.row_bytes = int(row_bytes());
    p.zero_tail = c_.zero_tail;
    p.power_of_two_scales = c_.power_of_two;
    p.x = a.x[r]->data();
    p.scales = c_.prequantized ? a.scales[r]->data() : nullptr;
    p.scalars = c_.weights ? a.scalars[r]->data() : nullptr;
    p.topk_idx = a.topk_idx[r]->data();
    p.started = p.ticket = a.dispatch_ticket[r]->data();
    p.plan = plan_arrays(r);
    p.rows = a.rows[r]->data();
    p.row_scales = delivers_scales() ? a.row_scales[r]->data() : nullptr;
    p.row_scalars = c_.weights ? a.row_scalars[r]->data() : nullptr;
    return p;
  }
  SlotCombineParams slot_combine_params(int r, Half half) const {
    SlotCombineParams p{};
    p.call =
        slot_call(r, Operation::kCombine, Operation::kCombineStart, Operation::kCombineDone, half);
    p.exchange = c_.x;
    p.half = half;
    p.hidden = c_.hidden;
    p.quantized = c_.quantized_partials;
    p.power_of_two_scales = c_.power_of_two;
    p.y = a.y[r]->data();
    p.weights = c_.weights ? a.weights[r]->data() : nullptr;
    p.pair_rank = a.pair_rank[r]->data();
    p.pair_row = a.pair_row[r]->data();
    p.token_rows = a.token_rows[r]->data();
    p.started = p.ticket = a.combine_ticket[r]->data();
    p.out = a.out[r]->data();
    return p;
  }

  template <typename P, typename Make, typename Go>
  void run(int only, Make&& make, Go&& go) {
    const int R = c_.x.num_ranks;
    if (c_.single_launch) {
      std::vector<P> all;
      for (int r = 0; r < R; ++r) all.push_back(make(r));
      Buffer<P> on_device(group_.devices()[0], all);
      require(go(on_device.data(), Launch{c_.num_sms, streams[0], R}), "launch");
      synchronize();
      return;
    }
    for (int r = 0; r < R; ++r) {
      if (only >= 0 && r != only) continue;
      require(cudaSetDevice(group_.devices()[r]), "cudaSetDevice");
      const P p = make(r);
      require(go(&p, Launch{c_.num_sms, streams[r], 0}), "launch");
    }
  }

  std::vector<std::unique_ptr<StatsRing>> stats_;  // of each rank, or none
  Group& group_;
  const Case& c_;
};

}  // namespace jax_ep
