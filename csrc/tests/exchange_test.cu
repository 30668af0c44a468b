// SPDX-License-Identifier: Apache-2.0
// Random exchanges on the GPU against the host, bit for bit: plan, dispatch, combine.
//
//   exchange_test [--cases N] [--seed S] [--ranks R] [--devices D] [--single-launch] [--small]
//                 [--slots] [--without-combine]
//
// --slots: small batches through slots, whole and in halves, instead of the large path.
// R ranks (default: 1, 2, 4, 8 in turn) on D devices, rank r on device r % D, each on its own
// stream; or all in one launch with rank = blockIdx.y, for sanitizers that serialise launches.
#include <cstdlib>

#include "harness.cuh"
#include "options.h"
#include "random_case.h"
#include "semantics.h"

namespace jax_ep {
namespace {

struct Options {
  int cases = 40, ranks = 0, devices = 1, seed = 1;
  bool single_launch = false, small = false, slots = false, without_combine = false;
};

constexpr SlotSize kSlots{80, 16384};

int errors = 0;

template <typename T>
void expect_same(const char* name, int rank, const std::vector<T>& got, const T* want,
                 size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (std::memcmp(&got[i], &want[i], sizeof(T)) == 0) continue;
    std::printf("  %s of rank %d differs at %zu of %zu: got %g, expected %g\n", name, rank, i,
                count, double(got[i]), double(want[i]));
    ++errors;
    return;
  }
}

void check_plan(const Harness& h, const Case& c, const HostPlan& plan) {
  const size_t R = c.x.num_ranks, pairs = c.x.num_pairs(), rows = c.x.num_rows,
               local = c.x.local_experts();
  for (size_t r = 0; r < R; ++r) {
    expect_same("pair_rank", r, h.a.pair_rank[r]->host(), &plan.pair_rank[r * pairs], pairs);
    expect_same("pair_row", r, h.a.pair_row[r]->host(), &plan.pair_row[r * pairs], pairs);
    expect_same("row_pair", r, h.a.row_pair[r]->host(), &plan.row_pair[r * rows], rows);
    expect_same("expert_ids", r, h.a.expert_ids[r]->host(), &plan.expert_ids[r * rows], rows);
    expect_same("token_rows", r, h.a.token_rows[r]->host(), &plan.token_rows[r * R * pairs],
                R * pairs);
    expect_same("token_slot", r, h.a.token_slot[r]->host(),
                &plan.token_slot[r * R * c.x.num_tokens], R * c.x.num_tokens);
    expect_same("counts", r, h.a.counts[r]->host(), &plan.counts[r * local], local);
    expect_same("group_sizes", r, h.a.group_sizes[r]->host(), &plan.group_sizes[r * local], local);
    expect_same("num_dropped", r, h.a.num_dropped[r]->host(), &plan.num_dropped[r], 1);
  }
}

void check_dispatch(const Harness& h, const Case& c, const HostPlan& plan) {
  for (int r = 0; r < c.x.num_ranks; ++r) {
    const HostRows want = host_dispatch(c, plan, r);
    expect_same("rows", r, h.a.rows[r]->host(), want.rows.data(), want.rows.size());
    if (h.delivers_scales())
      expect_same("scales", r, h.a.row_scales[r]->host(), want.scales.data(), want.scales.size());
    if (c.weights)
      expect_same("weights", r, h.a.row_scalars[r]->host(), want.scalars.data(),
                  want.scalars.size());
  }
}

// How a case's operations are issued.
enum class Path { kLarge, kSlots, kHalves };

void issue_dispatch(Harness& h, Path path) {
  if (path == Path::kLarge) {
    h.plan();
    h.dispatch();
  } else if (path == Path::kSlots) {
    h.slot_dispatch();
  } else {
    h.slot_dispatch(-1, Half::kStart);
    h.slot_dispatch(-1, Half::kDone);
  }
}

void issue_combine(Harness& h, Path path) {
  if (path == Path::kLarge) {
    h.combine();
  } else if (path == Path::kSlots) {
    h.slot_combine();
  } else {
    h.slot_combine(-1, Half::kStart);
    h.slot_combine(-1, Half::kDone);
  }
}

void check_combine(Harness& h, const Case& c, const HostPlan& plan, std::mt19937& rng, Path path) {
  const size_t R = c.x.num_ranks, T = c.x.num_tokens, K = c.x.top_k, rows = c.x.num_rows;
  std::vector<Bytes> y;
  std::vector<std::vector<float>> weights;
  std::normal_distribution<float> normal(0, 2);
  for (size_t r = 0; r < R; ++r) {
    Bytes values(rows * c.hidden * size_of(c.type));
    for (size_t i = 0; i < rows * c.hidden; ++i) {
      const bool zero = r % 2 == 1 && i % c.hidden < kScaleBlock;  // a block of zeros
      set_element(values, c.type, i, zero ? 0.0f : normal(rng));
    }
    std::vector<float> w(rows);
    for (float& v : w) v = normal(rng);
    require(cudaMemcpy(h.a.y[r]->data(), values.data(), values.size(), cudaMemcpyHostToDevice),
            "cudaMemcpy");
    require(cudaMemcpy(h.a.weights[r]->data(), w.data(), rows * 4, cudaMemcpyHostToDevice),
            "cudaMemcpy");
    y.push_back(values);
    weights.push_back(w);
  }
  issue_combine(h, path);
  h.synchronize();
  for (size_t r = 0; r < R; ++r) {
    const Bytes want = host_combine(c, plan, y, weights, int(r));
    expect_same("combined", r, h.a.out[r]->host(), want.data(), want.size());
    if (!c.weights || path != Path::kLarge) continue;
    std::vector<float> scalars;
    for (size_t pair = r * T * K; pair < (r + 1) * T * K; ++pair) {
      const int row = plan.pair_row[pair];
      scalars.push_back(row < 0 ? 0.0f : weights[plan.pair_rank[pair]][row]);
    }
    expect_same("scalars", r, h.a.scalars_out[r]->host(), scalars.data(), scalars.size());
  }
}

void run_case(Group& group, const Case& c, std::mt19937& rng, const std::vector<Path>& paths,
              bool combine) {
  const HostPlan plan = host_plan(c.x, c.topk_idx);
  Harness h(group, c);
  for (Path path : paths) {
    issue_dispatch(h, path);
    h.synchronize();
    check_plan(h, c, plan);
    check_dispatch(h, c, plan);
    if (combine) check_combine(h, c, plan, rng, path);
    for (auto& b : h.a.rows) b->poison();
    for (auto& b : h.a.row_scales) b->poison();
    for (auto& b : h.a.row_scalars) b->poison();
    for (auto& b : h.a.out) b->poison();
  }
}

int run(const Options& o) {
  std::mt19937 rng(o.seed);
  const std::vector<int> all_ranks =
      o.ranks ? std::vector<int>{o.ranks} : std::vector<int>{1, 2, 4, 8};
  std::vector<std::unique_ptr<Group>> groups;
  for (int R : all_ranks) {
    std::vector<int> devices;
    for (int r = 0; r < R; ++r) devices.push_back(r % o.devices);
    groups.push_back(std::make_unique<Group>(devices, kSlots));
    groups.back()->reset(1, 20.0, o.devices < R ? R / o.devices : 1);
  }
  for (int i = 0; i < o.cases; ++i) {
    const size_t g = i % groups.size();
    const int R = all_ranks[g], most_blocks = std::max(1, std::min(16, 100 * o.devices / R));
    Case c = RandomCases(rng, {o.small, o.slots, most_blocks}).next(R);
    c.single_launch = o.single_launch;
    const int before = errors;
    if (i % 10 == 0) std::printf("case %d\n", i);
    const std::vector<Path> paths = o.slots ? std::vector<Path>{Path::kSlots, Path::kHalves}
                                            : std::vector<Path>(2, Path::kLarge);
    run_case(*groups[g], c, rng, paths, !o.without_combine);
    if (errors != before) {
      std::printf(
          "case %d: R=%d E=%d T=%d K=%d rows=%d A=%d batched=%d H=%d type=%d wire=%d pre=%d "
          "fp8_combine=%d sms=%d\n",
          i, c.x.num_ranks, c.x.num_experts, c.x.num_tokens, c.x.top_k, c.x.num_rows, c.x.alignment,
          c.x.batched, c.hidden, int(c.type), int(c.wire), c.prequantized, c.quantized_partials,
          c.num_sms);
    }
  }
  std::printf("%d cases, %d differences\n", o.cases, errors);
  return errors != 0;
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  jax_ep::Options o;
  const bool known = jax_ep::take_options(argc, argv,
                                          {{"--cases", &o.cases},
                                           {"--seed", &o.seed},
                                           {"--ranks", &o.ranks},
                                           {"--devices", &o.devices},
                                           {"--single-launch", nullptr, &o.single_launch},
                                           {"--small", nullptr, &o.small},
                                           {"--without-combine", nullptr, &o.without_combine},
                                           {"--slots", nullptr, &o.slots}});
  if (!known) return 2;
  try {
    return jax_ep::run(o);
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    return 3;
  }
}
