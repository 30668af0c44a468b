// SPDX-License-Identifier: Apache-2.0
#include "group.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
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
    case Operation::kDispatchStart:
      return "dispatch_start";
    case Operation::kDispatchDone:
      return "dispatch_done";
    case Operation::kCombineStart:
      return "combine_start";
    case Operation::kCombineDone:
      return "combine_done";
    case Operation::kRouting:
      return "exchange_routing";
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
    case Phase::kMessage:
      return "waiting for its message";
    case Phase::kRoom:
      return "waiting for room in its ring";
  }
  return "?";
}

}  // namespace

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

Group::Group(std::vector<int> devices, const SlotSize& slots, std::optional<Nodes> nodes)
    : devices_(std::move(devices)), slots_(slots), nodes_(std::move(nodes)) {
  const int R = num_ranks();
  if (R < 1 || R > kMaxRanks) {
    throw std::runtime_error("group: expected 1 to " + std::to_string(kMaxRanks) + " ranks, got " +
                             std::to_string(R));
  }
  std::set<int> here;
  for (int device : devices_) {
    if (device < 0) spans_processes_ = true;
    if (device >= 0) here.insert(device);
  }
  try {
    for (int a : here) {
      for (int b : here) {
        if (a != b) enable_peer(a, b);
      }
    }
    require(cudaHostAlloc(&records_, R * sizeof(FaultRecord),
                          cudaHostAllocPortable | cudaHostAllocMapped),
            "cudaHostAlloc of fault records");
    own_pool_.resize(R);
    for (int device : here) {
      OnDevice on(device);
      require(load_plan(), "loading the plan kernel");
      require(load_dispatch(), "loading the dispatch kernels");
      require(load_combine(), "loading the combine kernels");
      require(load_slot_dispatch(), "loading the dispatch kernels of small batches");
      require(load_slot_combine(), "loading the combine kernels of small batches");
      if (nodes_) require(nodes_->library->load_kernels(), "loading the kernels between nodes");
      speeds_[device] = speeds_of(device);
      control_[device] = nodes_ ? nodes_->control : std::vector<char*>(R);
      pool_[device].resize(R);
    }
    for (int r = 0; r < R; ++r) {
      if (devices_[r] < 0 || nodes_) continue;
      OnDevice on(devices_[r]);
      char* block = nullptr;
      if (spans_processes_) {
        block = allocate_shared(devices_[r], shared_bytes()).base;
        if (here.size() > 1) {
          throw std::runtime_error(
              "group: expected one GPU per process, or all GPUs of the group in one process");
        }
      } else {
        require(cudaMalloc(&block, shared_bytes()), "cudaMalloc of a control block and slots");
      }
      for (int device : here) control_[device][r] = block;
    }
  } catch (...) {
    release();
    throw;
  }
}

std::vector<Exported> Group::export_rank(int rank, const void* in_pool) {
  OnDevice on(devices_[rank]);
  std::vector<Exported> exported = {export_allocation(in_pool)};
  own_pool_[rank] = exported[0].range;
  pool_[devices_[rank]][rank] = exported[0].range.base;
  if (!nodes_) exported.push_back(export_allocation(control_.at(devices_[rank])[rank]));
  return exported;
}

void Group::attach(int rank, const std::vector<Exported>& exported) {
  auto import = [](const Exported& e, int device) {
    return import_allocation(e.fd, e.range.bytes, device).base;
  };
  for (auto& [device, control] : control_) {
    OnDevice on(device);
    pool_[device][rank] = import(exported.at(0), device);
    if (!nodes_) control[rank] = import(exported.at(1), device);
  }
}

bool Group::complete() const {
  for (const auto& [device, control] : control_) {
    for (int r = 0; r < num_ranks(); ++r) {
      if (nodes_ && nodes_->control[r] == nullptr) continue;  // on another node
      if (control[r] == nullptr) return false;
      if (shares_pools() && pool_.at(device)[r] == nullptr) return false;
    }
  }
  return true;
}

