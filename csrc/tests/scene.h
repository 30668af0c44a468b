// SPDX-License-Identifier: Apache-2.0
// Two ranks on one GPU, a clock, and the means to go wrong: a rank runs a program of operations, or
// none, or another one, as plain launches or as one replayed graph; words of control blocks can be
// read and written while kernels run.
#pragma once
#include <chrono>
#include <cstddef>
#include <functional>
#include <map>

#include "replay.h"
#include "semantics.h"

namespace jax_ep {

constexpr double kTimeout = 0.4;
constexpr char kMark = 0x5a;  // what no kernel leaves in a result

// What one rank runs.
using Program = std::vector<Operation>;
inline const Program kNothing, kPlan{Operation::kPlan}, kDispatch{Operation::kDispatch},
    kCombine{Operation::kCombine}, kStart{Operation::kDispatchStart},
    kDone{Operation::kDispatchDone}, kCombineStart{Operation::kCombineStart},
    kCombineDone{Operation::kCombineDone};

// The first `count` operations of plan, dispatch, combine, plan, ...
inline Program operations(int count) {
  const Operation in_turn[] = {Operation::kPlan, Operation::kDispatch, Operation::kCombine};
  Program p;
  for (int i = 0; i < count; ++i) p.push_back(in_turn[i % 3]);
  return p;
}
inline const Program kExchange = operations(3);

inline Case two_ranks() {
  std::mt19937 rng(3);
  Case c;
  c.x = Exchange{2, 8, 40, 3, 2 * 40 * 3, 1, 0};
  c.hidden = 256;
  c.num_sms = 8;
  for (int i = 0; i < 2 * 40 * 3; ++i) c.topk_idx.push_back(int(rng() % 8));
  for (int r = 0; r < 2; ++r) {
    Bytes rows(size_t(40) * c.hidden * 2);
    for (size_t i = 0; i < rows.size() / 2; ++i) set_element(rows, c.type, i, float(i % 97) - 48);
    c.rows_in.push_back(rows);
    c.scalars_in.push_back(std::vector<float>(40 * 3, 0.5f));
  }
  return c;
}

inline bool all_are(const Bytes& bytes, char value) {
  return std::all_of(bytes.begin(), bytes.end(), [=](char byte) { return byte == value; });
}

struct Scene {
  const Case c = two_ranks();
  const HostPlan plan = host_plan(c.x, c.topk_idx);
  const ControlLayout at = control_layout(2);
  Group group{{0, 0}, SlotSize{c.x.num_tokens, c.hidden * 2}};
  Harness h{group, c};
  bool replayed = false;
  uint64_t generation = 0;

  Scene() {
    require(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "cudaStreamCreate");
    const size_t rows = c.x.num_rows;
    Bytes y(rows * c.hidden * 2);
    for (size_t i = 0; i < y.size() / 2; ++i) set_element(y, c.type, i, float(i % 89) - 44);
    const std::vector<float> weights(rows, 0.25f);
    for (int r = 0; r < 2; ++r) {
      copy_in(h.a.y[r]->data(), y.data(), y.size());
      copy_in(h.a.weights[r]->data(), weights.data(), rows * sizeof(float));
      want_rows_.push_back(host_dispatch(c, plan, r).rows);
      want_out_.push_back(host_combine(c, plan, {y, y}, {weights, weights}, r));
    }
    restart();
  }

  // A new generation, with good routing. Graphs stay, as do the buffers whose addresses they hold.
  void restart() {
    group.reset(++generation, kTimeout, 2);
    const size_t pairs = c.x.num_pairs();
    for (int r = 0; r < 2; ++r) {
      copy_in(h.a.topk_idx[r]->data(), &c.topk_idx[r * pairs], pairs * sizeof(int));
    }
  }
  void set_choice(int r, int pair, int expert) {
    copy_in(h.a.topk_idx[r]->data() + pair, &expert, sizeof expert);
  }

