// SPDX-License-Identifier: Apache-2.0
// Memory whose stores to other ranks are seen late: each word for itself, in any order, as the seed
// has it; a word of 32 or 64 bits as it is stored, wider ones in words of 32 bits. Sometimes a word
// is there only when its rank looks for it, and what nobody looks for stays away for long. A
// release is seen after all that its block had stored before it, and what blocks of the same rank
// had stored before a release that it has acquired. Stores to a rank's own memory, atomics and
// loads are as they are. A kernel ends when all that it has stored is seen.
//
// A rank sees the memory of each peer through a window, which holds one value everywhere. Whatever
// differs from it after a turn has been stored, whether the kernel has a word for that or not.
#pragma once
#include <map>
#include <memory>
#include <set>
#include <unordered_map>

#include "machine.h"

namespace emulation {

class WeakMemory : public Memory {
 public:
  struct Region {
    size_t offset, bytes;
  };
  // `bytes` of memory of each of `ranks` ranks, whose streams have their numbers.
  WeakMemory(Machine& machine, int ranks, size_t bytes);
  ~WeakMemory() override;
  WeakMemory(const WeakMemory&) = delete;
  WeakMemory& operator=(const WeakMemory&) = delete;

  // A rank's memory as another one addresses it; its own: the memory itself.
  char* seen_by(int rank, int owner) const { return all_ + (rank * ranks_ + owner) * span_; }
  // Where a rank may store into peers' memory, by other means than atomics.
  void let_store(int rank, std::vector<Region> regions);

  // By a kernel's words. False: `at` is not in a window.
  bool store(void* at, const void* value, size_t bytes, bool releases);
  // By a kernel that loads from its own memory: what is on the way there comes soon.
  void look(const void* at, size_t bytes);
  // By a kernel that releases a word of its own memory, or acquires one.
  void release(const void* at);
  void acquire(const void* at);
  // What `at` is a window's view of.
  void* home_of(const void* at) const;

  // Between turns of the machine: what is due is seen.
  void move();
  void deliver_all();

  void after_turn(int rank, uint64_t block) override;
  bool is_settled(int rank) override { return size_t(rank) >= ranks_ || on_the_way_[rank] == 0; }

  // Stores to these bytes of a rank's memory never come.
  void lose(int owner, Region region) { lost_[owner].push_back(region); }

 private:
  // Of each block: its stores below this number.
  using Clock = std::map<uint64_t, uint64_t>;

  struct Store {
    uint64_t due;  // the turn
    char* to;
    uint64_t value;
    uint32_t bytes;
    int rank;
    uint64_t block;
    std::shared_ptr<const Clock> after;  // of a release: what is seen before it

    bool is_after(uint64_t number, const Store& other) const {
      const auto known = after->find(other.block);
      return known != after->end() && number < known->second;
    }
  };

  // How a rank's stores travel: how many are late; the most turns that others take, and these.
  struct Mood {
    double late = 0;
    int soon = 1, late_turns = 1;
  };

  bool is_window(size_t offset) const {
    return offset < ranks_ * ranks_ * span_ && offset / span_ % (ranks_ + 1) != 0;
  }
  void collect(int rank, uint64_t block);
  void collect(int rank, uint64_t block, uint32_t* words, size_t count);
  void put(Store s);
  void merge(const Clock& from, Clock& to) const;
  void hurry(uint64_t number, uint64_t due);
  template <typename Visit>
  void visit_earlier(uint64_t number, const Store& s, Visit&& visit);
  void change_moods();
  uint64_t delay(int rank);
  void deliver();

  Machine& machine_;
  const size_t ranks_;
  size_t span_;
  char* all_;
  const uint32_t untouched_;
  std::vector<std::vector<Region>> may_store_, lost_;  // by rank
  std::vector<size_t> on_the_way_;                     // stores of each rank
  std::map<uint64_t, Store> stores_;                   // that are on the way, in their order
  std::set<std::pair<uint64_t, uint64_t>> due_;        // the same: turn, number
  std::unordered_multimap<const char*, uint64_t> at_;  // the same by place
  std::unordered_map<uint64_t, Clock> known_;          // by block
  std::unordered_map<const void*, Clock> released_;    // by word
  uint64_t turn_ = 0, number_ = 0;
  std::vector<Mood> moods_;  // by rank
};

// Of this program; null: stores are seen at once.
inline WeakMemory* weak_memory = nullptr;

}  // namespace emulation
