// SPDX-License-Identifier: Apache-2.0
// What the fault tests share: how a failure must be recorded and described, other shapes in a
// captured graph, and a main that runs named cases with plain launches, then with replayed graphs.
#pragma once
#include <cstdlib>
#include <optional>
#include <type_traits>

#include "../kernels/slot_sizes.h"
#include "../plan/tiling.h"
#include "expect.h"
#include "scene.h"

namespace jax_ep {

constexpr double kAtOnce = 0.2;

inline bool is(const FaultRecord& f, Fault fault, Operation operation, int rank, int awaited) {
  const bool same = f.fault == uint32_t(fault) && f.operation == uint32_t(operation) &&
                    f.rank == rank && f.awaited == awaited;
  if (!same) {
    std::printf("  fault %u operation %u rank %d awaited %d phase %u\n", f.fault, f.operation,
                f.rank, f.awaited, f.phase);
  }
  return same;
}

inline bool says(const Scene& s, const std::string& words) {
  const std::string fault = s.group.describe_fault();
  if (fault.find(words) != std::string::npos) return true;
  std::printf("  expected '%s' in '%s'\n", words.c_str(), fault.c_str());
  return false;
}

// Whichever rank saw it first.
inline bool is_mismatch(const Scene& s, Operation of_rank_0, Operation of_rank_1) {
  const FaultRecord f = s.group.fault(0);
  if (f.fault == uint32_t(Fault::kMismatch)) return is(f, Fault::kMismatch, of_rank_0, 0, 1);
  return is(s.group.fault(1), Fault::kMismatch, of_rank_1, 1, 0);
}

template <typename P>
constexpr bool is_small =
    std::is_same_v<P, SlotDispatchParams> || std::is_same_v<P, SlotCombineParams>;

// Another signature, and rows of half the width, in a graph of operations with parameters P.
template <typename P>
void change_shape(cudaGraph_t graph) {
  cudaGraphNode_t nodes[8];
  size_t count = 8;
  require(cudaGraphGetNodes(graph, nodes, &count), "cudaGraphGetNodes");
  for (size_t i = 0; i < count; ++i) {
    cudaKernelNodeParams launch{};
    require(cudaGraphKernelNodeGetParams(nodes[i], &launch), "cudaGraphKernelNodeGetParams");
    P p = *static_cast<const P*>(launch.kernelParams[0]);
    p.call.signature ^= 1;
    if constexpr (!std::is_same_v<P, PlanParams>) p.hidden /= 2;
    if constexpr (std::is_same_v<P, DispatchParams> || std::is_same_v<P, SlotDispatchParams>) {
      p.row_bytes /= 2;
    }
    auto set = [&](auto* sizes) {
      void* changed[] = {&p, sizes};
      launch.kernelParams = changed;
      require(cudaGraphKernelNodeSetParams(nodes[i], &launch), "cudaGraphKernelNodeSetParams");
    };
    const int blocks = launch.gridDim.x;
    const void* was =
        std::is_same_v<P, PlanParams> || is_small<P> ? launch.kernelParams[1] : nullptr;
    if constexpr (std::is_same_v<P, PlanParams>) {
      PlanSizes sizes = *static_cast<const PlanSizes*>(was);
      set(&sizes);
    } else if constexpr (std::is_same_v<P, SlotDispatchParams>) {
      const auto& full = *static_cast<const SlotDispatchSizes*>(was);
      SlotDispatchSizes sizes(p.exchange, blocks, full.x_vecs / 2, full.slot_lanes / 2);
      set(&sizes);
    } else if constexpr (std::is_same_v<P, SlotCombineParams>) {
      SlotCombineSizes sizes(p.exchange, blocks,
                             static_cast<const SlotCombineSizes*>(was)->vecs / 2);
      set(&sizes);
    } else {
      set(static_cast<int*>(nullptr));
    }
  }
}

// Rank 0 runs `program`, rank 1 the same in another shape. Seconds until both have ended.
template <typename P>
double run_in_another_shape(Scene& s, const Program& program) {
  require(cudaSetDevice(s.group.devices()[1]), "cudaSetDevice");
  const Replay other(s.h.streams[1], [&] { s.launch(1, program); }, change_shape<P>);
  return s.seconds([&] {
    s.issue(0, program);
    require(cudaSetDevice(s.group.devices()[1]), "cudaSetDevice");
    other.launch(s.h.streams[1]);
  });
}

struct Named {
  const char* name;
  void (*run)(Scene&);
};

// Every case leaves a group that works after a reset.
template <size_t N>
void run_cases(Scene& s, const Named (&cases)[N], const Program& exchange) {
  for (const Named& one : cases) {
    const int before = failures;
    const double took = s.seconds([&] { one.run(s); });
    const bool ok = failures == before;
    std::printf("%s, %s, %.1f s: %s\n", one.name, s.replayed ? "replayed" : "plain", took,
                ok ? "ok" : s.group.describe_fault().c_str());
    s.restart();
    EXPECT(s.works(exchange));
    s.restart();
  }
}

// Two ranks on the devices 0 and `--devices D` - 1; 0 if all went well.
template <size_t N>
int run_faults(int argc, char** argv, const Named (&cases)[N], const Program& exchange) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool two = argc == 3 && std::string(argv[1]) == "--devices" && std::atoi(argv[2]) == 2;
  if (argc != 1 && !two) return std::fprintf(stderr, "usage: %s [--devices 2]\n", argv[0]), 2;
  try {
    Scene s({0, two ? 1 : 0});
    for (bool replayed : {false, true}) {
      s.replayed = replayed;
      run_cases(s, cases, exchange);
    }
  } catch (const std::exception& e) {
    std::printf("failed: %s\n", e.what());
    return 3;
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace jax_ep
