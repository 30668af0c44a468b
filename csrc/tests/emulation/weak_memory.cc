// SPDX-License-Identifier: Apache-2.0
#include "weak_memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {
namespace {

constexpr size_t kPage = 4096;
constexpr int kTurnsBetweenMoods = 3000;

void check(bool good, const char* what) {
  if (good) return;
  std::printf("%s\n", what);
  std::fflush(stdout);
  std::_Exit(5);
}

}  // namespace

WeakMemory::WeakMemory(Machine& machine, int ranks, size_t bytes)
    : machine_(machine),
      ranks_(ranks),
      span_((bytes + kPage - 1) / kPage * kPage),
      untouched_(static_cast<uint32_t>(machine.random()()) | 1),
      may_store_(ranks),
      lost_(ranks),
      on_the_way_(ranks),
      moods_(ranks) {
  void* all = mmap(nullptr, ranks_ * ranks_ * span_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(all != MAP_FAILED, "no memory for the ranks");
  all_ = static_cast<char*>(all);
  machine_.memory = this;
  weak_memory = this;
}

WeakMemory::~WeakMemory() {
  munmap(all_, ranks_ * ranks_ * span_);
  machine_.memory = nullptr;
  weak_memory = nullptr;
}

void WeakMemory::let_store(int rank, std::vector<Region> regions) {
  for (size_t peer = 0; peer < ranks_; ++peer) {
    for (const Region& r : regions) {
      if (peer == size_t(rank)) continue;
      auto* words = reinterpret_cast<uint32_t*>(seen_by(rank, peer) + r.offset);
      std::fill_n(words, r.bytes / sizeof(uint32_t), untouched_);
    }
  }
  may_store_[rank] = std::move(regions);
}

void* WeakMemory::home_of(const void* at) const {
  const size_t offset = static_cast<const char*>(at) - all_;
  if (!is_window(offset)) return const_cast<void*>(at);
  const int owner = offset / span_ % ranks_;
  return seen_by(owner, owner) + offset % span_;
}

bool WeakMemory::store(void* at, const void* value, size_t bytes, bool releases) {
  const size_t offset = static_cast<char*>(at) - all_;
  if (!is_window(offset)) return false;
  const int rank = stream_number();
  const uint64_t block = block_number();
  check(offset / span_ / ranks_ == size_t(rank), "a rank stores through another one's window");
  std::shared_ptr<const Clock> after;
  if (releases) {
    collect(rank, block);
    known_[block][block] = number_;
    after = std::make_shared<const Clock>(known_[block]);
  }
  const uint32_t word = bytes == sizeof(uint64_t) ? bytes : sizeof(uint32_t);
  for (size_t i = 0; i < bytes; i += word) {
    uint64_t v = 0;
    std::memcpy(&v, static_cast<const char*>(value) + i, word);
    put({0, static_cast<char*>(home_of(at)) + i, v, word, rank, block, after});
  }
  return true;
}

// What is on the way no more needs no order.
void WeakMemory::merge(const Clock& from, Clock& to) const {
  const uint64_t oldest = stores_.empty() ? number_ : stores_.begin()->first;
  for (const auto& [block, number] : from) {
    if (number > oldest) to[block] = std::max(to[block], number);
  }
}

void WeakMemory::release(const void* at) {
  const uint64_t block = block_number();
  after_turn(stream_number(), block);
  Clock& known = known_[block];
  known[block] = number_;
  merge(known, released_[at]);
}

void WeakMemory::acquire(const void* at) {
  const auto released = released_.find(at);
  if (released != released_.end()) merge(released->second, known_[block_number()]);
}

void WeakMemory::after_turn(int rank, uint64_t block) {
  if (size_t(rank) < ranks_) collect(rank, block);
}

// What has been stored by no word of ours.
void WeakMemory::collect(int rank, uint64_t block) {
  for (size_t peer = 0; peer < ranks_; ++peer) {
    if (peer == size_t(rank)) continue;
    for (const Region& r : may_store_[rank]) {
      auto* words = reinterpret_cast<uint32_t*>(seen_by(rank, peer) + r.offset);
      const size_t count = r.bytes / sizeof(uint32_t);
      const bool untouched =
          words[0] == untouched_ && std::memcmp(words, words + 1, r.bytes - sizeof(uint32_t)) == 0;
      if (!untouched) collect(rank, block, words, count);
    }
  }
}

void WeakMemory::collect(int rank, uint64_t block, uint32_t* words, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (words[i] == untouched_) continue;
    char* to = static_cast<char*>(home_of(&words[i]));
    put({0, to, words[i], sizeof(uint32_t), rank, block, nullptr});
    words[i] = untouched_;
  }
}

