// SPDX-License-Identifier: Apache-2.0
// Time of plan, dispatch and combine on D devices, one rank each, as CUDA-graph replays without
// JAX.
//
//   exchange_bench [--devices D] [--tokens T] [--hidden H] [--experts E] [--topk K] [--sms N]
//   [--wire 0|1|2] [--fp8-combine 0|1] [--percent P] [--stats 0|1]
//
// Small batches also through slots, whole and in halves.
// Prints the median and the maximum over replays of the slowest rank's time per operation, in
// microseconds.
#include <algorithm>
#include <cstdlib>

#include "harness.cuh"
#include "options.h"
#include "timing.h"

namespace jax_ep {
namespace {

constexpr int kPerGraph = 10;

Case bench_case(int R, int T, int H, int E, int K, int sms, int wire) {
  std::mt19937 rng(7);
  Case c;
  c.x = Exchange{R, E, T, K, R * T * std::min(K, E / R), 1, 0};
  c.hidden = H;
  c.wire = static_cast<Wire>(wire);
  c.num_sms = sms;
  std::vector<int> experts(E);
  for (int e = 0; e < E; ++e) experts[e] = e;
  for (int i = 0; i < R * T; ++i) {
    for (int k = 0; k < K; ++k) std::swap(experts[k], experts[k + rng() % (E - k)]);
    c.topk_idx.insert(c.topk_idx.end(), experts.begin(), experts.begin() + K);
  }
  std::normal_distribution<float> normal;
  for (int r = 0; r < R; ++r) {
    Bytes rows(size_t(T) * H * 2);
    for (size_t i = 0; i < size_t(T) * H; ++i) set_element(rows, c.type, i, normal(rng));
    c.rows_in.push_back(rows);
    c.scalars_in.push_back(std::vector<float>(size_t(T) * K, 0.5f));
  }
  return c;
}

// What crosses the link: rows that `rank` pushes in one dispatch (copies of its tokens, one for
// each other rank they name) and in one combine (partials of other ranks' tokens).
void print_pushes(const Case& c, int rank, int times) {
  const Exchange& x = c.x;
  int copies = 0, partials = 0;
  for (int token = 0; token < x.num_ranks * x.num_tokens; ++token) {
    const int source = token / x.num_tokens;
    for (int r = 0; r < x.num_ranks; ++r) {
      const auto first = c.topk_idx.begin() + size_t(token) * x.top_k;
      const bool named =
          std::any_of(first, first + x.top_k, [&](int e) { return e / x.local_experts() == r; });
      copies += named && source == rank && r != rank;
      partials += named && source != rank && r == rank;
    }
  }
  std::printf("rank %d: %d dispatches push %d rows each, %d combines %d, of %d elements\n", rank,
              times + 1, copies, times, partials, c.hidden);
}

template <typename Go>
void time_op(const char* name, Group& group, Harness& h, Go&& go) {
  const Times t = time_replays(group.devices(), h.streams, kPerGraph, go, [&] { h.synchronize(); });
  std::printf("%-26s median %8.1f us  max %8.1f us\n", name, t.median_us, t.max_us);
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  using namespace jax_ep;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  int devices = 2, T = 4096, H = 7168, E = 256, K = 8, sms = 132, wire = 0, fp8_combine = 0,
      percent = 0, stats = 0;
  const bool known = take_options(argc, argv,
                                  {{"--devices", &devices},
                                   {"--tokens", &T},
                                   {"--hidden", &H},
                                   {"--experts", &E},
                                   {"--topk", &K},
                                   {"--sms", &sms},
                                   {"--wire", &wire},
                                   {"--fp8-combine", &fp8_combine},
                                   {"--percent", &percent},
                                   {"--stats", &stats}});
  if (!known) return 2;
  try {
    std::vector<int> ids;
    for (int d = 0; d < devices; ++d) ids.push_back(d);
    const bool small = T <= 256 && devices * T * K <= kMaxSlotPairs && H * 2 <= 16384;
    Group group(ids, small ? SlotSize{T, H * 2} : SlotSize{});
    group.reset(1, 5.0, 1);
    Case c = bench_case(devices, T, H, E, K, sms, wire);
    c.quantized_partials = fp8_combine;
    Harness h(group, c);
    if (stats) h.record_stats();
    h.plan();
    h.dispatch();
    h.synchronize();
    for (int r = 0; r < devices; ++r) {
      require(cudaMemcpy(h.a.y[r]->data(), h.a.rows[r]->data(),
                         std::min(h.a.y[r]->bytes(), h.a.rows[r]->bytes()), cudaMemcpyDefault),
              "y");
      require(cudaMemcpy(h.a.weights[r]->data(), h.a.row_scalars[r]->data(),
                         h.a.weights[r]->bytes(), cudaMemcpyDefault),
              "weights");
    }
    std::printf("R=%d T=%d H=%d E=%d K=%d rows=%d sms=%d wire=%d fp8_combine=%d\n", devices, T, H,
                E, K, c.x.num_rows, sms, wire, fp8_combine);
    c.num_sms = std::min(sms, leaving_room(group.most_sms(0)));
    time_op("plan", group, h, [&](int r) { h.plan(r); });
    c.num_sms = sms;
    c.wire_percent = percent;
    if (percent > 0) std::printf("%d %% of blocks push\n", percent);
    time_op("dispatch", group, h, [&](int r) { h.dispatch(r); });
    time_op("combine", group, h, [&](int r) { h.combine(r); });
    if (small) {
      auto dispatch_halves = [&](int r) {
        h.slot_dispatch(r, Half::kStart);
        h.slot_dispatch(r, Half::kDone);
      };
      auto combine_halves = [&](int r) {
        h.slot_combine(r, Half::kStart);
        h.slot_combine(r, Half::kDone);
      };
      time_op("slots: dispatch with plan", group, h, [&](int r) { h.slot_dispatch(r); });
      time_op("slots: combine", group, h, [&](int r) { h.slot_combine(r); });
      time_op("slots: dispatch in halves", group, h, dispatch_halves);
      time_op("slots: combine in halves", group, h, combine_halves);
    }
    const int times = kPerGraph * kReplays;
    for (int r = 0; r < devices; ++r) print_pushes(c, r, times);
    return 0;
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    return 3;
  }
}
