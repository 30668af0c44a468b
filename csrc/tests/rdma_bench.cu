// SPDX-License-Identifier: Apache-2.0
// Times of dispatch and combine between nodes that are only named so: over peers' memory, as
// NVSHMEM has it between GPUs that reach each other.
//
//   rdma_bench [--nodes N] [--local L] [--devices D] [--tokens T] [--hidden H] [--top-k K]
//              [--experts E] [--sms S] [--slots N] [--slot-bytes B] [--fp8] [--iterations I]
//              [--send P] [--put P] [--forward P] [--gateway P]
//
// --send, --put, --forward, --gateway: percent of blocks (rdma/layout.h). Medians over replays of a
// graph of I operations.
#include <algorithm>

#include "options.h"
#include "rdma_world.cuh"
#include "timing.h"

namespace jax_ep {
namespace {

struct Options {
  int nodes = 2, local = 1, devices = 2, tokens = 4096, hidden = 7168, top_k = 8, experts = 256;
  int sms = 132, slots = 192, slot_bytes = 33 << 12, iterations = 20;  // as Rdma has them
  NodeShares percent;
  bool fp8 = false;
};

NodeCase make_case(const Options& o) {
  std::mt19937 rng(1);
  NodeCase n{};
  const int R = o.nodes * o.local;
  n.nodes = o.nodes;
  n.blocks = o.sms;
  n.c.ranks_per_node = o.local;
  n.c.x = Exchange{R, o.experts, o.tokens, o.top_k, 0, 1, 0};
  n.c.x.num_rows = R * o.tokens * std::min(o.top_k, o.experts / R);
  n.c.hidden = o.hidden;
  if (o.fp8) n.c.wire = Wire::kDequantized;
  std::vector<int> experts(o.experts);
  for (int e = 0; e < o.experts; ++e) experts[e] = e;
  for (int i = 0; i < R * o.tokens; ++i) {  // top_k of them, none twice
    for (int k = 0; k < o.top_k; ++k) {
      std::swap(experts[k], experts[k + rng() % (o.experts - k)]);
      n.c.topk_idx.push_back(experts[k]);
    }
  }
  for (int r = 0; r < R; ++r) {
    Bytes rows(size_t(o.tokens) * o.hidden * size_of(n.c.type));
    for (size_t i = 0; i < rows.size() / 2; ++i) {
      set_element(rows, n.c.type, i, float(rng() % 97) - 48);
    }
    n.c.rows_in.push_back(rows);
    n.c.scales_in.emplace_back(size_t(o.tokens) * o.hidden / kScaleBlock, 1.0f);
    n.c.scalars_in.emplace_back(n.c.x.num_pairs(), 0.5f);
  }
  n.rings = {o.slots, o.slot_bytes};
  n.percent = o.percent;
  return n;
}

int run(const Options& o) {
  const NodeCase n = make_case(o);
  RdmaWorld w(n, o.devices, 20, 0);
  auto time = [&](Step step) {
    auto issue = [&](int r) { w.issue(r, step); };
    return time_replays(w.devices(), w.streams(), o.iterations, issue, [&] { w.wait(60); })
        .median_us;
  };
  const double plan = time(Step::kPlan), dispatch = time(Step::kDispatch),
               combine = time(Step::kCombine);
  if (slots_for(n.c).tokens > 0) {
    const double small_dispatch = time(Step::kSmallDispatch);
    const double small_combine = time(Step::kSmallCombine);
    std::printf("through slots: dispatch with plan %.1f us, combine %.1f us\n", small_dispatch,
                small_combine);
  }
  for (int r = 0; r < n.c.x.num_ranks; ++r) {
    if (w.records[r].fault != 0) throw std::runtime_error("an operation failed");
  }
  std::printf(
      "%dx%d devices=%d T=%d H=%d K=%d E=%d %s sms=%d slots=%d slot_bytes=%d chunk=%d/%d "
      "send=%d put=%d forward=%d gateway=%d: plan %.1f us, dispatch %.1f us, combine %.1f us\n",
      o.nodes, o.local, o.devices, o.tokens, o.hidden, o.top_k, o.experts, o.fp8 ? "fp8" : "bf16",
      o.sms, o.slots, n.rings.slot_bytes, dispatch_shape(n.c, n.rings.slot_bytes).chunk,
      combine_shape(n.c, n.rings.slot_bytes).chunk, o.percent.send, o.percent.put,
      o.percent.forward, o.percent.gateway, plan, dispatch, combine);
  return 0;
}

}  // namespace
}  // namespace jax_ep

int main(int argc, char** argv) {
  jax_ep::Options o;
  const bool known = jax_ep::take_options(argc, argv,
                                          {{"--nodes", &o.nodes},
                                           {"--local", &o.local},
                                           {"--devices", &o.devices},
                                           {"--tokens", &o.tokens},
                                           {"--hidden", &o.hidden},
                                           {"--top-k", &o.top_k},
                                           {"--experts", &o.experts},
                                           {"--sms", &o.sms},
                                           {"--slots", &o.slots},
                                           {"--slot-bytes", &o.slot_bytes},
                                           {"--send", &o.percent.send},
                                           {"--put", &o.percent.put},
                                           {"--forward", &o.percent.forward},
                                           {"--gateway", &o.percent.gateway},
                                           {"--iterations", &o.iterations},
                                           {"--fp8", nullptr, &o.fp8}});
  if (!known) return 2;
  try {
    jax_ep::prepare_devices(o.devices);
    return jax_ep::run(o);
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    std::_Exit(3);  // kernels may hang: nothing waits for them
  }
}
