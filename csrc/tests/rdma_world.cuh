// SPDX-License-Identifier: Apache-2.0
// All ranks of a group that spans nodes in one process, on one GPU or several: arenas, arrays,
// operations. Nodes are only named so: all GPUs reach each other.
#pragma once
#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>

#include "../rdma/launch.cuh"
#include "../rdma/slot_combine_nodes.cuh"
#include "../rdma/slot_dispatch_nodes.cuh"
#include "../runtime/group.h"
#include "node_cases.h"
#include "rdma_transport.cuh"
#include "replay.h"
#include "slot_params.h"

namespace jax_ep {

// In rdma_peers.cu.
extern template cudaError_t launch_routing_over(const NodeRouting&, const PeerTransport&,
                                                const Launch&);
extern template cudaError_t launch_dispatch_over(const NodeDispatch&, const PeerTransport&, Element,
                                                 Wire, const Launch&);
extern template cudaError_t launch_combine_over(const NodeCombine&, const PeerTransport&, Element,
                                                const Launch&);
extern template cudaError_t load_kernels_over<PeerTransport>();
extern template cudaError_t launch_slot_dispatch_over(const SlotDispatchParams&,
                                                      const PeerTransport&, Element, Wire,
                                                      const Launch&);
extern template cudaError_t launch_slot_combine_over(const SlotCombineParams&, const PeerTransport&,
                                                     Element, const Launch&);
extern template cudaError_t load_slot_dispatch_over<PeerTransport>();
extern template cudaError_t load_slot_combine_over<PeerTransport>();

// From kSmallDispatch on: through slots.
enum class Step {
  kPlan,
  kDispatch,
  kCombine,
  kSmallDispatch,
  kSmallCombine,
  kDispatchStart,
  kDispatchDone,
  kCombineStart,
  kCombineDone
};

// What small batches of a case take; nothing, if it is too large for them.
inline SlotSize slots_for(const Case& c) {
  const Exchange& x = c.x;
  const bool fits =
      x.num_ranks * x.num_pairs() <= kMaxSlotPairs && x.num_experts <= kMaxSlotExperts;
  return fits ? SlotSize{x.num_tokens, c.hidden * int(size_of(c.type))} : SlotSize{};
}

class RdmaWorld {
 public:
  // Rank r on device r % devices. Throws std::runtime_error.
  RdmaWorld(const NodeCase& n, int devices, double timeout_s, uint32_t adverse)
      : n_(n),
        c_(n.c),
        R_(n.c.x.num_ranks),
        devices_(devices),
        at_(control_layout(R_)),
        slots_(slots_for(c_)),
        rings_(ring_layout(n.nodes, c_.ranks_per_node, n.rings,
                           at_.total + slot_bytes(R_, slots_) + outbox_bytes(R_, slots_))) {
    transport_.adverse = adverse;
    require(cudaHostAlloc(&records, R_ * sizeof(FaultRecord), cudaHostAllocPortable),
            "cudaHostAlloc");
    std::memset(static_cast<void*>(records), 0, R_ * sizeof(FaultRecord));
    for (int r = 0; r < R_; ++r) {
      Header header{};
      header.generation = 1;
      header.timeout_ns = uint64_t(timeout_s * 1e9);
      header.record = records + r;
      transport_.arena[r] = static_cast<char*>(allocate(r, rings_.total, 0));
      copy_in(transport_.arena[r] + at_.header, &header, sizeof header);
      cudaStream_t s;
      require(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking), "cudaStreamCreate");
      streams_.push_back(s);
    }
    for (int r = 0; r < R_; ++r) {
      peers_.push_back(node_peers(c_, r, transport_.arena));
      peers_.back().slots = slot_layout(slots_);
      RankArrays arrays{};
      arrays.for_each(c_, [&](auto*& pointer, size_t count) {
        pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(
            allocate(r, count * sizeof(*pointer), 0xff));
      });
      a.push_back(arrays);
      copy_in(arrays.topk_idx, &c_.topk_idx[r * c_.x.num_pairs()], c_.x.num_pairs() * 4);
      copy_in(arrays.x, c_.rows_in[r].data(), c_.rows_in[r].size());
      copy_in(arrays.scales, c_.scales_in[r].data(), c_.scales_in[r].size() * 4);
      copy_in(arrays.scalars, c_.scalars_in[r].data(), c_.scalars_in[r].size() * 4);
    }
  }
  ~RdmaWorld() {
    graphs_.clear();
    for (int r = 0; r < R_; ++r) {
      cudaSetDevice(device(r));
      cudaStreamDestroy(streams_[r]);
    }
    for (void* p : memory_) cudaFree(p);
    cudaFreeHost(records);
  }
  RdmaWorld(const RdmaWorld&) = delete;
  RdmaWorld& operator=(const RdmaWorld&) = delete;

