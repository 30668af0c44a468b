// SPDX-License-Identifier: Apache-2.0
// A group of ranks whose devices this process drives: their control blocks, mapped by all of them,
// and what went wrong on each. Made once by the host, outside any operation, and never destroyed: a
// CUDA graph that was captured long ago still holds the addresses of the control blocks.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../kernels/launch.h"
#include "nodes.h"
#include "shared_memory.h"
#include "speeds.h"

namespace jax_ep {

class Group {
 public:
  // `devices[r]`: the CUDA device of rank r, ranks may share one; -1 for a rank of another process,
  // which `attach` completes. `slots`: what small batches may have. `nodes`: of a group that spans
  // nodes, whose ranks are one in each process. Throws std::runtime_error.
  explicit Group(std::vector<int> devices, const SlotSize& slots = {},
                 std::optional<Nodes> nodes = {});
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Several processes: what peers of the node need of a rank here, the memory that XLA has for it
  // (`in_pool` points into it), then its control block, unless that is in the arena; and the same
  // of a rank elsewhere, mapped for all devices here. Descriptors belong to the caller.
  std::vector<Exported> export_rank(int rank, const void* in_pool);
  void attach(int rank, const std::vector<Exported>& exported);

  // Whether every rank of the node is here or attached.
  bool complete() const;

  // Wait until no kernel of a rank here runs. Every process has done so before one resets: what a
  // kernel of the last generation stores late would come into memory that is zero already.
  void settle() const;

  // Start generation number `generation`: epochs from 0, no failure. No operation may run, of any
  // process; `ranks_per_device` of the group share a GPU.
  void reset(uint64_t generation, double timeout_s, int ranks_per_device);

  int num_ranks() const { return static_cast<int>(devices_.size()); }
  const std::vector<int>& devices() const { return devices_; }
  size_t control_bytes() const { return control_layout(num_ranks()).total; }
  const SlotSize& slots() const { return slots_; }
  int ranks_per_device() const { return ranks_per_device_; }
  bool spans_processes() const { return spans_processes_; }
  const Nodes* nodes() const { return nodes_ ? &*nodes_ : nullptr; }

  // SMs that an operation of a rank here may take: ranks that share a GPU share them, as their
  // kernels wait for each other. And takes by default, leaving room; all that leave it, if nothing
  // is known `of` it.
  int most_sms(int rank) const;
  int default_sms(int rank, const Demand& of = {}) const;

  // What rank r's kernels need to know of the group.
  const Peers& peers(int rank) const { return peers_[rank]; }

  // Where `pointer` is, as peers name it; false if they cannot reach it.
  bool locate(int rank, const void* pointer, Location* out) const;

  // Whether a rank of this process has failed or was told of a failure. Reads device memory.
  bool broken() const;
  // The first failure of rank r, copied; `fault` is 0 if there is none.
  FaultRecord fault(int rank) const;
  // A sentence about the first failure of any rank of this process; empty if there is none.
  std::string describe_fault() const;

 private:
  void release() noexcept;
  // Of a rank: its control block, then its slots; between nodes outboxes and rings, too.
  size_t shared_bytes() const {
    return nodes_ ? nodes_->at.total : control_bytes() + slot_bytes(num_ranks(), slots_);
  }
  int node_ranks() const { return nodes_ ? nodes_->node_ranks : num_ranks(); }
  // The first rank of the node of `rank`.
  int node_of(int rank) const { return rank / node_ranks() * node_ranks(); }
  // Whether peers write into XLA's memory of other processes.
  bool shares_pools() const { return spans_processes_ && node_ranks() > 1; }

  std::vector<int> devices_;
  SlotSize slots_;
  std::optional<Nodes> nodes_;
  double timeout_s_ = 0;
  int ranks_per_device_ = 1;
  bool spans_processes_ = false;
  // [device of this process, rank]: rank's control block as the device's kernels address it. In one
  // process the same on all devices.
  std::map<int, std::vector<char*>> control_;
  std::map<int, std::vector<char*>> pool_;  // alike, of the memory that XLA has for each rank
  std::vector<Range> own_pool_;             // [rank], of ranks here
  std::map<int, Speeds> speeds_;            // [device of this process]
  FaultRecord* records_ = nullptr;          // [R], host memory that all devices map
  std::vector<Peers> peers_;
};

// Raise std::runtime_error with what failed and CUDA's own words.
void require(cudaError_t error, const char* what);

}  // namespace jax_ep
