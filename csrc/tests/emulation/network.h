// SPDX-License-Identifier: Apache-2.0
// A network between nodes that does the worst it may. Puts are cut into pieces, which it delivers
// in any order among all that is on the way, each read from its source only then; a signal comes
// after all of its own data, and is otherwise unordered too. Now and then nothing moves for a
// while.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "machine.h"

namespace emulation {

class Network {
 public:
  // `arenas[r]`: of rank r, `bytes` long.
  Network(Machine& machine, std::vector<char*> arenas, size_t bytes)
      : machine_(machine), arenas_(std::move(arenas)), bytes_(bytes) {}

  void put(int from_rank, int rank, uint64_t to, const char* from, size_t bytes, uint64_t signal,
           uint64_t value) {
    check(to + bytes <= bytes_ && from >= arenas_[from_rank] &&
              from + bytes <= arenas_[from_rank] + bytes_,
          "a put outside the arena");
    sent[{from_rank, rank}] += bytes;
    ++puts[{from_rank, rank}];
    Message m{arenas_[rank] + to, from, {}, word(rank, signal), value};
    for (size_t at = 0; at < bytes;) {
      const size_t most = bytes - at;
      const size_t piece = machine_.chance(0.3) ? most : 1 + machine_.random()() % most;
      m.pieces.push_back({at, piece});
      at += piece;
    }
    on_the_way_.push_back(m);
  }
  void signal(int rank, uint64_t signal, uint64_t value) {
    on_the_way_.push_back(Message{nullptr, nullptr, {}, word(rank, signal), value});
  }

  // Between turns of the machine.
  void move() {
    if (quiet_ > 0) {
      --quiet_;
      return;
    }
    if (machine_.chance(0.002)) quiet_ = machine_.below(300);
    for (int i = machine_.below(4); i > 0 && !on_the_way_.empty(); --i) deliver();
  }
  void deliver_all() {
    while (!on_the_way_.empty()) deliver();
  }

  // Signals to these bytes of a rank's arena never come.
  void lose(int rank, size_t offset, size_t bytes) {
    lost_.push_back({arenas_[rank] + offset, arenas_[rank] + offset + bytes});
  }

  std::map<std::pair<int, int>, size_t> sent, puts;  // bytes of puts, and how many, [from, to]

 private:
  struct Message {
    char* to;
    const char* from;
    std::vector<std::pair<size_t, size_t>> pieces;  // not delivered: first byte, bytes
    volatile uint64_t* signal;
    uint64_t value;
  };

  static void check(bool good, const char* what) {
    if (good) return;
    std::printf("%s\n", what);
    std::fflush(stdout);
    std::_Exit(5);
  }
  uint64_t* word(int rank, uint64_t offset) const {
    check(offset % 8 == 0 && offset + 8 <= bytes_, "a signal outside the arena");
    return reinterpret_cast<uint64_t*>(arenas_[rank] + offset);
  }
  // One piece of anything, or a signal whose data have all arrived.
  void deliver() {
    const size_t at = machine_.random()() % on_the_way_.size();
    Message& m = on_the_way_[at];
    if (!m.pieces.empty()) {
      std::swap(m.pieces[machine_.random()() % m.pieces.size()], m.pieces.back());
      const auto [first, bytes] = m.pieces.back();
      std::memcpy(m.to + first, m.from + first, bytes);
      m.pieces.pop_back();
      return;
    }
    auto is_lost = [&](const auto& range) {
      const auto* at = reinterpret_cast<const volatile char*>(m.signal);
      return at >= range.first && at < range.second;
    };
    if (std::none_of(lost_.begin(), lost_.end(), is_lost)) *m.signal = m.value;
    std::swap(m, on_the_way_.back());
    on_the_way_.pop_back();
  }

  Machine& machine_;
  std::vector<char*> arenas_;
  size_t bytes_;
  std::vector<Message> on_the_way_;
  std::vector<std::pair<char*, char*>> lost_;
  int quiet_ = 0;
};

// The kernels' transport over it, of one rank.
struct EmulatedTransport {
  Network* network;
  int me;

  template <typename Team>
  void put_signal(const Team& team, int rank, uint64_t to, const char* from, size_t bytes,
                  uint64_t signal, uint64_t value) const {
    if (team.thread == 0) network->put(me, rank, to, from, bytes, signal, value);
  }
  void put_signal_by_warp(int rank, uint64_t to, const char* from, size_t bytes, uint64_t signal,
                          uint64_t value) const {
    if (thread_index().x % 32 == 0) network->put(me, rank, to, from, bytes, signal, value);
  }
  void signal(int rank, uint64_t at, uint64_t value) const { network->signal(rank, at, value); }
  void receive(const uint64_t*) const {}
};

}  // namespace emulation
