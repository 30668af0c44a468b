// SPDX-License-Identifier: Apache-2.0
// combine's large path on the emulated machine, whose memory shows stores to peers late and in any
// order and whose copies to shared memory end late, against the host, bit for bit; and what becomes
// of it when a rank stays away.
//
//   combine_test [--cases N] [--seed S] [--ranks R] [--faults]
#include "../../kernels/combine_parts.cuh"
#include "../random_case.h"
#include "combine_world.h"
#include "large.h"

namespace jax_ep {
namespace {

// Bounds of waits, in ms of the machine.
constexpr double kForever = 1e9, kShort = 100;
constexpr int kCombines = 3;  // of a case, in a row

class Series {
 public:
  explicit Series(uint64_t seed) : rng_(seed), cases_(rng_, {true, false, 5}) {}

  std::vector<Combine> next(int ranks) {
    std::vector<Combine> all;
    for (int i = 0; i < kCombines; ++i) all.push_back(next_combine(ranks));
    return all;
  }
  // Few tokens, or many of which several are a chunk; rows of one segment, or of several.
  Combine next_combine(int ranks) {
    Combine o;
    Case& c = o.c;
    c = cases_.next(ranks);
    const bool many_ranks = ranks > 8, many = !many_ranks && cases_.chance(0.05);
    if (many || many_ranks || cases_.chance(0.4)) {
      c.x.num_tokens = many         ? cases_.pick(130, 300)
                       : many_ranks ? cases_.pick(1, 2)
                                    : cases_.pick(0, 40);
    }
    if (cases_.chance(0.1)) c.x.top_k = kMaxTopK;
    if (many_ranks) c.num_sms = cases_.pick(1, 2);
    const bool long_rows = !many && !many_ranks && cases_.chance(0.4);
    const int vecs = many        ? cases_.pick(1, 8)
                     : long_rows ? cases_.pick(100, 700)
                                 : cases_.pick(1, 60);
    c.hidden = vecs * int(16 / size_of(c.type));
    if (long_rows) {  // of which several blocks push segments
      c.x.num_tokens = cases_.pick(1, 6);
      c.num_sms = cases_.pick(1, 5);
    }
    if (cases_.chance(0.4)) c.hidden = ceil_div(c.hidden, kScaleBlock) * kScaleBlock;
    c.quantized_partials = c.hidden % kScaleBlock == 0 && cases_.chance(0.7);
    constexpr int kPercent[] = {0, 20, 80};
    c.wire_percent = kPercent[cases_.pick(0, 2)];
    cases_.refill(c);
    o.has_y = cases_.chance(0.9);
    o.has_scalars = !o.has_y || cases_.chance(0.6);
    o.shared = (12 << 10) + cases_.pick(1, 20) * kMostSegmentVecs * int(sizeof(Vec));
    pick_results(o);
    return o;
  }

 private:
  // Every second rank's rows begin with zeros: blocks that have no scale of their own.
  void pick_results(Combine& o) {
    const Case& c = o.c;
    o.results = random_results(c, rng_);
    const size_t row = c.hidden * size_of(c.type);
    const size_t zeros = std::min(row, kScaleBlock * size_of(c.type));
    for (int r = 1; r < c.x.num_ranks; r += 2) {
      for (int i = 0; i < c.x.num_rows; ++i) std::memset(&o.results.y[r][i * row], 0, zeros);
    }
  }

  std::mt19937 rng_;
  RandomCases cases_;
};

void describe(const Combine& o, size_t i) {
  const Case& c = o.c;
  const Exchange& x = c.x;
  std::printf(
      "  combine %zu: R=%d E=%d T=%d K=%d rows=%d A=%d batched=%d H=%d type=%d fp8=%d weights=%d "
      "y=%d scalars=%d blocks=%d wire_percent=%d shared=%d\n",
      i, x.num_ranks, x.num_experts, x.num_tokens, x.top_k, x.num_rows, x.alignment, x.batched,
      c.hidden, int(c.type), o.is_fp8(), c.weights, o.has_y, o.has_scalars, c.num_sms,
      c.wire_percent, o.shared);
}

void check(const Combine& o, int r) {
  const RankArrays& a = o.a[r];
  if (o.has_y) {
    expect_same("combined", r, a.out, host_combine(o.c, o.plan, o.results.y, o.results.weights, r));
  }
  if (o.has_scalars) {
    check_scalars(o.c, o.plan, o.results, r, a.scalars_out);
  } else {
    EXPECT(is_poison(a.scalars_out, o.scalar_bytes()));
  }
}

void combines_in_a_row(uint64_t seed, int ranks) {
  CombineWorld w(Series(seed).next(ranks), seed, kForever);
  for (int r = 0; r < ranks; ++r) {
    for (size_t i = 0; i < w.combines.size(); ++i) w.issue(i, r);
  }
  w.run();
  for (size_t i = 0; i < w.combines.size(); ++i) {
    const int before = failures;
    for (int r = 0; r < ranks; ++r) check(w.combines[i], r);
    if (failures != before) describe(w.combines[i], i);
  }
  for (const FaultRecord& f : w.group.records) check_no_fault(f);
}

// One rank's blocks that only work locally begin when everybody else has ended: peers do not wait
// for them.
void local_blocks_are_late(uint64_t seed, int ranks) {
  CombineWorld w({Series(seed).next_combine(ranks)}, seed, kForever);
  Combine& o = w.combines[0];
  o.c.num_sms = std::max(2, o.c.num_sms);
  o.c.wire_percent = std::max(20, o.c.wire_percent);
  w.group.machine.crowd(seed % ranks, split_roles(o.c.num_sms, ranks, o.c.wire_percent).wire);
  for (int r = 0; r < ranks; ++r) w.issue(0, r);
  w.run();
  const int before = failures;
  for (int r = 0; r < ranks; ++r) check(o, r);
  if (failures != before) describe(o, 0);
}

void run_case(uint64_t seed, int ranks) {
  combines_in_a_row(seed, ranks);
  if (ranks > 1) local_blocks_are_late(seed, ranks);
}

// One combine of some tokens.
CombineWorld failing_world(uint64_t seed, int ranks) {
  Series series(seed);
  Combine o;
  do {
    o = series.next_combine(ranks);
  } while (o.c.x.num_tokens == 0);
  return CombineWorld({o}, seed, kShort);
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  using namespace jax_ep;
  return run_large(argc, argv, run_case, [](int count, int seed, const std::vector<int>& groups) {
    return run_faults(count, seed, groups, failing_world);
  });
}
