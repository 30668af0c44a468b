// SPDX-License-Identifier: Apache-2.0
// A group of ranks whose devices this process drives: their control blocks, mapped by all of them,
// and what went wrong on each. Made once by the host, outside any operation, and never destroyed: a
// CUDA graph that was captured long ago still holds the addresses of the control blocks.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../kernels/launch.h"

namespace jax_ep {

class Group {
 public:
  // `devices[r]`: the CUDA device of rank r; ranks may share one. Throws std::runtime_error.
  explicit Group(std::vector<int> devices);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Start a new generation: epochs from 0, no failure. No operation may run.
  void reset(double timeout_s);

  int num_ranks() const { return static_cast<int>(devices_.size()); }
  const std::vector<int>& devices() const { return devices_; }
  size_t control_bytes() const { return control_layout(num_ranks()).total; }

  // Rank of a device; -1 if it is in no rank or in several.
  int rank_of(int device) const;

  // What rank r's kernels need to know of the group.
  const Peers& peers(int rank) const { return peers_[rank]; }

  // Where `pointer` is, as peers name it.
  Location locate(const void* pointer) const;

  // The first failure of rank r, copied; `fault` is 0 if there is none.
  FaultRecord fault(int rank) const;
  // A sentence about the first failure of any rank of this process; empty if there is none.
  std::string describe_fault() const;

 private:
  void release() noexcept;

  std::vector<int> devices_;
  double timeout_s_ = 0;
  uint64_t generation_ = 0;
  std::vector<char*> control_;
  FaultRecord* records_ = nullptr;  // [R], host memory that all devices map
  std::vector<Peers> peers_;
};

// Raise std::runtime_error with what failed and CUDA's own words.
void require(cudaError_t error, const char* what);

}  // namespace jax_ep
