// SPDX-License-Identifier: Apache-2.0
// Eight ranks with one token each run hundreds of tiny operations on one GPU, nothing between them,
// on the large path, through slots and in halves: blocks of one operation come when peers are
// already in the next. Results are the operands of the
// next round and every round doubles or halves them, so an old, missing or misplaced row of any
// round is seen in the end.
#include <algorithm>

#include "expect.h"
#include "harness.cuh"
#include "replay.h"
#include "semantics.h"

namespace jax_ep {
namespace {

constexpr int kRanks = 8, kTopK = 8, kExperts = 16;
constexpr SlotSize kSlots{1, 1024};
constexpr int kRoundsUp = 50, kTimes = 5;  // doubled 50 times, halved 50 times, all that 5 times

Case one_token(int num_sms) {
  std::mt19937 rng(7);
  Case c;
  c.x = Exchange{kRanks, kExperts, 1, kTopK, kRanks * (kExperts / kRanks), 1, 0};
  c.hidden = 512;
  c.num_sms = num_sms;
  std::vector<int> experts(kExperts);
  for (int e = 0; e < kExperts; ++e) experts[e] = e;
  for (int r = 0; r < kRanks; ++r) {
    std::shuffle(experts.begin(), experts.end(), rng);
    c.topk_idx.insert(c.topk_idx.end(), experts.begin(), experts.begin() + kTopK);
    Bytes row(c.hidden * 2);  // small integers: no sum is rounded
    for (int i = 0; i < c.hidden; ++i) set_element(row, c.type, i, float((i + 5 * r) % 31) - 15);
    c.rows_in.push_back(row);
    c.scalars_in.push_back(std::vector<float>(kTopK, 0.5f));
  }
  return c;
}

enum class Path { kDirect, kSlots, kHalves };
constexpr const char* kPathNames[] = {"direct", "slots", "halves"};

struct Rounds {
  Harness h;
  Path path;
  Buffers<float> other_weights;  // the rows' weights, while `h` has those of the other direction

  Rounds(Group& group, const Case& c, Path path) : h(group, c), path(path) {
    const std::vector<float> doubling(c.x.num_rows, 2.0f / kTopK),
        halving(c.x.num_rows, 0.5f / kTopK);
    for (int r = 0; r < kRanks; ++r) {
      h.a.weights[r] = std::make_unique<Buffer<float>>(0, doubling);
      other_weights.push_back(std::make_unique<Buffer<float>>(0, halving));
    }
  }
  void turn() { std::swap(h.a.weights, other_weights); }
  // An even number of rounds, after which the buffers are back in their places. `rank` -1: all.
  void issue(int rank) {
    for (int i = 0; i < kRoundsUp; ++i) {
      dispatch(rank, i);
      std::swap(h.a.rows, h.a.y);
      combine(rank);
      std::swap(h.a.out, h.a.x);
    }
  }
  void dispatch(int rank, int round) {
    if (path == Path::kSlots) return h.slot_dispatch(rank);
    if (path == Path::kHalves) {
      h.slot_dispatch(rank, Half::kStart);
      return h.slot_dispatch(rank, Half::kDone);
    }
    if (round % 5 == 0) h.plan(rank);
    h.dispatch(rank);
  }
  void combine(int rank) {
    if (path == Path::kDirect) return h.combine(rank);
    if (path == Path::kSlots) return h.slot_combine(rank);
    h.slot_combine(rank, Half::kStart);
    h.slot_combine(rank, Half::kDone);
  }
  void run_plain() {
    for (int i = 0; i < 2 * kTimes; ++i, turn()) issue(-1);
  }
  void run_replayed() {
    std::unique_ptr<Replay> graphs[2][kRanks];
    for (auto& direction : graphs) {
      for (int r = 0; r < kRanks; ++r) {
        direction[r] = std::make_unique<Replay>(h.streams[r], [&] { issue(r); });
      }
      turn();
    }
    for (int i = 0; i < 2 * kTimes; ++i) {
      for (int r = 0; r < kRanks; ++r) graphs[i % 2][r]->launch(h.streams[r]);
    }
    h.synchronize();  // before the graphs go
  }
};

void tiny_operations_in_a_row(Group& group, uint64_t generation, Path path, int num_sms,
                              bool replayed) {
  const int before = failures;
  group.reset(generation, 5.0, kRanks);
  const Case c = one_token(num_sms);
  Rounds rounds(group, c, path);
  replayed ? rounds.run_replayed() : rounds.run_plain();
  rounds.h.synchronize();
  for (int r = 0; r < kRanks; ++r) EXPECT(rounds.h.a.x[r]->host() == c.rows_in[r]);
  std::printf("%s, %d blocks a rank, %s: %s\n", kPathNames[int(path)], num_sms,
              replayed ? "replayed" : "plain", failures == before ? "ok" : "differs");
}

}  // namespace
}  // namespace jax_ep

int main() {
  using namespace jax_ep;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    Group group(std::vector<int>(kRanks, 0), kSlots);
    uint64_t generation = 0;
    for (Path path : {Path::kDirect, Path::kSlots, Path::kHalves}) {
      for (int num_sms : {1, 2, 5, 12}) {
        for (bool replayed : {false, true}) {
          tiny_operations_in_a_row(group, ++generation, path, num_sms, replayed);
        }
      }
    }
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    return 3;
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
