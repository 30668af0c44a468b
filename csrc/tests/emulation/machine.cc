// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <semaphore.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace emulation {
namespace {

constexpr int kLanes = 32;
constexpr char kGarbage = 0x5b;  // in shared memory that nobody has written
constexpr size_t kStack = 128 * 1024;
constexpr uint64_t kTurn = 500;  // ns
constexpr int kMostPasses = 24;  // of a block's warps in one turn
constexpr int kTurnsBetweenMoods = 2000;
constexpr int kLongestDoze = 40;  // turns

struct Warp {
  uint64_t in[kLanes], out[kLanes];
  int arrived = 0;
  uint64_t exchanges = 0;
};

struct Barrier {
  int arrived = 0;
  bool all = true, result = true;
  uint64_t meetings = 0;
};

struct Fiber {
  Index index;
  ucontext_t start;
  jmp_buf state;
  bool started = false, ended = false;
  const uint64_t* counter = nullptr;  // waits until it is no longer `seen`
  uint64_t seen = 0;
  Warp* warp = nullptr;

  bool can_run() const { return !ended && (counter == nullptr || *counter != seen); }
};

}  // namespace

class Block {
 public:
  Block(Machine& machine, int stream, int index, const std::string& name, int blocks, int threads,
        size_t shared, std::function<void()> kernel)
      : stream(stream),
        number(machine.number_of_block()),
        machine_(machine),
        name_(name),
        kernel_(std::move(kernel)),
        shared_(shared, kGarbage) {
    index_.x = index;
    grid_.x = blocks;
    size_.x = threads;
    sem_init(&go_, 0, 0);
    sem_init(&back_, 0, 0);
    thread_ = std::thread([this] { live(); });
  }
  ~Block() {
    thread_.join();
    sem_destroy(&go_);
    sem_destroy(&back_);
  }

  // By the machine: one turn.
  void take_turn() {
    sem_post(&go_);
    sem_wait(&back_);
  }
  bool ended() const { return left_ == 0; }
  // Whether all that ran in the last turn waits.
  bool idle() const { return idle_; }
  std::string name() const { return name_ + " block " + std::to_string(index_.x); }

  // By a fiber of this block.
  const uint64_t* exchange(uint64_t mine) {
    Warp& w = *running_->warp;
    w.in[running_->index.x % kLanes] = mine;
    if (++w.arrived == kLanes) {
      w.arrived = 0;
      std::memcpy(w.out, w.in, sizeof w.out);
      ++w.exchanges;
    } else {
      await(&w.exchanges);
    }
    return w.out;
  }
  int count(bool mine) {
    counted_ += mine;
    if (++arrived_ == static_cast<int>(size_.x)) {
      result_ = counted_;
      arrived_ = counted_ = 0;
      ++meetings_;
    } else {
      await(&meetings_);
    }
    return result_;
  }
  bool meet(int id, int threads, bool mine, bool waits) {
    Barrier& b = barriers_[id];
    b.all &= mine;
    if (++b.arrived == threads) {
      b.result = b.all;
      b.arrived = 0;
      b.all = true;
      ++b.meetings;
    } else if (waits) {
      await(&b.meetings);
    }
    return b.result;
  }
  std::vector<char>& shared() { return shared_; }
  void pause(bool waits) {
    if (waits) idle_ = true;
    running_->counter = nullptr;
    leave_fiber();
  }

  const int stream;
  const uint64_t number;
  bool slow = false;
  int doze = 0;  // turns until it looks again whether it must still wait
  Machine& machine_;
  Index index_, size_, grid_;
  Fiber* running_ = nullptr;

 private:
  void await(const uint64_t* counter) {
    running_->counter = counter;
    running_->seen = *counter;
    leave_fiber();
  }
  void leave_fiber() {
    if (_setjmp(running_->state) == 0) _longjmp(home_, 1);
  }
  void enter_fiber(Fiber* f) {
    running_ = f;
    if (_setjmp(home_) != 0) return;
    if (f->started) _longjmp(f->state, 1);
    f->started = true;
    setcontext(&f->start);
  }

  static void begin();
  void make_fibers() {
    const int threads = size_.x;
    stacks_ = static_cast<char*>(mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) {
      std::printf("no memory for %d stacks\n", threads);
      std::_Exit(3);
    }
    warps_.resize(threads / kLanes);
    fibers_.resize(threads);
    left_ = threads;
    for (int i = 0; i < threads; ++i) {
      Fiber& f = fibers_[i];
      f.index.x = i;
      f.warp = &warps_[i / kLanes];
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = stacks_ + i * kStack;
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      makecontext(&f.start, &Block::begin, 0);
    }
  }
  void live();
  // Some passes over the lanes of warps; short if all that runs only waits.
  void run_fibers() {
    const int warps = static_cast<int>(warps_.size());
    const int passes = 1 + machine_.below(kMostPasses);
    idle_ = false;
    for (int pass = 0; pass < passes && !idle_ && left_ > 0; ++pass) {
      Fiber* first = &fibers_[machine_.below(warps) * kLanes];
      const int from = machine_.below(kLanes);
      for (int i = 0; i < kLanes; ++i) {
        Fiber& f = first[(from + i) % kLanes];
        if (!f.can_run()) continue;
        enter_fiber(&f);
        if (f.ended) --left_;
      }
    }
  }

