// SPDX-License-Identifier: Apache-2.0
#include "group.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

namespace jax_ep {
namespace {

// The device that was current when it was made is current again when it dies.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    require(cudaGetDevice(&before_), "cudaGetDevice");
    require(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Let `device` address `peer`'s memory, and say which link is missing if it cannot.
void enable_peer(int device, int peer) {
  const std::string pair = "GPU " + std::to_string(device) + " to GPU " + std::to_string(peer);
  int can = 0, atomics = 0;
  require(cudaDeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer");
  if (!can)
    throw std::runtime_error("no peer access from " + pair +
                             ": expected NVLink between all GPUs of a group");
  require(cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, device, peer),
          "cudaDeviceGetP2PAttribute");
  if (!atomics) {
    throw std::runtime_error("no native atomics from " + pair +
                             ": expected NVLink between all GPUs of a group, got PCIe");
  }
  OnDevice on(device);
  const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();  // XLA has done it
  } else {
    require(error, "cudaDeviceEnablePeerAccess");
  }
}

const char* name_of(Operation o) {
  switch (o) {
    case Operation::kPlan:
      return "plan";
    case Operation::kDispatch:
      return "dispatch";
    case Operation::kCombine:
      return "combine";
  }
  return "?";
}

const char* name_of(Phase p) {
  switch (p) {
    case Phase::kRouting:
      return "waiting for its routing";
    case Phase::kReady:
      return "waiting for its output buffer";
    case Phase::kRows:
      return "waiting for its rows";
    case Phase::kGrid:
      return "waiting for this rank's own blocks";
    case Phase::kEntry:
      return "entering";
  }
  return "?";
}

}  // namespace

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

Group::Group(std::vector<int> devices) : devices_(std::move(devices)) {
  const int R = num_ranks();
  if (R < 1 || R > kMaxRanks) {
    throw std::runtime_error("group: expected 1 to " + std::to_string(kMaxRanks) + " ranks, got " +
                             std::to_string(R));
  }
  try {
    for (int a : devices_) {
      for (int b : devices_) {
        if (a != b) enable_peer(a, b);
      }
    }
    require(cudaHostAlloc(&records_, R * sizeof(FaultRecord),
                          cudaHostAllocPortable | cudaHostAllocMapped),
            "cudaHostAlloc of fault records");
    const ControlLayout at = control_layout(R);
    for (int r = 0; r < R; ++r) {
      OnDevice on(devices_[r]);
      char* block = nullptr;
      require(cudaMalloc(&block, at.total), "cudaMalloc of a control block");
      control_.push_back(block);
    }
    for (int r = 0; r < R; ++r) {
      Peers p{};
      for (int s = 0; s < R; ++s) p.control[s] = control_[s];
      p.at = at;
      p.rank = r;
      p.num_ranks = R;
      peers_.push_back(p);
    }
  } catch (...) {
    release();
    throw;
  }
}

void Group::reset(double timeout_s) {
  timeout_s_ = timeout_s;
  ++generation_;
  const ControlLayout at = control_layout(num_ranks());
  for (int device : devices_) {
    OnDevice on(device);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  std::memset(static_cast<void*>(records_), 0, num_ranks() * sizeof(FaultRecord));
  for (int r = 0; r < num_ranks(); ++r) {
    OnDevice on(devices_[r]);
    require(cudaMemset(control_[r], 0, at.total), "cudaMemset of a control block");
    Header header{};
    header.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
    header.generation = generation_;
    header.record = records_ + r;
    require(cudaMemcpy(control_[r] + at.header, &header, sizeof header, cudaMemcpyHostToDevice),
            "cudaMemcpy of a header");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
}

Group::~Group() { release(); }

void Group::release() noexcept {
  for (size_t r = 0; r < control_.size(); ++r) {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(devices_[r]);
    cudaDeviceSynchronize();
    cudaFree(control_[r]);
    cudaSetDevice(before);
  }
  control_.clear();
  if (records_ != nullptr) cudaFreeHost(records_);
  records_ = nullptr;
}

int Group::rank_of(int device) const {
  int rank = -1;
  for (int r = 0; r < num_ranks(); ++r) {
    if (devices_[r] != device) continue;
    if (rank >= 0) return -1;
    rank = r;
  }
  return rank;
}

Location Group::locate(const void* pointer) const {
  return Location{reinterpret_cast<uint64_t>(pointer), 0, 0};
}

FaultRecord Group::fault(int rank) const {
  FaultRecord copy{};
  const volatile FaultRecord* r = records_ + rank;
  copy.fault = r->fault;  // the device writes it last
  std::atomic_thread_fence(std::memory_order_acquire);
  copy.operation = r->operation;
  copy.phase = r->phase;
  copy.rank = r->rank;
  copy.awaited = r->awaited;
  copy.seen = r->seen;
  copy.wanted = r->wanted;
  return copy;
}

std::string Group::describe_fault() const {
  FaultRecord first{};
  for (int r = 0; r < num_ranks(); ++r) {
    const FaultRecord f = fault(r);
    const bool better = first.fault == 0 || first.fault == static_cast<uint32_t>(Fault::kPeer);
    if (f.fault != 0 && better) first = f;
  }
  if (first.fault == 0) return "";
  const std::string who = "rank " + std::to_string(first.rank),
                    whom = "rank " + std::to_string(first.awaited);
  const std::string where = std::string("jax_ep.") +
                            name_of(static_cast<Operation>(first.operation)) + ": ";
  const std::string phase = name_of(static_cast<Phase>(first.phase));
  switch (static_cast<Fault>(first.fault)) {
    case Fault::kNone:
      return "";
    case Fault::kTimeout:
      return where + who + " gave up on " + whom + " after " + std::to_string(timeout_s_) + " s, " +
             phase + " (operation " + std::to_string(first.seen >> 24 & 0xffffffffu) +
             " of it seen, " + std::to_string(first.wanted >> 24 & 0xffffffffu) + " wanted)";
    case Fault::kMismatch:
      return where + whom + " runs another operation or other shapes than " + who + ", which was " +
             phase;
    case Fault::kRouting:
      return where + who + " got topk_idx " + std::to_string(static_cast<int64_t>(first.seen)) +
             ", expected -1 to " + std::to_string(first.wanted - 1);
    case Fault::kBounds:
      return where + who + " was to write row " + std::to_string(first.seen) + " of " + whom +
             ", whose buffer has " + std::to_string(first.wanted) + " bytes";
    case Fault::kRevoked:
      return where + who + " came after " + whom + " had given up on it";
    case Fault::kPeer:
      return where + who + " stopped because " + whom + " reported a failure";
  }
  return "";
}

}  // namespace jax_ep