// The stores on the way that are seen before store `number`.
template <typename Visit>
void WeakMemory::visit_earlier(uint64_t number, const Store& s, Visit&& visit) {
  const auto [first, last] = at_.equal_range(s.to);
  for (auto it = first; it != last; ++it) {
    if (it->second < number) visit(it->second);
  }
  if (s.after == nullptr) return;
  for (auto& [other, earlier] : stores_) {
    if (other == number) break;
    if (s.is_after(other, earlier)) visit(other);
  }
}

void WeakMemory::put(Store s) {
  const size_t offset = s.to - all_;
  const size_t owner = offset / span_ % ranks_, at = offset % span_;
  for (const Region& r : lost_[owner]) {
    if (at >= r.offset && at < r.offset + r.bytes) return;
  }
  s.due = turn_ + delay(s.rank);
  visit_earlier(number_, s,
                [&](uint64_t other) { s.due = std::max(s.due, stores_.at(other).due); });
  at_.emplace(s.to, number_);
  due_.emplace(s.due, number_);
  stores_.emplace(number_++, s);
  ++on_the_way_[s.rank];
}

// A store, and what must be seen before it, is seen on that turn at the latest.
void WeakMemory::hurry(uint64_t number, uint64_t due) {
  auto move_forward = [&](uint64_t other) {
    Store& s = stores_.at(other);
    if (s.due <= due) return;
    due_.erase({s.due, other});
    s.due = due;
    due_.emplace(due, other);
  };
  visit_earlier(number, stores_.at(number), move_forward);
  move_forward(number);
}

void WeakMemory::look(const void* at, size_t bytes) {
  if (at_.empty()) return;
  for (size_t i = 0; i < bytes; i += sizeof(uint32_t)) {
    const auto [first, last] = at_.equal_range(static_cast<const char*>(at) + i);
    for (auto it = first; it != last; ++it) {
      const uint64_t due = turn_ + machine_.below(moods_[stores_.at(it->second).rank].soon);
      if (stores_.at(it->second).due > due) hurry(it->second, due);
    }
  }
}

// Sometimes all is soon there; sometimes a few words, or many, take as long as whole operations, or
// all that nobody looks for.
void WeakMemory::change_moods() {
  constexpr double kLate[] = {0, 0, 0.002, 0.02, 0.3, 1, 1, 1};
  for (Mood& mood : moods_) {
    mood.late = kLate[machine_.below(8)];
    mood.soon = 1 << machine_.below(8);
    mood.late_turns = 1 << (9 + machine_.below(6));
  }
}

uint64_t WeakMemory::delay(int rank) {
  const Mood& mood = moods_[rank];
  return machine_.below(machine_.chance(mood.late) ? mood.late_turns : mood.soon);
}

void WeakMemory::move() {
  if (turn_++ % kTurnsBetweenMoods == 0) change_moods();
  while (!due_.empty() && due_.begin()->first <= turn_) deliver();
}

void WeakMemory::deliver_all() {
  while (!due_.empty()) deliver();
}

void WeakMemory::deliver() {
  const uint64_t number = due_.begin()->second;
  const Store s = stores_.at(number);
  std::memcpy(s.to, &s.value, s.bytes);
  --on_the_way_[s.rank];
  due_.erase(due_.begin());
  stores_.erase(number);
  const auto [first, last] = at_.equal_range(s.to);
  for (auto it = first; it != last; ++it) {
    if (it->second == number) {
      at_.erase(it);
      break;
    }
  }
}

}  // namespace emulation