  void launch(int r, const Program& program) {
    for (Operation o : program) {
      if (o == Operation::kPlan) h.plan(r);
      if (o == Operation::kDispatch) h.dispatch(r);
      if (o == Operation::kCombine) h.combine(r);
      if (o == Operation::kDispatchStart) h.slot_dispatch(r, Half::kStart);
      if (o == Operation::kDispatchDone) h.slot_dispatch(r, Half::kDone);
      if (o == Operation::kCombineStart) h.slot_combine(r, Half::kStart);
      if (o == Operation::kCombineDone) h.slot_combine(r, Half::kDone);
    }
  }
  // Put a program on a rank's stream; replayed, all of it as one graph.
  void issue(int r, const Program& program) {
    if (!replayed) return launch(r, program);
    prepare(r, program).launch(h.streams[r]);
  }
  // The same on another stream.
  void issue_aside(int r, const Program& program) {
    std::swap(h.streams[r], side_);
    issue(r, program);
    std::swap(h.streams[r], side_);
  }
  // The graph of a program, captured the first time.
  Replay& prepare(int r, const Program& program) {
    auto& graph = graphs_[{r, program}];
    if (graph == nullptr) {
      graph = std::make_unique<Replay>(h.streams[r], [&] { launch(r, program); });
    }
    return *graph;
  }
  double seconds(const std::function<void()>& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  // Seconds until both ranks have ended their programs.
  double run(const Program& of_rank_0, const Program& of_rank_1) {
    const Program* programs[] = {&of_rank_0, &of_rank_1};
    auto each = [&](auto&& f) {
      for (int r = 0; r < 2; ++r) {
        if (!programs[r]->empty()) f(r);
      }
    };
    if (replayed) each([&](int r) { prepare(r, *programs[r]); });
    return seconds([&] { each([&](int r) { issue(r, *programs[r]); }); });
  }
  // Let rank 0 dispatch until it has lent its output to rank 1. The open lease; 0 if there is none.
  uint64_t dispatch_until_lent() {
    const uint64_t epoch = read(0, at.header + offsetof(Header, epoch)) + 1;
    issue(0, kDispatch);
    for (int i = 0; i < 1000; ++i) {
      const uint64_t lease = read(0, lease_of_rank_1());
      if (lease >> 24 == make_tag(generation, epoch, 0) >> 24) return lease;
    }
    return 0;
  }

  // Results of rank r: set to a mark, or to NaN; and what they are.
  void mark(int r) {
    require(cudaMemset(h.a.rows[r]->data(), kMark, h.a.rows[r]->bytes()), "cudaMemset");
    require(cudaMemset(h.a.out[r]->data(), kMark, h.a.out[r]->bytes()), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void poison(int r) {
    h.a.rows[r]->poison();
    h.a.out[r]->poison();
  }
  bool rows_are(int r, char byte) { return all_are(h.a.rows[r]->host(), byte); }
  bool out_is(int r, char byte) { return all_are(h.a.out[r]->host(), byte); }
  bool rows_are_nan(int r, int part = 1) { return is_nan(h.a.rows[r]->host(), part); }
  bool out_is_nan(int r, int part = 1) { return is_nan(h.a.out[r]->host(), part); }
  bool plan_is_none(int r) {
    const std::vector<int> rows = h.a.pair_row[r]->host();
    return rows == std::vector<int>(rows.size(), -1);
  }
  // After `poison`: the tail of the rows is not written.
  bool rows_are_right(int r) { return h.a.rows[r]->host() == want_rows_[r]; }
  bool out_is_right(int r) { return h.a.out[r]->host() == want_out_[r]; }
  bool all_right() {
    bool right = group.describe_fault().empty();
    for (int r = 0; r < 2; ++r) right = right && rows_are_right(r) && out_is_right(r);
    return right;
  }
  // Whether a whole exchange comes out right.
  bool works() {
    for (int r = 0; r < 2; ++r) poison(r);
    run(kExchange, kExchange);
    return all_right();
  }

  FaultRecord fault(int r) { return group.fault(r); }

  // A word in rank r's control block; kernels may run.
  uint64_t read(int r, size_t offset) {
    uint64_t value;
    copy_aside(&value, group.peers(r).control[r] + offset, sizeof value);
    return value;
  }
  void write(int r, size_t offset, uint64_t value) {
    copy_aside(group.peers(r).control[r] + offset, &value, sizeof value);
  }
  size_t broken() const { return at.header + offsetof(Header, broken); }
  size_t lease_of_rank_1() const { return at.lease + sizeof(uint64_t); }
  size_t left_by_rank_1() const { return at.left + sizeof(uint64_t); }
  // Write the mark into rank r's rows, as a peer would that pushes; kernels may run.
  void push_mark(int r) {
    require(cudaMemsetAsync(h.a.rows[r]->data(), kMark, h.a.rows[r]->bytes(), side_),
            "cudaMemsetAsync");
    require(cudaStreamSynchronize(side_), "cudaStreamSynchronize");
  }

 private:
  // The first `part`-th.
  static bool is_nan(Bytes bytes, int part) {
    bytes.resize(bytes.size() / part);
    return all_are(bytes, char(0xff));
  }
  static void copy_in(void* to, const void* from, size_t bytes) {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void copy_aside(void* to, const void* from, size_t bytes) {
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, side_), "cudaMemcpyAsync");
    require(cudaStreamSynchronize(side_), "cudaStreamSynchronize");
  }

  std::vector<Bytes> want_rows_, want_out_;
  std::map<std::pair<int, Program>, std::unique_ptr<Replay>> graphs_;
  cudaStream_t side_;
};

}  // namespace jax_ep