  void issue(int r, Step step) {
    require(cudaSetDevice(device(r)), "cudaSetDevice");
    const Launch how{n_.blocks, streams_[r], 0};
    if (step >= Step::kSmallDispatch) {
      issue_small(r, step, how);
    } else if (step == Step::kPlan) {
      const NodeRouting p = routing_of(c_, a[r], peers_[r], rings_);
      const PlanParams q = plan_params(c_, a[r], peers_[r]);
      require(launch_routing_over(p, transport_, how), "launch of routing");
      require(launch_plan(&q, c_.x, how), "launch of plan");
    } else if (step == Step::kDispatch) {
      const Element x = c_.prequantized ? Element::kFp8 : c_.type;
      NodeDispatch p = dispatch_of(c_, a[r], peers_[r], rings_);
      p.percent = n_.percent;
      require(launch_dispatch_over(p, transport_, x, c_.wire, how), "launch of dispatch");
    } else {
      NodeCombine p = combine_of(c_, a[r], peers_[r], rings_);
      p.percent = n_.percent;
      require(launch_combine_over(p, transport_, c_.type, how), "launch of combine");
    }
  }
  // Steps of every rank, as plain launches or as a graph of each, captured the first time.
  void issue_all(const std::vector<Step>& steps, bool as_graph = false) {
    if (as_graph && graphs_.empty()) {
      for (int r = 0; r < R_; ++r) {
        require(cudaSetDevice(device(r)), "cudaSetDevice");
        graphs_.push_back(std::make_unique<Replay>(streams_[r], [&] {
          for (Step step : steps) issue(r, step);
        }));
      }
    }
    for (int r = 0; r < R_; ++r) {
      require(cudaSetDevice(device(r)), "cudaSetDevice");
      if (as_graph) graphs_[r]->launch(streams_[r]);
      for (Step step : steps) {
        if (!as_graph) issue(r, step);
      }
    }
  }

  int device(int r) const { return r % devices_; }
  std::vector<int> devices() const {
    std::vector<int> of_ranks;
    for (int r = 0; r < R_; ++r) of_ranks.push_back(device(r));
    return of_ranks;
  }
  const std::vector<cudaStream_t>& streams() const { return streams_; }

  // Wait until all of it has ended; the seconds of that. Throws if they are more than `most_s`, as
  // then kernels hang.
  double wait(double most_s) {
    const auto start = std::chrono::steady_clock::now();
    auto seconds = [&] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    for (int r = 0; r < R_; ++r) {
      require(cudaSetDevice(device(r)), "cudaSetDevice");
      cudaError_t state;
      while ((state = cudaStreamQuery(streams_[r])) == cudaErrorNotReady) {
        if (seconds() > most_s) throw std::runtime_error("rank " + std::to_string(r) + " hangs");
      }
      require(state, "a kernel");
    }
    return seconds();
  }

  template <typename T>
  std::vector<T> host(int r, const T* p, size_t count) const {
    std::vector<T> h(count);
    require(cudaSetDevice(device(r)), "cudaSetDevice");
    require(cudaMemcpy(h.data(), p, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return h;
  }
  static void copy_in(void* to, const void* from, size_t bytes) {
    require(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void poison(int r, void* p, size_t bytes) const {
    require(cudaSetDevice(device(r)), "cudaSetDevice");
    require(cudaMemset(p, 0xff, bytes), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  std::vector<RankArrays> a;
  FaultRecord* records = nullptr;

 private:
  void issue_small(int r, Step step, const Launch& how) {
    const bool starts = step == Step::kDispatchStart || step == Step::kCombineStart;
    const bool ends = step == Step::kDispatchDone || step == Step::kCombineDone;
    const Half half = starts ? Half::kStart : ends ? Half::kDone : Half::kBoth;
    if (step == Step::kSmallCombine || step == Step::kCombineStart || step == Step::kCombineDone) {
      const Call call = slot_call(peers_[r], SlotKind::kCombine, half);
      const SlotCombineParams p = slot_combine_params(c_, a[r], call, half);
      require(launch_slot_combine_over(p, transport_, c_.type, how), "launch of a small combine");
    } else {
      const Call call = slot_call(peers_[r], SlotKind::kDispatch, half);
      const SlotDispatchParams p = slot_dispatch_params(c_, a[r], call, half);
      const Element x = c_.prequantized ? Element::kFp8 : c_.type;
      require(launch_slot_dispatch_over(p, transport_, x, c_.wire, how),
              "launch of a small dispatch");
    }
  }
  void* allocate(int r, size_t bytes, int value) {
    void* p = nullptr;
    require(cudaSetDevice(device(r)), "cudaSetDevice");
    require(cudaMalloc(&p, bytes + 16), "cudaMalloc");
    memory_.push_back(p);
    require(cudaMemset(p, value, bytes + 16), "cudaMemset");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    return p;
  }

  const NodeCase& n_;
  const Case& c_;
  const int R_, devices_;
  const ControlLayout at_;
  const SlotSize slots_;
  const RingLayout rings_;
  PeerTransport transport_{};
  std::vector<Peers> peers_;
  std::vector<cudaStream_t> streams_;
  std::vector<void*> memory_;
  std::vector<std::unique_ptr<Replay>> graphs_;
};

// Every device reaches every other; all kernels are loaded. Throws std::runtime_error.
inline void prepare_devices(int devices) {
  for (int d = 0; d < devices; ++d) {
    require(cudaSetDevice(d), "cudaSetDevice");
    for (int e = 0; e < devices; ++e) {
      if (d != e) require(cudaDeviceEnablePeerAccess(e, 0), "cudaDeviceEnablePeerAccess");
    }
    require(load_plan(), "loading the plan kernel");
    require(load_kernels_over<PeerTransport>(), "loading the kernels between nodes");
    require(load_slot_dispatch_over<PeerTransport>(), "loading those of small batches");
    require(load_slot_combine_over<PeerTransport>(), "loading those of small batches");
  }
}

}  // namespace jax_ep
