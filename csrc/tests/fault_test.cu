// SPDX-License-Identifier: Apache-2.0
// What happens when something goes wrong: two ranks on one GPU, one of which is absent, late,
// stuck, or runs something else. Every case must end in bounded time, name who failed, write
// nothing into memory that is no longer lent, and leave a group that works after a reset.
#include <chrono>
#include <functional>

#include "expect.h"
#include "semantics.h"

namespace jax_ep {
namespace {

constexpr double kTimeout = 0.4;
Case two_ranks() {
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

// One group, one exchange, and a clock.
struct Scene {
  Case c = two_ranks();
  Group group{{0, 0}};
  std::unique_ptr<Harness> h;
  uint64_t generation = 0;

  Scene() { restart(); }
  void restart() {
    group.reset(++generation, kTimeout, 2);
    h = std::make_unique<Harness>(group, c);
  }
  void poison() {
    for (int r = 0; r < 2; ++r) h->a.rows[r]->poison();
  }
  // Whether a whole exchange comes out right.
  bool works() {
    const HostPlan plan = host_plan(c.x, c.topk_idx);
    h->plan();
    h->dispatch();
    h->synchronize();
    bool right = true;
    for (int r = 0; r < 2; ++r) right &= h->a.rows[r]->host() == host_dispatch(c, plan, r).rows;
    return right;
  }
  double seconds(const std::function<void()>& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  bool all_nan(int r) {
    for (char byte : h->a.rows[r]->host()) {
      if (byte != char(0xff)) return false;
    }
    return true;
  }
  FaultRecord fault(int r) { return group.fault(r); }
  // A word in rank r's control block.
  void write(int r, uint32_t offset, int index, uint64_t value) {
    char* at = group.peers(r).control[r] + offset + index * sizeof(uint64_t);
    require(cudaMemcpy(at, &value, sizeof value, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
};

bool is(const FaultRecord& f, Fault fault, Operation operation, int rank, int awaited) {
  const bool same = f.fault == uint32_t(fault) && f.operation == uint32_t(operation) &&
                    f.rank == rank && f.awaited == awaited;
  if (!same) {
    std::printf("  fault %u operation %u rank %d awaited %d phase %u\n", f.fault, f.operation,
                f.rank, f.awaited, f.phase);
  }
  return same;
}

void a_peer_that_never_arrives(Scene& s) {
  EXPECT(s.works());
  s.poison();
  EXPECT(s.seconds([&] { s.h->dispatch(0); }) < 2 * kTimeout);
  EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kDispatch, 0, 1));
  EXPECT(s.all_nan(0));
  EXPECT(s.group.describe_fault().find("rank 0 gave up on rank 1") != std::string::npos);
  // Later operations of the program return at once.
  EXPECT(s.seconds([&] {
    for (int i = 0; i < 60; ++i) s.h->combine(0);
  }) < 0.2);
  // The late peer finds the group broken and writes nothing.
  require(cudaMemset(s.h->a.rows[0]->data(), 0x5a, s.h->a.rows[0]->bytes()), "cudaMemset");
  EXPECT(s.seconds([&] { s.h->dispatch(1); }) < 0.2);
  for (char byte : s.h->a.rows[0]->host()) {
    if (byte != 0x5a) {
      EXPECT(!"the late peer wrote into memory that was given back");
      break;
    }
  }
  EXPECT(s.all_nan(1));
  EXPECT(is(s.fault(1), Fault::kPeer, Operation::kDispatch, 1, 0));
  s.restart();
  EXPECT(s.works());
}

void a_peer_that_never_plans(Scene& s) {
  EXPECT(s.seconds([&] { s.h->plan(0); }) < 2 * kTimeout);
  EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kPlan, 0, 1));
  for (int counts : s.h->a.counts[0]->host()) EXPECT(counts == 0);
  for (int row : s.h->a.pair_row[0]->host()) EXPECT(row == -1);
  s.restart();
  EXPECT(s.works());
}

// The peer's late kernel must not push even if it was not told: only the lease says so.
void a_late_peer_that_was_not_told(Scene& s) {
  EXPECT(s.works());
  s.poison();
  s.h->dispatch(0);
  require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const ControlLayout at = control_layout(2);
  s.write(1, at.header, 2, 0);  // `broken` of rank 1
  require(cudaMemset(s.h->a.rows[0]->data(), 0x5a, s.h->a.rows[0]->bytes()), "cudaMemset");
  EXPECT(s.seconds([&] { s.h->dispatch(1); }) < 2 * kTimeout);
  EXPECT(is(s.fault(1), Fault::kRevoked, Operation::kDispatch, 1, 0));
  for (char byte : s.h->a.rows[0]->host()) EXPECT(byte == 0x5a);
  s.restart();
  EXPECT(s.works());
}

// A peer that took the lease and then stopped: the owner waits for it, but not for ever.
void a_peer_that_dies_while_pushing(Scene& s) {
  s.restart();
  EXPECT(s.works());
  const ControlLayout at = control_layout(2);
  const uint64_t open =
      make_tag(s.generation, 3, 0x1234 + 2);  // the harness's signature of dispatch
  cudaStream_t side;
  require(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "cudaStreamCreate");
  const double took = s.seconds([&] {
    s.h->dispatch(0);
    const uint64_t taken = open | kTaken;
    char* lease = s.group.peers(0).control[0] + at.lease + sizeof(uint64_t);
    uint64_t seen = 0;
    for (int i = 0; i < 1000 && seen != open; ++i) {  // until rank 0 has lent its output
      require(cudaMemcpyAsync(&seen, lease, 8, cudaMemcpyDeviceToHost, side), "cudaMemcpyAsync");
      require(cudaStreamSynchronize(side), "cudaStreamSynchronize");
    }
    EXPECT(seen == open);
    require(cudaMemcpyAsync(lease, &taken, 8, cudaMemcpyHostToDevice, side), "cudaMemcpyAsync");
    require(cudaStreamSynchronize(side), "cudaStreamSynchronize");
  });
  EXPECT(took > kTimeout && took < 2 * kTimeout);
  EXPECT(s.all_nan(0));
  s.restart();
  EXPECT(s.works());
}

void another_operation_on_one_rank(Scene& s) {
  EXPECT(s.works());
  const double took = s.seconds([&] {
    s.h->dispatch(0);
    s.h->combine(1);
  });
  EXPECT(took < kTimeout);  // seen at once, no need to wait
  const bool first = is(s.fault(0), Fault::kMismatch, Operation::kDispatch, 0, 1);
  const bool second = !first && is(s.fault(1), Fault::kMismatch, Operation::kCombine, 1, 0);
  EXPECT(first || second);
  s.restart();
  EXPECT(s.works());
}

void a_plan_against_a_dispatch(Scene& s) {
  EXPECT(s.works());
  EXPECT(s.seconds([&] {
    s.h->dispatch(0);
    s.h->plan(1);
  }) < 2 * kTimeout);
  EXPECT(!s.group.describe_fault().empty());
  s.restart();
  EXPECT(s.works());
}

void routing_out_of_range(Scene& s) {
  const int bad = 8;
  require(cudaMemcpy(s.h->a.topk_idx[1]->data() + 5, &bad, 4, cudaMemcpyHostToDevice),
          "cudaMemcpy");
  EXPECT(s.seconds([&] {
    s.h->plan();
    s.h->dispatch();
  }) < kTimeout);
  EXPECT(is(s.fault(1), Fault::kRouting, Operation::kPlan, 1, 1));
  EXPECT(s.group.describe_fault().find("topk_idx 8, expected -1 to 7") != std::string::npos);
  EXPECT(s.all_nan(0) && s.all_nan(1));
  s.restart();
  EXPECT(s.works());
}

// The same under replay of a captured graph, where no host code of ours runs.
void an_absent_peer_under_graph_replay(Scene& s) {
  EXPECT(s.works());
  cudaGraphExec_t graphs[2];
  for (int r = 0; r < 2; ++r) {
    require(cudaStreamBeginCapture(s.h->streams[r], cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < 30; ++i) {
      s.h->plan(r);
      s.h->dispatch(r);
    }
    cudaGraph_t graph;
    require(cudaStreamEndCapture(s.h->streams[r], &graph), "end capture");
    require(cudaGraphInstantiate(&graphs[r], graph, 0), "instantiate");
  }
  auto replay = [&](int r) { require(cudaGraphLaunch(graphs[r], s.h->streams[r]), "launch"); };
  s.poison();
  EXPECT(s.seconds([&] { replay(0), replay(1); }) < kTimeout);
  const HostPlan plan = host_plan(s.c.x, s.c.topk_idx);
  EXPECT(s.h->a.rows[0]->host() == host_dispatch(s.c, plan, 0).rows);
  EXPECT(s.seconds([&] { replay(0); }) < 2 * kTimeout);
  EXPECT(is(s.fault(0), Fault::kTimeout, Operation::kPlan, 0, 1));
  EXPECT(s.all_nan(0));
  s.group.reset(++s.generation, kTimeout, 2);  // the old graphs serve the new generation
  s.poison();
  EXPECT(s.seconds([&] { replay(0), replay(1); }) < kTimeout);
  EXPECT(s.h->a.rows[1]->host() == host_dispatch(s.c, plan, 1).rows);
  EXPECT(s.group.describe_fault().empty());
  s.restart();
}

}  // namespace
}  // namespace jax_ep

int main() {
  using namespace jax_ep;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    Scene s;
    const std::pair<const char*, void (*)(Scene&)> cases[] = {
        {"a peer that never arrives", a_peer_that_never_arrives},
        {"a peer that never plans", a_peer_that_never_plans},
        {"a late peer that was not told", a_late_peer_that_was_not_told},
        {"a peer that dies while pushing", a_peer_that_dies_while_pushing},
        {"another operation on one rank", another_operation_on_one_rank},
        {"a plan against a dispatch", a_plan_against_a_dispatch},
        {"routing out of range", routing_out_of_range},
        {"an absent peer under graph replay", an_absent_peer_under_graph_replay},
    };
    for (const auto& [name, run] : cases) {
      const int before = failures;
      run(s);
      std::printf("%s: %s\n", name, failures == before ? "ok" : s.group.describe_fault().c_str());
    }
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    return 3;
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
