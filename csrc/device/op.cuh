// SPDX-License-Identifier: Apache-2.0
// One operation of one rank while its kernel runs: the words of the peers' control blocks, bounded
// waits, the first failure, grid barriers, and leaving.
#pragma once
#include "../kernels/launch.h"
#include "ptx.cuh"
#include "stats.cuh"
#include "warp.cuh"

namespace jax_ep {

// Typed access to rank r's control block.
class Block {
 public:
  __device__ Block(const Peers& peers, int r)
      : at_(peers.at), base_(peers.control[r]), R_(peers.num_ranks) {}
  __device__ Header& header() const { return *reinterpret_cast<Header*>(base_ + at_.header); }
  __device__ const char* mapping(int rank, int allocation) const {
    return reinterpret_cast<const char* const*>(base_ +
                                                at_.mapping)[rank * kMaxAllocations + allocation];
  }
  __device__ Ready& ready(int from) const {
    return reinterpret_cast<Ready*>(base_ + at_.ready)[from];
  }
  __device__ uint32_t* pushed(int peer, int chunk) const {
    return reinterpret_cast<uint32_t*>(base_ + at_.pushed) + peer * kMaxChunks + chunk;
  }
  __device__ uint64_t* borrowed(int peer) const {
    return reinterpret_cast<uint64_t*>(base_ + at_.borrowed) + peer;
  }
  __device__ uint64_t* lease(int peer) const {
    return reinterpret_cast<uint64_t*>(base_ + at_.lease) + peer;
  }
  __device__ uint64_t* left(int from) const {
    return reinterpret_cast<uint64_t*>(base_ + at_.left) + from;
  }
  __device__ uint64_t* done(int from, int chunk) const {
    return reinterpret_cast<uint64_t*>(base_ + at_.done) + from * kMaxChunks + chunk;
  }
  __device__ uint64_t* hello(int parity, int from) const {
    return reinterpret_cast<uint64_t*>(base_ + at_.hello) + parity * R_ + from;
  }
  // Two choices a word; the sources follow each other.
  __device__ uint64_t* routing(int parity, int from) const {
    return reinterpret_cast<uint64_t*>(base_ + at_.routing) +
           size_t(parity * R_ + from) * (kMaxPairs / 2);
  }

