// SPDX-License-Identifier: Apache-2.0
#include "registry.h"

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>

#include "../csrc/runtime/stats_ring.h"

namespace jax_ep {
namespace {

struct Entry {
  std::set<Group*> groups;
  std::map<int, Member> by_device;
};

// Timings of each rank; null of ranks of other processes.
using Rings = std::vector<std::unique_ptr<StatsRing>>;

struct Registry {
  std::mutex setup;  // held while a group is made or started, which may wait for the devices
  std::map<std::string, std::unique_ptr<Group>> groups;  // by key; never erased; under `setup`
  std::map<const Group*, Rings> stats;                   // alike, of groups that were asked for it
  std::mutex mutex;                                      // never held while waiting
  std::map<std::string, Entry, std::less<>> in_use;      // by signature; under `mutex`

  Group& group(const std::string& key) {
    const auto found = groups.find(key);
    if (found == groups.end()) throw std::runtime_error("no group " + key);
    return *found->second;
  }
};

Registry& registry() {
  static auto* r = new Registry;  // outlives every executable
  return *r;
}

std::string join(const std::vector<int>& v) {
  std::string s;
  for (int i : v) s += (s.empty() ? "" : ",") + (i < 0 ? "elsewhere" : std::to_string(i));
  return s;
}

std::string describe(const Group& group) {
  const std::string control =
      "control block of " + std::to_string(group.control_bytes()) + " bytes on each, ";
  const SlotSize& slots = group.slots();
  const size_t bytes = slot_bytes(group.num_ranks(), slots);
  const std::string holds =
      std::to_string(slots.tokens) + " tokens of " + std::to_string(slots.row_bytes) + " bytes";
  const Nodes* nodes = group.nodes();
  if (nodes == nullptr) return control + "slots of " + std::to_string(bytes) + " for " + holds;
  const size_t small = bytes + outbox_bytes(group.num_ranks(), slots);
  return control + "nodes of " + std::to_string(nodes->node_ranks) + ", slots and outboxes of " +
         std::to_string(small) + " for " + holds + ", rings of " + std::to_string(nodes->at.slots) +
         " slots of " + std::to_string(nodes->at.slot_bytes) +
         " bytes: " + std::to_string(nodes->at.total - group.control_bytes() - small) + " on each";
}

bool make(const std::string& key, const std::function<std::unique_ptr<Group>()>& make_new) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.setup);
  std::unique_ptr<Group>& group = r.groups[key];
  if (group == nullptr) group = make_new();
  group->settle();
  return !group->complete();
}

}  // namespace

bool make_group(const std::string& key, const std::vector<int>& devices, int slot_tokens,
                int slot_row_bytes) {
  return make(
      key, [&] { return std::make_unique<Group>(devices, SlotSize{slot_tokens, slot_row_bytes}); });
}

bool make_node_group(const std::string& key, const std::vector<int>& devices, const Piece& piece) {
  return make(
      key, [&] { return std::make_unique<Group>(devices, piece.slots, nodes_in(piece, devices)); });
}

std::vector<Exported> export_rank(const std::string& key, int rank, uint64_t in_pool) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.setup);
  return r.group(key).export_rank(rank, reinterpret_cast<const void*>(in_pool));
}

void attach_rank(const std::string& key, int rank, const std::vector<Exported>& exported) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.setup);
  r.group(key).attach(rank, exported);
}

void start_group(const std::string& signature, const std::string& key, uint64_t generation,
                 double timeout_s, int ranks_per_device) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> setup(r.setup);
  Group& group = r.group(key);
  if (!group.complete())
    throw std::runtime_error("group " + key + " lacks ranks of other processes");
  group.reset(generation, timeout_s, ranks_per_device);
  for (const auto& ring : r.stats[&group]) {
    if (ring != nullptr) ring->clear();
  }
  const std::lock_guard<std::mutex> lock(r.mutex);
  Entry& entry = r.in_use[signature];
  entry.groups.insert(&group);
  for (int rank = 0; rank < group.num_ranks(); ++rank) {
    const int device = group.devices()[rank];
    if (device < 0) continue;
    Member& member = entry.by_device[device];
    member.group = &group;
    member.rank = rank;  // and records timings as before
  }
}

bool is_broken(const std::string& signature) {
  Registry& r = registry();
  std::set<Group*> groups;
  {
    const std::lock_guard<std::mutex> lock(r.mutex);
    const auto entry = r.in_use.find(signature);
    if (entry != r.in_use.end()) groups = entry->second.groups;
  }
  for (const Group* group : groups) {
    if (group->broken()) return true;
  }
  return false;
}

void record_stats(const std::string& signature, bool on) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> setup(r.setup);
  std::map<int, Member> members;
  {
    const std::lock_guard<std::mutex> lock(r.mutex);
    members = r.in_use[signature].by_device;
  }
  for (auto& [device, member] : members) {
    member.stats = nullptr;
    if (!on) continue;
    Rings& rings = r.stats[member.group];
    rings.resize(member.group->num_ranks());
    std::unique_ptr<StatsRing>& ring = rings[member.rank];
    if (ring == nullptr) ring = std::make_unique<StatsRing>(device, member.group->num_ranks());
    member.stats = ring->words();
  }
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.in_use[signature].by_device = members;
}

std::vector<RankStats> read_stats() {
  Registry& r = registry();
  const std::lock_guard<std::mutex> setup(r.setup);  // no group is made or started meanwhile
  std::set<const Group*> in_use;
  {
    const std::lock_guard<std::mutex> lock(r.mutex);
    for (const auto& [signature, entry] : r.in_use) {
      in_use.insert(entry.groups.begin(), entry.groups.end());
    }
  }
  std::vector<RankStats> all;
  for (const Group* group : in_use) {
    const Rings& rings = r.stats[group];
    for (int rank = 0; rank < static_cast<int>(rings.size()); ++rank) {
      if (rings[rank] == nullptr) continue;
      const Peers& peers = group->peers(rank);
      all.push_back({group->devices()[rank], rank, stats_words(group->num_ranks()),
                     rings[rank]->read(peers.control[rank] + peers.at.header)});
    }
  }
  return all;
}

void finalize_groups() {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  r.in_use.clear();
}

Member find_member(std::string_view signature, int device) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto entry = r.in_use.find(signature);
  if (entry == r.in_use.end()) return {};
  const auto member = entry->second.by_device.find(device);
  return member == entry->second.by_device.end() ? Member{} : member->second;
}

std::string describe_faults() {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  for (const auto& [signature, entry] : r.in_use) {
    for (const Group* group : entry.groups) {
      const std::string fault = group->describe_fault();
      if (!fault.empty()) return "group " + signature + ": " + fault;
    }
  }
  return "";
}

std::vector<std::string> describe_groups() {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  std::vector<std::string> lines;
  for (const auto& [signature, entry] : r.in_use) {
    for (const Group* group : entry.groups) {
      lines.push_back("group " + signature + " on GPUs " + join(group->devices()) + ": " +
                      describe(*group));
    }
  }
  return lines;
}

}  // namespace jax_ep
