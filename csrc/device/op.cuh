// SPDX-License-Identifier: Apache-2.0
// One operation of one rank while its kernel runs: the words of the peers' control blocks, bounded
// waits, the first failure, grid barriers, and leaving.
#pragma once
#include "../kernels/launch.h"
#include "ptx.cuh"
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

class Op {
 public:
  __device__ explicit Op(const Call& call)
      : call(call), me(call.peers.rank), R(call.peers.num_ranks) {
    const Header& mine = header();  // one line of memory: the four loads are in flight together
    epoch_ = load_relaxed(&mine.epoch) + 1;
    plans_ = load_relaxed(&mine.plans);
    was_broken_ = load_relaxed(&mine.broken);
    tag = make_tag(load_relaxed(&mine.generation), epoch_, call.signature);
  }

  __device__ Block block(int rank) const { return Block(call.peers, rank); }
  __device__ Header& header() const { return block(me).header(); }

  // Plans that were complete, and whether some rank had failed, when this operation began.
  __device__ uint64_t plans() const { return plans_; }
  __device__ bool was_broken() const { return was_broken_ != 0; }
  // By all threads of a block, with one answer for all: what follows has block barriers.
  __device__ bool began_broken() const {
    if (blockIdx.x == 0 && threadIdx.x == 0 && atomicExch(&header().busy, 1u) != 0) {
      fail(Fault::kBusy, Phase::kEntry, me, 0, tag);
    }
    return __syncthreads_or(was_broken_ != 0);
  }

  // Whether some rank has failed; then every wait gives up and results are poison.
  __device__ bool broken() const { return load_relaxed(&header().broken) != 0; }

  // The same, to be looked at later: issue the load early, and its latency is hidden.
  __device__ uint64_t broken_word() const { return load_relaxed(&header().broken); }

  // Wait until `*word`, which rank `from` releases, is this operation's tag. False: give up.
  __device__ bool await(const uint64_t* word, int from, Phase phase) const {
    uint64_t seen = load_acquire_sys(word);
    if (seen == tag) return true;
    const uint64_t start = now_ns();
    for (;;) {
      for (int i = 0; i < 32; ++i) {
        seen = load_acquire_sys(word);
        if (seen == tag) return true;
      }
      if (hopeless(start, from, phase, seen)) return false;
    }
  }

  // Whether a wait for rank `from` that began at `start` is to be given up; `seen` is a word where
  // that rank puts its tag.
  __device__ bool hopeless(uint64_t start, int from, Phase phase, uint64_t seen) const {
    if (broken()) {
      note_peer(phase);
      return true;
    }
    if (seen != tag && seen >> 24 == tag >> 24) {
      fail(Fault::kMismatch, phase, from, seen, tag);
      return true;
    }
    if (now_ns() - start <= header().timeout_ns) return false;
    fail(Fault::kTimeout, phase, from, seen, tag);
    return true;
  }

  // Record the first failure of this rank and tell all peers that the group is broken.
  __device__ void fail(Fault fault, Phase phase, int awaited, uint64_t seen,
                       uint64_t wanted) const {
    Header& mine = header();
    if (cas_acq_rel_sys(&mine.broken, 0, 1 + me) != 0) {
      note_peer(phase);
      return;
    }
    record(fault, phase, awaited, seen, wanted);
    for (int p = 0; p < R; ++p) {
      if (p != me) cas_acq_rel_sys(&block(p).header().broken, 0, 1 + me);
    }
  }

  // All blocks of this rank's launch meet; the n-th meeting, counted from 1. `done`: this thread
  // has done its part. False: give up, as someone has not, or does not come. Who waits for a peer
  // meanwhile gives up first, and names it.
  __device__ bool meet(int n, bool done) const {
    constexpr uint32_t kGaveUp = 1 << 16;  // far above the number of arrivals
    __shared__ bool met;
    done = __syncthreads_and(done);
    if (threadIdx.x == 0) {
      uint32_t* arrivals = &header().barrier;
      const uint32_t all = n * gridDim.x, one = done ? 1 : 1 + kGaveUp;
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

  // Every thread of every block calls this last; the last block runs `poison` if the group is
  // broken and completes the epoch. The next kernel on the stream sees it.
  template <typename Poison>
  __device__ void leave(Poison&& poison) const {
    __shared__ bool last, failed;  // decided once: what follows has block barriers
    __syncthreads();
    if (threadIdx.x == 0) {
      last = add_acq_rel_gpu(&header().left, 1) + 1 == gridDim.x;
      failed = last && broken();
    }
    __syncthreads();
    if (!last) return;
    if (failed) {
      if (threadIdx.x == 0) note_peer(Phase::kEntry);  // nobody may have waited
      revoke_leases();
      poison();
    }
    if (threadIdx.x == 0) {
      Header& mine = header();
      mine.left = 0;
      mine.barrier = 0;
      mine.ticket = 0;
      mine.busy = 0;
      mine.epoch = epoch_;
      if (call.operation == Operation::kPlan) mine.plans = plans_ + 1;
    }
  }

 private:
  __device__ void record(Fault fault, Phase phase, int awaited, uint64_t seen,
                         uint64_t wanted) const {
    FaultRecord& r = *header().record;
    r.operation = static_cast<uint32_t>(call.operation);
    r.phase = static_cast<uint32_t>(phase);
    r.rank = me;
    r.awaited = awaited;
    r.seen = seen;
    r.wanted = wanted;
    __threadfence_system();  // the host reads `fault` first
    *reinterpret_cast<volatile uint32_t*>(&r.fault) = static_cast<uint32_t>(fault);
  }

  // Nobody writes into my outputs after this: what is open is revoked, and who has taken a lease is
  // awaited until it has left the operation (or is long dead). By the last block of a broken
  // launch.
  __device__ void revoke_leases() const {
    for (int p = threadIdx.x; p < R; p += blockDim.x) {
      if (p == me) continue;
      store_release_sys(block(p).left(me), tag);  // my pushes to p have all been issued
      if (call.operation == Operation::kPlan) continue;
      const uint64_t was = cas_acq_rel_sys(block(me).lease(p), tag, tag | kRevoked);
      const uint64_t start = now_ns(), bound = header().timeout_ns / 2;
      while (was == (tag | kTaken) && load_acquire_sys(block(me).left(p)) >> 24 < tag >> 24 &&
             now_ns() - start < bound) {
      }
    }
    __syncthreads();
  }

  // A peer failed first: say so once, for this rank's `check`.
  __device__ void note_peer(Phase phase) const {
    FaultRecord& r = *header().record;
    const int who = static_cast<int>(load_relaxed(&header().broken)) - 1;
    if (who == me || *reinterpret_cast<volatile uint32_t*>(&r.fault) != 0) return;
    record(Fault::kPeer, phase, who, 0, 0);
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
};

// Items of local work, taken by whichever warp is free; the next one is on its way while one is
// done. The first `warps` items are given to the warps that have nothing else to do first.
class Tickets {
 public:
  // `warp` below `warps`: the warp's first item; otherwise it draws its first one too.
  __device__ Tickets(const Op& op, int warp, int warps)
      : counter_(&op.header().ticket), given_(warps), drawn_(warp) {
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
    if (lane_id() == 0) drawn_ = given_ + static_cast<int>(atomicAdd(counter_, 1u));
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
