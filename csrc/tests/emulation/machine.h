// SPDX-License-Identifier: Apache-2.0
// A GPU's threads on the host: kernels of several ranks at once, whose warps take turns at random
// and alike for the same seed.
//
// Each block is a thread of the operating system, so that what is `static thread_local` is its
// shared memory; each of its CUDA threads is a fiber with a stack of its own. Only one of all of
// them runs at any time: the machine gives its turn to one block after the other, a block to one
// warp after the other, a warp to each of its lanes until it waits. Memory is therefore as seen by
// all, and what weaker orders would show is not shown, but for stores to other ranks' memory:
// weak_memory.h. Time is counted in turns.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Of the fiber that runs.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
// Of its block: the stream, and a number that no other block has.
int stream_number();
uint64_t block_number();

// By all lanes of a warp: what each lane brings, in order.
const uint64_t* exchange_in_warp(uint64_t mine);
// By all threads of a block: how many bring true.
int count_in_block(bool mine);
// Barrier `id` of a block, of which `threads` threads take part: arrive, and wait unless that is
// all that is asked; whether all that have arrived bring true.
bool meet_in_block(int id, int threads, bool mine, bool waits);
// Shared memory of the block, as its launch sizes it.
char* dynamic_shared();
size_t dynamic_shared_size();
// Others run. `waits`: this thread has nothing to do until they have.
void pause(bool waits);
// Of the machine, in ns.
uint64_t now();

class Block;

// What the machine asks of memory whose stores are seen late.
struct Memory {
  virtual ~Memory() = default;
  // Block `block` of a stream has had a turn.
  virtual void after_turn(int stream, uint64_t block) = 0;
  // Whether all that a stream's kernels have stored is seen: until then the next one waits.
  virtual bool is_settled(int stream) = 0;
};

class Machine {
 public:
  explicit Machine(uint64_t seed);
  ~Machine();
  // A kernel of some blocks of `threads` threads, to run when all that was launched on the same
  // stream before has ended; `name` is said if it does not.
  void launch(int stream, const std::string& name, int blocks, int threads,
              std::function<void()> kernel) {
    launch(stream, name, blocks, threads, 0, std::move(kernel));
  }
  // With some bytes of dynamic shared memory.
  void launch(int stream, const std::string& name, int blocks, int threads, size_t shared,
              std::function<void()> kernel);
  // Of the next kernel on a stream only the first `blocks` have room until nothing else runs.
  void crowd(int stream, int blocks) { room_[stream] = blocks; }
  // The machine that this program has.
  static Machine& here();
  // Run all of them. `between`, now and then: what is no GPU's. Ends the program if that takes
  // more than `most_turns`.
  void run(const std::function<void()>& between, uint64_t most_turns);

  std::mt19937_64& random() { return random_; }
  bool chance(double p) { return std::uniform_real_distribution<double>()(random_) < p; }
  uint64_t number_of_block() { return blocks_so_far_++; }
  int below(int n) { return static_cast<int>(random_() % n); }
  uint64_t time = 1;         // ns
  Memory* memory = nullptr;  // if stores are seen late

 private:
  struct Kernel {
    std::string name;
    int blocks, threads;
    size_t shared;
    std::function<void()> body;
  };
  struct Stream {
    std::deque<Kernel> waiting;
    size_t running = 0;  // blocks
  };
  void start(int stream);
  void start_blocks(int stream, const Kernel& kernel, int first, int last);
  bool has_work();

  std::mt19937_64 random_;
  uint64_t blocks_so_far_ = 0;
  std::map<int, Stream> streams_;
  std::map<int, int> room_;                     // of crowded streams, in blocks
  std::vector<std::function<void()>> later_;    // starts blocks that had no room
  std::vector<std::unique_ptr<Block>> blocks_;  // that have not ended
};

}  // namespace emulation