  const std::string name_;
  std::function<void()> kernel_;
  std::vector<char> shared_;
  std::thread thread_;
  sem_t go_, back_;
  char* stacks_ = nullptr;
  std::vector<Warp> warps_;
  Barrier barriers_[16];
  std::vector<Fiber> fibers_;
  jmp_buf home_;
  int left_ = 1, arrived_ = 0, counted_ = 0, result_ = 0;
  uint64_t meetings_ = 0;
  bool idle_ = false;
};

namespace {
thread_local Block* block_here = nullptr;  // of this thread of the operating system
Machine* machine_here = nullptr;
}  // namespace

void Block::begin() {
  Block* b = block_here;
  b->kernel_();
  b->running_->ended = true;
  _longjmp(b->home_, 1);
}

void Block::live() {
  block_here = this;
  sem_wait(&go_);
  make_fibers();
  for (;;) {
    run_fibers();
    if (left_ == 0) break;
    sem_post(&back_);
    sem_wait(&go_);
  }
  munmap(stacks_, size_.x * kStack);
  sem_post(&back_);
}

const Index& thread_index() { return block_here->running_->index; }
const Index& block_index() { return block_here->index_; }
const Index& block_size() { return block_here->size_; }
const Index& grid_size() { return block_here->grid_; }
const uint64_t* exchange_in_warp(uint64_t mine) { return block_here->exchange(mine); }
int count_in_block(bool mine) { return block_here->count(mine); }
bool meet_in_block(int id, int threads, bool mine, bool waits) {
  return block_here->meet(id, threads, mine, waits);
}
char* dynamic_shared() { return block_here->shared().data(); }
size_t dynamic_shared_size() { return block_here->shared().size(); }
void pause(bool waits) { block_here->pause(waits); }
uint64_t now() { return machine_here->time; }

uint64_t block_number() { return block_here->number; }
int stream_number() { return block_here->stream; }

Machine::Machine(uint64_t seed) : random_(seed) { machine_here = this; }
Machine::~Machine() = default;

Machine& Machine::here() { return *machine_here; }

void Machine::launch(int stream, const std::string& name, int blocks, int threads, size_t shared,
                     std::function<void()> kernel) {
  streams_[stream].waiting.push_back({name, blocks, threads, shared, std::move(kernel)});
}

void Machine::start(int stream) {
  Stream& s = streams_[stream];
  if (s.running > 0 || s.waiting.empty()) return;
  if (memory != nullptr && !memory->is_settled(stream)) return;
  const Kernel kernel = std::move(s.waiting.front());
  s.waiting.pop_front();
  s.running = kernel.blocks;
  const auto crowded = room_.extract(stream);
  const int room = crowded.empty() ? kernel.blocks : std::min(crowded.mapped(), kernel.blocks);
  start_blocks(stream, kernel, 0, room);
  if (room == kernel.blocks) return;
  later_.push_back(
      [this, stream, kernel, room] { start_blocks(stream, kernel, room, kernel.blocks); });
}

void Machine::start_blocks(int stream, const Kernel& kernel, int first, int last) {
  for (int i = first; i < last; ++i) {
    blocks_.push_back(std::make_unique<Block>(*this, stream, i, kernel.name, kernel.blocks,
                                              kernel.threads, kernel.shared, kernel.body));
  }
}

bool Machine::has_work() {
  bool waiting = false;
  for (auto& [number, stream] : streams_) {
    start(number);
    waiting |= !stream.waiting.empty();
  }
  if (blocks_.empty()) {
    for (auto& start_the_rest : later_) start_the_rest();
    later_.clear();
  }
  return waiting || !blocks_.empty();
}

void Machine::run(const std::function<void()>& between, uint64_t most_turns) {
  double slow = 0;
  for (uint64_t turn = 0; has_work(); ++turn) {
    if (turn == most_turns) {
      for (auto& block : blocks_) std::printf("%s has not ended\n", block->name().c_str());
      std::fflush(stdout);
      std::_Exit(4);
    }
    // Some blocks are slow for a while, others in the next one.
    if (turn % kTurnsBetweenMoods == 0) {
      slow = below(4) * 0.25;
      for (auto& block : blocks_) block->slow = chance(slow);
    }
    time += kTurn;
    between();
    if (blocks_.empty()) continue;
    const size_t at = random_() % blocks_.size();
    if (blocks_[at]->doze > 0 && --blocks_[at]->doze > 0) continue;
    if (blocks_[at]->slow && !chance(0.02)) continue;
    blocks_[at]->take_turn();
    if (memory != nullptr) memory->after_turn(blocks_[at]->stream, blocks_[at]->number);
    if (blocks_[at]->idle()) blocks_[at]->doze = below(kLongestDoze);
    if (!blocks_[at]->ended()) continue;
    --streams_[blocks_[at]->stream].running;
    std::swap(blocks_[at], blocks_.back());
    blocks_.pop_back();
  }
}

}  // namespace emulation
