// SPDX-License-Identifier: Apache-2.0
// A group on the emulated machine with weak memory: each rank's control block, and behind it what
// else peers write into.
#pragma once
#include <vector>

#include "../rank_arrays.h"
#include "weak_memory.h"

namespace jax_ep {

class WeakGroup {
 public:
  // Ranks in nodes of `local`, with `bytes` of memory each, that wait for each other as long as the
  // timeout says.
  WeakGroup(int ranks, int local, size_t bytes, uint64_t seed, double timeout_ms)
      : at(control_layout(ranks)),
        machine(seed),
        memory(machine, ranks, bytes),
        records(ranks),
        local_(local) {
    for (int r = 0; r < ranks; ++r) {
      Header& header = *reinterpret_cast<Header*>(mine(r) + at.header);
      header.generation = 1;
      header.timeout_ns = uint64_t(timeout_ms * 1e6);
      header.record = &records[r];
      auto* mapping = reinterpret_cast<char**>(mine(r) + at.mapping);
      for (int s = 0; s < ranks; ++s) mapping[s * kMaxAllocations] = memory.seen_by(r, s);
    }
  }

  int ranks() const { return static_cast<int>(records.size()); }
  char* mine(int r) const { return memory.seen_by(r, r); }
  Peers peers(int r) const {
    Peers p{};
    p.at = at;
    p.rank = r;
    p.num_ranks = ranks();
    p.node_ranks = local_;
    p.node_first = r / local_ * local_;
    for (int s = p.node_first; s < p.node_first + local_; ++s) p.control[s] = memory.seen_by(r, s);
    return p;
  }
  // Where rank r says where peers may write.
  emulation::WeakMemory::Region ready_of(int r) const {
    return {at.ready + r * sizeof(Ready), sizeof(Ready)};
  }
  // What rank `from` says of its pushes never comes to rank `to`.
  void lose_flags(int from, int to) {
    constexpr size_t kFlags = kMaxChunks * sizeof(uint64_t);
    memory.lose(to, {at.done + from * kFlags, kFlags});
  }
  // Run what has been issued.
  void run(uint64_t most_turns) {
    machine.run([this] { memory.move(); }, most_turns);
    memory.deliver_all();
  }

  const ControlLayout at;
  emulation::Machine machine;
  emulation::WeakMemory memory;
  std::vector<FaultRecord> records;

 private:
  const int local_;
};

// Whether it is what a rank that gives up leaves.
inline bool is_poison(const void* first, size_t bytes) {
  const auto* at = static_cast<const char*>(first);
  return std::all_of(at, at + bytes, [](char byte) { return byte == char(0xff); });
}

}  // namespace jax_ep