 private:
  const ControlLayout& at_;
  char* base_;
  int R_;
};

__device__ inline Header& header_of(const Call& call) {
  return Block(call.peers, call.peers.rank).header();
}

// What follows is rare, or waits anyway: out of line, so that the kernels' loops stay in the
// instruction cache.

__device__ __noinline__ inline void record_fault(const Call& call, Fault fault, Phase phase,
                                                 int awaited, uint64_t seen, uint64_t wanted) {
  FaultRecord& r = *header_of(call).record;
  r.operation = static_cast<uint32_t>(call.operation);
  r.phase = static_cast<uint32_t>(phase);
  r.rank = call.peers.rank;
  r.awaited = awaited;
  r.seen = seen;
  r.wanted = wanted;
  __threadfence_system();  // the host reads `fault` first
  *reinterpret_cast<volatile uint32_t*>(&r.fault) = static_cast<uint32_t>(fault);
}

// A peer failed first: say so once, for this rank's `check`.
__device__ __noinline__ inline void report_peer(const Call& call, Phase phase) {
  const Header& mine = header_of(call);
  const int who = static_cast<int>(load_relaxed(&mine.broken)) - 1;
  if (who == call.peers.rank || *reinterpret_cast<volatile uint32_t*>(&mine.record->fault) != 0) {
    return;
  }
  record_fault(call, Fault::kPeer, phase, who, 0, 0);
}

// Whether a thread of this block has given up; small batches look at it when they leave.
__device__ inline volatile uint32_t& block_gave_up() {
  __shared__ uint32_t gave_up;
  return gave_up;
}

__device__ __noinline__ inline void report_failure(const Call& call, Fault fault, Phase phase,
                                                   int awaited, uint64_t seen, uint64_t wanted) {
  const int me = call.peers.rank;
  block_gave_up() = 1;
  if (cas_acq_rel_sys(&header_of(call).broken, 0, 1 + me) != 0) {
    report_peer(call, phase);
    return;
  }
  record_fault(call, fault, phase, awaited, seen, wanted);
  const int first = call.peers.node_first;
  for (int p = first; p < first + call.peers.node_ranks; ++p) {
    if (p != me) cas_acq_rel_sys(&Block(call.peers, p).header().broken, 0, 1 + me);
  }
}

// Whether a wait for rank `from` that began at `start` is to be given up.
__device__ __noinline__ inline bool is_hopeless(const Call& call, uint64_t tag, uint64_t start,
                                                int from, Phase phase, uint64_t seen) {
  const Header& mine = header_of(call);
  if (load_relaxed(&mine.broken) != 0) {
    block_gave_up() = 1;
    report_peer(call, phase);
    return true;
  }
  const bool other = seen != tag && seen >> 24 == tag >> 24;
  if (!other && now_ns() - start <= mine.timeout_ns) return false;
  report_failure(call, other ? Fault::kMismatch : Fault::kTimeout, phase, from, seen, tag);
  return true;
}

__device__ __noinline__ inline bool await_longer(const Call& call, uint64_t tag,
                                                 const uint64_t* word, int from, Phase phase) {
  const uint64_t start = now_ns();
  for (;;) {
    uint64_t seen;
    for (int i = 0; i < 32; ++i) {
      seen = load_acquire_sys(word);
      if (seen == tag) {
        note_wait(call, from, start);
        return true;
      }
    }
    if (is_hopeless(call, tag, start, from, phase, seen)) return false;
  }
}

class Op {
 public:
  // By all threads of a block. The first warp reads the header.
  __device__ explicit Op(const Call& call)
      : Op(call, [&] {
          if (threadIdx.x < 32) read_header(call);
          __syncthreads();
        }) {}
  // `read`: brings the header as `read_header` does, for all threads of the block.
  template <typename Read>
  __device__ Op(const Call& call, Read&& read)
      : call(call), me(call.peers.rank), R(call.peers.num_ranks) {
    read();
    const Header& was = as_read();
    epoch_ = was.epoch + 1;
    plans_ = was.plans;
    was_broken_ = was.broken;
    is_busy_ =
        blockIdx.x == 0 && (entry()[kBegan] + 1 != epoch_ || entry()[kSlotLeft] < was.slot_blocks);
    tag = make_tag(was.generation, epoch_, call.signature);
  }

  // By one warp, for its block: the header's first line, by one request, so that not every thread
  // of the GPU asks for it; `ticket`, if there is one; and, by block 0, what tells whether another
  // operation is running.
  __device__ static void read_header(const Call& call, const int32_t* ticket = nullptr) {
    Header& mine = header_of(call);
    const int lane = lane_id();
    const bool is_first = blockIdx.x == 0;
    // All in flight together: each its own register, or one load for all lanes. The atomic is last,
    // as the compiler waits for it.
    const uint64_t* at = reinterpret_cast<const uint64_t*>(&mine) + lane;
    if (lane == kSlotLeft) at = &mine.slot_left;
    uint64_t word = 0;
    int given = 0;
    unsigned long long count = 0;
    if (lane < kHeaderLine || (lane == kSlotLeft && is_first)) word = load_relaxed(at);
    if (lane == kTicket && ticket != nullptr) given = *ticket;
    if (call.stats != nullptr && lane == kBeganAtWord && is_first) word = now_ns();
    if (lane == kBegan && is_first) count = atomicAdd(&mine.began, 1ull);
    if (lane == kTicket) word = given;
    if (lane == kBegan) word = count;
    entry()[lane] = word;
  }
  // The header as it was then, but for what is behind its first line.
  __device__ static const Header& as_read() { return *reinterpret_cast<const Header*>(entry()); }
  __device__ static int ticket_read() { return static_cast<int>(entry()[kTicket]); }

  __device__ Block block(int rank) const { return Block(call.peers, rank); }