void Group::settle() const {
  for (const auto& [device, control] : control_) {
    OnDevice on(device);
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
}

void Group::reset(uint64_t generation, double timeout_s, int ranks_per_device) {
  timeout_s_ = timeout_s;
  ranks_per_device_ = ranks_per_device;
  const int R = num_ranks();
  const ControlLayout at = control_layout(R);
  peers_.assign(R, Peers{});
  settle();
  std::memset(static_cast<void*>(records_), 0, R * sizeof(FaultRecord));
  for (int r = 0; r < R; ++r) {
    if (devices_[r] < 0) continue;
    const int device = devices_[r];
    OnDevice on(device);
    char* block = control_[device][r];
    require(cudaMemset(block, 0, shared_bytes()), "cudaMemset of a control block");
    Header header{};
    header.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
    header.generation = generation;
    header.record = records_ + r;
    require(cudaMemcpy(block + at.header, &header, sizeof header, cudaMemcpyHostToDevice),
            "cudaMemcpy of a header");
    std::vector<char*> mapping(R * kMaxAllocations);  // allocation 0: addresses as they are
    for (int s = 0; s < R; ++s) mapping[s * kMaxAllocations + 1] = pool_[device][s];
    require(cudaMemcpy(block + at.mapping, mapping.data(), mapping.size() * sizeof(char*),
                       cudaMemcpyHostToDevice),
            "cudaMemcpy of the mapping");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    Peers& p = peers_[r];
    for (int s = 0; s < R; ++s) p.control[s] = control_[device][s];
    p.at = at;
    p.slots = slot_layout(slots_);
    p.rank = r;
    p.num_ranks = R;
    p.node_first = node_of(r);
    p.node_ranks = node_ranks();
  }
}

Group::~Group() { release(); }

void Group::release() noexcept {
  for (int r = 0; r < num_ranks(); ++r) {
    if (devices_[r] < 0 || spans_processes_ || control_.count(devices_[r]) == 0) continue;
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(devices_[r]);
    cudaDeviceSynchronize();
    cudaFree(control_[devices_[r]][r]);
    cudaSetDevice(before);
  }
  control_.clear();
  if (records_ != nullptr) cudaFreeHost(records_);
  records_ = nullptr;
}

int Group::most_sms(int rank) const {
  return std::max(1, speeds_.at(devices_[rank]).sms / ranks_per_device_);
}

int Group::default_sms(int rank, const Demand& of) const {
  return std::min(jax_ep::default_sms(speeds_.at(devices_[rank]), of),
                  leaving_room(most_sms(rank)));
}

bool Group::locate(int rank, const void* pointer, Location* out) const {
  const auto* p = static_cast<const char*>(pointer);
  if (!shares_pools()) {
    *out = Location{reinterpret_cast<uint64_t>(p), 0, 0};
    return true;
  }
  const Range& pool = own_pool_[rank];
  if (p < pool.base || p >= pool.base + pool.bytes) return false;
  *out = Location{static_cast<uint64_t>(p - pool.base), 1, 0};
  return true;
}

bool Group::broken() const {
  const ControlLayout at = control_layout(num_ranks());
  for (int r = 0; r < num_ranks(); ++r) {
    if (devices_[r] < 0) continue;
    OnDevice on(devices_[r]);
    Header header{};
    require(cudaMemcpy(&header, control_.at(devices_[r])[r] + at.header, sizeof header,
                       cudaMemcpyDeviceToHost),
            "cudaMemcpy of a header");
    if (header.broken != 0) return true;
  }
  return false;
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
  const std::string where =
      std::string("jax_ep.") + name_of(static_cast<Operation>(first.operation)) + ": ";
  const std::string phase = name_of(static_cast<Phase>(first.phase));
  const bool between_nodes = first.phase == static_cast<uint32_t>(Phase::kMessage) ||
                             first.phase == static_cast<uint32_t>(Phase::kRoom);
  const std::string counted = between_nodes ? "message " : "operation ";
  switch (static_cast<Fault>(first.fault)) {
    case Fault::kNone:
      return "";
    case Fault::kTimeout:
      return where + who + " gave up on " + whom + " after " + std::to_string(timeout_s_) + " s, " +
             phase + " (" + counted + std::to_string(first.seen >> 24 & 0xffffffffu) +
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
    case Fault::kBusy:
      return where + who + " began while another operation of the group was running on its GPU";
    case Fault::kInFlight: {
      const std::string last = std::to_string(static_cast<int64_t>(first.seen));
      const std::string turns = ": expected one start, then its done, in turn";
      if (first.wanted == 0) return where + who + " began before the done of start " + last + turns;
      return where + who + " wants start " + std::to_string(static_cast<int64_t>(first.wanted)) +
             ", but the last one was " + last + turns;
    }
    case Fault::kPeer:
      return where + who + " stopped because " + whom + " reported a failure";
  }
  return "";
}

}  // namespace jax_ep
