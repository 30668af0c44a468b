// SPDX-License-Identifier: Apache-2.0
#include "registry.h"

#include <map>
#include <memory>
#include <mutex>

namespace jax_ep {
namespace {

struct Entry {
  std::vector<Group*> groups;
  std::map<int, Member> by_device;
};

struct Registry {
  std::mutex mutex;
  std::map<std::vector<int>, std::unique_ptr<Group>> groups;  // by devices; never erased
  std::map<std::string, Entry, std::less<>> in_use;           // by signature
};

Registry& registry() {
  static auto* r = new Registry;  // outlives every executable
  return *r;
}

std::string join(const std::vector<int>& v) {
  std::string s;
  for (int i : v) s += (s.empty() ? "" : ",") + std::to_string(i);
  return s;
}

}  // namespace

void initialize_groups(const std::string& signature, const std::vector<std::vector<int>>& devices,
                       double timeout_s) {
  Registry& r = registry();
  const std::lock_guard<std::mutex> lock(r.mutex);
  Entry entry;
  for (const std::vector<int>& list : devices) {
    std::unique_ptr<Group>& group = r.groups[list];
    if (group == nullptr) group = std::make_unique<Group>(list);
    group->reset(timeout_s);
    entry.groups.push_back(group.get());
    for (int rank = 0; rank < group->num_ranks(); ++rank) {
      entry.by_device[list[rank]] = Member{group.get(), rank};
    }
  }
  r.in_use[signature] = entry;
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
      lines.push_back(signature + " on GPUs " + join(group->devices()) + ": control block of " +
                      std::to_string(group->control_bytes()) + " bytes on each");
    }
  }
  return lines;
}

}  // namespace jax_ep