  // The ranks whose memory this rank addresses, itself among them: those of its node.
  __device__ int node_first() const { return call.peers.node_first; }
  __device__ int node_last() const { return call.peers.node_first + call.peers.node_ranks; }
  __device__ bool reaches(int rank) const {
    return static_cast<unsigned>(rank - call.peers.node_first) <
           static_cast<unsigned>(call.peers.node_ranks);
  }

  __device__ Header& header() const { return block(me).header(); }

  __device__ uint64_t epoch() const { return epoch_; }

  // Plans that were complete, and whether some rank had failed, when this operation began.
  __device__ uint64_t plans() const { return plans_; }
  __device__ bool was_broken() const { return was_broken_ != 0; }
  // With one answer for all threads of a block: what follows has block barriers. Block 0 learns
  // whether another operation is running before it lends anything.
  __device__ bool began_broken() const {
    if (is_busy_ && threadIdx.x == 0) fail(Fault::kBusy, Phase::kEntry, me, 0, tag);
    return is_busy_ || was_broken_ != 0;
  }

  // Whether some rank has failed; then every wait gives up and results are poison.
  __device__ bool broken() const { return load_relaxed(&header().broken) != 0; }

  // The same, to be looked at later: issue the load early, and its latency is hidden.
  __device__ uint64_t broken_word() const { return load_relaxed(&header().broken); }

  // Wait until `*word`, which rank `from` releases, is this operation's tag. False: give up.
  __device__ __forceinline__ bool await(const uint64_t* word, int from, Phase phase) const {
    return await(word, tag, from, phase);
  }
  // The same for another value, made as tags are.
  __device__ __forceinline__ bool await(const uint64_t* word, uint64_t wanted, int from,
                                        Phase phase) const {
    return load_acquire_sys(word) == wanted || await_longer(call, wanted, word, from, phase);
  }

  // Whether a wait for rank `from` that began at `start` is to be given up; `seen` is a word where
  // that rank puts its tag.
  __device__ bool hopeless(uint64_t start, int from, Phase phase, uint64_t seen) const {
    return is_hopeless(call, tag, start, from, phase, seen);
  }

  // Record the first failure of this rank and tell all peers that the group is broken.
  __device__ __forceinline__ void fail(Fault fault, Phase phase, int awaited, uint64_t seen,
                                       uint64_t wanted) const {
    report_failure(call, fault, phase, awaited, seen, wanted);
  }

  // All blocks of this rank's launch meet, once a launch. `done`: this thread has done its part.
  // False: give up, as someone has not, or does not come. Who waits for a peer meanwhile gives up
  // first, and names it.
  __device__ bool meet(bool done) const {
    constexpr uint32_t kGaveUp = 1 << 16;  // far above the number of arrivals
    __shared__ bool met;
    done = __syncthreads_and(done);
    if (threadIdx.x == 0) {
      uint32_t* arrivals = &header().barrier;
      const uint32_t all = gridDim.x, one = done ? 1 : 1 + kGaveUp;
      uint32_t seen = add_acq_rel_gpu(arrivals, one) + one;  // publishes this block's writes
      uint64_t start = 0;
      for (int polls = 0; seen < all; ++polls) {
        if (polls == 0) start = now_ns();
        seen = load_acquire_gpu(arrivals);  // sees every block's writes
        if (polls % 32 != 31) continue;
        if (broken()) break;  // a block that began broken does not come
        if (now_ns() - start > header().timeout_ns / 4 * 5) {
          fail(Fault::kTimeout, Phase::kGrid, me, seen, all);
          break;
        }
      }
      met = seen >= all && seen < kGaveUp;
    }
    __syncthreads();
    return met;
  }

  // Wait until `there` is true of a word that other blocks of this rank write. False: give up. Who
  // waits for a peer meanwhile gives up first, and names it.
  template <typename There>
  __device__ bool await_block(There&& there) const {
    const uint64_t start = now_ns(), bound = header().timeout_ns / 4 * 5;
    while (!there()) {
      if (broken()) return false;
      if (now_ns() - start > bound) {
        fail(Fault::kTimeout, Phase::kGrid, me, 0, 0);
        return false;
      }
    }
    return true;
  }

