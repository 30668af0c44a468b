// SPDX-License-Identifier: Apache-2.0
// A group of ranks whose devices this process drives: their control blocks, mapped by all of them,
// and what went wrong on each. Made once by the host, outside any operation.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "../kernels/launch.h"

namespace jax_ep {

class Group {
 public:
  // `devices[r]`: the CUDA device of rank r; ranks may share one. Throws std::runtime_error.
  Group(std::vector<int> devices, double timeout_s, uint32_t generation);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int num_ranks() const { return static_cast<int>(devices_.size()); }
  const std::vector<int>& devices() const { return devices_; }
  double timeout_s() const { return timeout_s_; }

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
  double timeout_s_;
  std::vector<char*> control_;
  FaultRecord* records_ = nullptr;  // [R], host memory that all devices map
  std::vector<Peers> peers_;
};

// Raise std::runtime_error with what failed and CUDA's own words.
void require(cudaError_t error, const char* what);

}  // namespace jax_ep
