// SPDX-License-Identifier: Apache-2.0
// A few ranks on one GPU or several, a clock, and the means to go wrong: a rank runs a program of
// operations, or none, or another one, as plain launches or as one replayed graph; words of control
// blocks and slots can be read and written while kernels run.
#pragma once
#include <chrono>
#include <cstddef>
#include <functional>
#include <map>

#include "harness.cuh"
#include "replay.h"
#include "semantics.h"

namespace jax_ep {

constexpr double kTimeout = 0.4;
constexpr char kMark = 0x5a;  // what no kernel leaves in a result

// An operation as a program names it: of the large path, through slots, or one half of the latter.
enum class Step {
  kPlan,
  kDispatch,
  kCombine,
  kSlotDispatch,
  kSlotCombine,
  kDispatchStart,
  kDispatchDone,
  kCombineStart,
  kCombineDone,
};

// What one rank runs.
using Program = std::vector<Step>;
inline const Program kNothing, kPlan{Step::kPlan}, kDispatch{Step::kDispatch},
    kCombine{Step::kCombine}, kSlotDispatch{Step::kSlotDispatch}, kSlotCombine{Step::kSlotCombine},
    kStart{Step::kDispatchStart}, kDone{Step::kDispatchDone}, kCombineStart{Step::kCombineStart},
    kCombineDone{Step::kCombineDone}, kExchange{Step::kPlan, Step::kDispatch, Step::kCombine},
    kSlots{Step::kSlotDispatch, Step::kSlotCombine},
    kHalves{Step::kDispatchStart, Step::kDispatchDone, Step::kCombineStart, Step::kCombineDone};

// The first `count` operations of `in_turn`, again and again.
inline Program operations(int count, const Program& in_turn = kExchange) {
  Program p;
  for (int i = 0; i < count; ++i) p.push_back(in_turn[i % in_turn.size()]);
  return p;
}

inline Program operator+(Program a, const Program& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

inline Case small_case(int num_ranks) {
  std::mt19937 rng(3);
  Case c;
  const int R = num_ranks, E = 4 * R;
  c.x = Exchange{R, E, 40, 3, R * 40 * 3, 1, 0};
  c.hidden = 256;
  c.num_sms = 8;
  for (int i = 0; i < R * 40 * 3; ++i) c.topk_idx.push_back(int(rng() % E));
  for (int r = 0; r < R; ++r) {
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
  const Case c;
  const HostPlan plan = host_plan(c.x, c.topk_idx);
  const ControlLayout at = control_layout(c.x.num_ranks);
  const SlotSize slots{c.x.num_tokens, c.hidden * 2};
  Group group;
  Harness h{group, c};
  bool replayed = false;
  uint64_t generation = 0;

  // Rank r on device `devices[r]`; `timeout_s` bounds every wait.
  explicit Scene(const std::vector<int>& devices = {0, 0}, double timeout_s = kTimeout)
      : c(small_case(int(devices.size()))), group(devices, slots), timeout_s_(timeout_s) {
    require(cudaSetDevice(devices[0]), "cudaSetDevice");
    require(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "cudaStreamCreate");
    const size_t rows = c.x.num_rows, R = num_ranks();
    Bytes y(rows * c.hidden * 2);
    for (size_t i = 0; i < y.size() / 2; ++i) set_element(y, c.type, i, float(i % 89) - 44);
    const std::vector<float> weights(rows, 0.25f);
    for (size_t r = 0; r < R; ++r) {
      copy_in(h.a.y[r]->data(), y.data(), y.size());
      copy_in(h.a.weights[r]->data(), weights.data(), rows * sizeof(float));
      want_rows_.push_back(host_dispatch(c, plan, int(r)).rows);
      want_out_.push_back(host_combine(c, plan, std::vector<Bytes>(R, y),
                                       std::vector<std::vector<float>>(R, weights), int(r)));
    }
    restart();
  }
  int num_ranks() const { return c.x.num_ranks; }

  // A new generation, with good routing. Graphs stay, as do the buffers whose addresses they hold.
  void restart() {
    const std::vector<int>& devices = group.devices();
    const auto here = std::count(devices.begin(), devices.end(), devices[0]);
    group.reset(++generation, timeout_s_, int(here));
    const size_t pairs = c.x.num_pairs();
    for (int r = 0; r < num_ranks(); ++r) {
      copy_in(h.a.topk_idx[r]->data(), &c.topk_idx[r * pairs], pairs * sizeof(int));
    }
  }
  void set_choice(int r, int pair, int expert) {
    copy_in(h.a.topk_idx[r]->data() + pair, &expert, sizeof expert);
  }

  void launch(int r, const Program& program) {
    for (Step step : program) {
      switch (step) {
        case Step::kPlan:
          h.plan(r);
          break;
        case Step::kDispatch:
          h.dispatch(r);
          break;
        case Step::kCombine:
          h.combine(r);
          break;
        case Step::kSlotDispatch:
          h.slot_dispatch(r);
          break;
        case Step::kSlotCombine:
          h.slot_combine(r);
          break;
        case Step::kDispatchStart:
          h.slot_dispatch(r, Half::kStart);
          break;
        case Step::kDispatchDone:
          h.slot_dispatch(r, Half::kDone);
          break;
        case Step::kCombineStart:
          h.slot_combine(r, Half::kStart);
          break;
        case Step::kCombineDone:
          h.slot_combine(r, Half::kDone);
          break;
      }
    }
  }
  // Put a program on a rank's stream; replayed, all of it as one graph.
  void issue(int r, const Program& program) {
    if (!replayed) return launch(r, program);
    const Replay& graph = prepare(r, program);
    require(cudaSetDevice(group.devices()[r]), "cudaSetDevice");
    graph.launch(h.streams[r]);
  }
  // The same on another stream; rank 0 or one that shares its device.
  void issue_aside(int r, const Program& program) {
    std::swap(h.streams[r], side_);
    issue(r, program);
    std::swap(h.streams[r], side_);
  }
  // The graph of a program, captured the first time.
  Replay& prepare(int r, const Program& program) {
    auto& graph = graphs_[{r, program}];
    if (graph == nullptr) {
      require(cudaSetDevice(group.devices()[r]), "cudaSetDevice");
      graph = std::make_unique<Replay>(h.streams[r], [&] { launch(r, program); });
    }
    return *graph;
  }
  // Seconds until all that `f` issues has ended.
  double seconds(const std::function<void()>& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    for (int device : group.devices()) {
      require(cudaSetDevice(device), "cudaSetDevice");
      require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  // Seconds until ranks 0, 1, ... have ended their programs.
  double run(const std::vector<Program>& programs) {
    auto each = [&](auto&& f) {
      for (size_t r = 0; r < programs.size(); ++r) {
        if (!programs[r].empty()) f(int(r));
      }
    };
    if (replayed) each([&](int r) { prepare(r, programs[r]); });
    return seconds([&] { each([&](int r) { issue(r, programs[r]); }); });
  }
  double run(const Program& of_rank_0, const Program& of_rank_1) {
    return run(std::vector<Program>{of_rank_0, of_rank_1});
  }
  double run_all(const Program& program) { return run(std::vector<Program>(num_ranks(), program)); }
  // Put one operation on a rank's stream, and wait until its kernel runs. False: it does not.
  bool issue_until_it_runs(int r, const Program& one) {
    const uint64_t before = read(r, began());
    issue(r, one);
    for (int i = 0; i < 1000; ++i) {
      if (read(r, began()) != before) return true;
    }
    return false;
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
    require(cudaSetDevice(group.devices()[r]), "cudaSetDevice");
    require(cudaMemset(h.a.rows[r]->data(), kMark, h.a.rows[r]->bytes()), "cudaMemset");
    require(cudaMemset(h.a.out[r]->data(), kMark, h.a.out[r]->bytes()), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void mark_all() {
    for (int r = 0; r < num_ranks(); ++r) mark(r);
  }
  void poison(int r) {
    h.a.rows[r]->poison();
    h.a.out[r]->poison();
  }
  void poison_all() {
    for (int r = 0; r < num_ranks(); ++r) poison(r);
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
    for (int r = 0; r < num_ranks(); ++r) right = right && rows_are_right(r) && out_is_right(r);
    return right;
  }
  // Whether a whole exchange comes out right.
  bool works(const Program& exchange = kExchange) {
    poison_all();
    run_all(exchange);
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
  size_t began() const { return at.header + offsetof(Header, began); }
  size_t lease_of_rank_1() const { return at.lease + sizeof(uint64_t); }
  size_t left_by_rank_1() const { return at.left + sizeof(uint64_t); }
  // Write the mark into rank r's rows, as a peer would that pushes; kernels may run.
  void push_mark(int r) {
    require(cudaMemsetAsync(h.a.rows[r]->data(), kMark, h.a.rows[r]->bytes(), side_),
            "cudaMemsetAsync");
    require(cudaStreamSynchronize(side_), "cudaStreamSynchronize");
  }

  // What peers have put into rank r's slots for one kind of operation; no kernel runs.
  Bytes slots_of(int r, SlotKind kind) {
    Bytes bytes(slot_bytes(num_ranks(), slots) / 2);
    const size_t first = at.total + size_t(kind) * bytes.size();
    copy_aside(bytes.data(), group.peers(r).control[r] + first, bytes.size());
    return bytes;
  }
  // Where rank 0 finds what rank 1 has sent with its last start of a kind.
  size_t last_from_rank_1(SlotKind kind) {
    const size_t i = size_t(kind), one = slot_layout(slots).total;
    const size_t parity = read(1, at.header + offsetof(Header, started) + 8 * i) & 1;
    return at.total + ((i * 2 + parity) * num_ranks() + 1) * one;
  }
  // Zeros into rank r's control block and slots, as if these words had never come.
  void erase(int r, size_t offset, size_t bytes) {
    const Bytes zeros(bytes);
    copy_aside(group.peers(r).control[r] + offset, zeros.data(), bytes);
  }
  // The ticket of rank 0's last dispatch start.
  int ticket() { return h.a.dispatch_ticket[0]->host()[0]; }
  void set_ticket(int ticket) { copy_in(h.a.dispatch_ticket[0]->data(), &ticket, sizeof ticket); }

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

  double timeout_s_;
  std::vector<Bytes> want_rows_, want_out_;
  std::map<std::pair<int, Program>, std::unique_ptr<Replay>> graphs_;
  cudaStream_t side_;
};

}  // namespace jax_ep