  // Every thread of every block calls this last; the last block runs `poison` if the group is
  // broken, and completes the epoch; its first thread runs `complete`. The next kernel on the
  // stream sees it.
  template <typename Poison>
  __device__ void leave(Poison&& poison) const {
    leave(static_cast<Poison&&>(poison), [] {});
  }
  template <typename Poison, typename Complete>
  __device__ void leave(Poison&& poison, Complete&& complete) const {
    __shared__ bool last, failed;  // decided once: what follows has block barriers
    __syncthreads();
    if (threadIdx.x == 0) {
      if (blockIdx.x == 0) stamp_begin(call);
      last = add_acq_rel_gpu(&header().left, 1) + 1 == gridDim.x;
      failed = last && broken();
    }
    __syncthreads();
    if (!last) return;
    if (failed) {
      if (threadIdx.x == 0) report_peer(call, Phase::kEntry);  // nobody may have waited
      revoke_leases();
      poison();
    }
    if (threadIdx.x == 0) {
      stamp(call, Stamp::kEnd);
      Header& mine = header();
      mine.left = 0;
      mine.barrier = 0;
      mine.wire_ticket = 0;
      mine.local_ticket = 0;
      mine.epoch = epoch_;
      if (call.operation == Operation::kPlan) mine.plans = plans_ + 1;
      complete();
    }
  }

 private:
  // Words of `entry`.
  enum Word { kHeaderLine = 16, kTicket = 29, kSlotLeft = 30, kBegan = 31 };
  static_assert(offsetof(Header, left) == kHeaderLine * sizeof(uint64_t));

  __device__ static uint64_t* entry() { return header_words(); }

  // Nobody writes into my outputs after this: what is open is revoked, and who has taken a lease is
  // awaited until it has left the operation (or is long dead). By the last block of a broken
  // launch.
  __device__ void revoke_leases() const {
    for (int p = node_first() + threadIdx.x; p < node_last(); p += blockDim.x) {
      if (p == me) continue;
      store_release_sys(block(p).left(me), tag);  // my pushes to p have all been issued
      const bool lends =
          call.operation == Operation::kDispatch || call.operation == Operation::kCombine;
      if (!lends) continue;
      const uint64_t was = cas_acq_rel_sys(block(me).lease(p), tag, tag | kRevoked);
      const uint64_t start = now_ns(), bound = header().timeout_ns / 2;
      while (was == (tag | kTaken) && load_acquire_sys(block(me).left(p)) >> 24 < tag >> 24 &&
             now_ns() - start < bound) {
      }
    }
    __syncthreads();
  }

 public:
  const Call& call;
  const int me;
  const int R;
  uint64_t tag;  // of this operation, on all ranks

 private:
  uint64_t epoch_;
  uint64_t plans_;
  uint64_t was_broken_;
  bool is_busy_;
};

// Items of work, taken by whichever warp is free: neither SMs nor links are equally fast. The next
// one is on its way while one is done. The first `warps` items are given to the warps that have
// nothing else to do first.
class Tickets {
 public:
  // `warp` below `warps`: the warp's first item; otherwise it draws its first one too.
  __device__ Tickets(uint32_t* counter, int warp, int warps)
      : counter_(counter), given_(warps), drawn_(warp) {
    if (warp >= warps) draw();
  }
  // The next item of this warp below `end`, or -1.
  __device__ int take(int end) {
    const int item = __shfl_sync(kAllLanes, drawn_, 0);
    if (item >= end) return -1;
    draw();
    return item;
  }

 private:
  __device__ void draw() {
    if (lane_id() == 0) drawn_ = given_ + static_cast<int>(add_relaxed_gpu(counter_, 1));
  }
  uint32_t* counter_;
  int given_;
  int drawn_;
};

// Set `bytes` (a multiple of 4) at `p` to ones, by one block: NaN in every float type, -1 in
// integers.
__device__ inline void poison_bytes(void* p, size_t bytes, uint32_t word = ~0u) {
  auto* words = static_cast<uint32_t*>(p);
  if (words == nullptr) return;
  for (size_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) words[i] = word;
}

}  // namespace jax_ep
