// SPDX-License-Identifier: Apache-2.0
// Small batches travel through slots (layout/slots.h): a sender pushes a row into the receiver's
// inbox and publishes it by the token's flag. No lease, as the memory is the library's own.
//
//   start n   hello, words, slots and flags -> every peer's inbox of n's parity
//   done n    awaits every peer's hello, and the words and flags that it needs
//
// Who may overwrite a slot when: a sender that starts n + 2 has done n + 1, for which it awaited
// every peer's hello of n + 1; the peer sent that after its own done n, the last to read the slots
// of n, as starts and dones of one kind take turns on a rank's stream. A start that finds another
// in flight is an error and pushes nothing.
#pragma once
#include "op.cuh"
#include "warp.cuh"

namespace jax_ep {

// Warps of a block: the last one, the post warp, publishes what the data warps have pushed.
constexpr int kSlotThreads = 1024;
constexpr int kDataWarps = kSlotThreads / 32 - 1;
constexpr int kDataThreads = 32 * kDataWarps;

__device__ __forceinline__ bool is_post_warp() { return threadIdx.x >= kDataThreads; }

// Barriers of a block besides __syncthreads.
enum Barrier { kPushed = 1, kData = 2, kPlanned = 3, kPosted = 4 };

// By the data warps.
__device__ __forceinline__ void data_sync() {
  __syncwarp();  // a warp comes to a barrier as one
  bar_sync(kData, kDataThreads);
}

// Whether all threads of the data warps say so.
__device__ __forceinline__ bool data_and(bool mine) {
  __syncwarp();
  return bar_and(kData, kDataThreads, mine);
}

// By the data warps, when they have pushed a group of rows, and by the post warp before their
// flags. The data warps wait for it too, but for the last group.
__device__ __forceinline__ void rows_pushed(bool last) {
  __syncwarp();
  if (is_post_warp()) {
    bar_sync(kPushed, kSlotThreads);
    if (!last) bar_arrive(kPosted, kSlotThreads);
  } else {
    bar_arrive(kPushed, kSlotThreads);
    if (!last) bar_sync(kPosted, kSlotThreads);
  }
}

// A set of ranks.
struct RankSet {
  unsigned low = 0, high = 0;

  // By one warp: of the ranks that the lanes name, -1 for none.
  __device__ static RankSet of_lanes(int rank) {
    RankSet s;
    s.low = __reduce_or_sync(kAllLanes, rank >= 0 && rank < 32 ? 1u << rank : 0u);
    s.high = __reduce_or_sync(kAllLanes, rank >= 32 ? 1u << (rank - 32) : 0u);
    return s;
  }
  __device__ bool has(int rank) const { return (rank < 32 ? low : high) >> (rank % 32) & 1; }
};

// What one rank has sent to another.
class Inbox {
 public:
  __device__ Inbox(const SlotLayout& at, char* base) : at_(at), base_(base) {}
  __device__ uint64_t* hello() const { return reinterpret_cast<uint64_t*>(base_); }
  __device__ uint64_t* flag(int token) const {
    return reinterpret_cast<uint64_t*>(base_ + at_.flags) + token;
  }
  __device__ uint64_t* words(int token) const {
    return reinterpret_cast<uint64_t*>(base_ + at_.words) + token * kSlotWords;
  }
  __device__ char* slot(int token) const {
    return base_ + (at_.rows + static_cast<uint32_t>(token) * at_.stride);
  }

 private:
  const SlotLayout& at_;
  char* base_;
};

// How a row lies in its slot.
struct SlotRow {
  int bytes;  // of the values
  int scales;
  __device__ float* scales_of(char* slot) const { return reinterpret_cast<float*>(slot + bytes); }
  __device__ float* scalars_of(char* slot) const { return scales_of(slot) + scales; }
  __device__ const float* scales_of(const char* slot) const {
    return reinterpret_cast<const float*>(slot + bytes);
  }
  __device__ const float* scalars_of(const char* slot) const { return scales_of(slot) + scales; }
};

// An operation on slots, or one half of it.
class SlotOp {
 public:
  // By all threads of a block, at least 64 of them.
  __device__ SlotOp(const Call& call, SlotKind kind, Half half, const int32_t* ticket)
      : op(call, [&] { read_turn(call, kind, half, ticket); }), kind_(kind), half_(half) {
    started_ = turn().started + (half == Half::kDone ? 0 : 1);
    tag = make_tag(turn().generation, started_, call.signature);
    const Peers& peers = call.peers;
    first_ = peers.at.total + (static_cast<int>(kind) * 2 + static_cast<int>(started_ & 1)) * op.R *
                                  peers.slots.total;
  }

  __device__ bool pushes() const { return half_ != Half::kDone; }
  __device__ bool receives() const { return half_ != Half::kStart; }
  __device__ int ticket() const { return static_cast<int>(started_ & 0x7fffffff); }

  // With one answer for all threads of a block. True: nothing is pushed or awaited.
  __device__ bool began_broken() const {
    if (op.began_broken()) return true;
    if (turn().is_mine) return false;
    if (threadIdx.x == 0) {
      op.fail(Fault::kInFlight, Phase::kEntry, op.me, turn().started, turn().ticket);
    }
    return true;
  }

  // What this rank has sent to `rank`, and what `source` has sent here.
  __device__ Inbox outbox(int rank) const {
    const Peers& peers = op.call.peers;
    return Inbox(peers.slots, peers.control[rank] + first_ + op.me * peers.slots.total);
  }
  __device__ Inbox inbox(int source) const {
    const Peers& peers = op.call.peers;
    return Inbox(peers.slots, peers.control[op.me] + first_ + source * peers.slots.total);
  }

  // By one warp: greet all peers, and await their greetings (false: give up). A greeting says
  // which operation the peer runs, and that it has done with the slots of the last but one.
  __device__ void greet() const {
#pragma unroll 1
    for (int r = lane_id(); r < op.R; r += 32) {
      if (r != op.me) store_relaxed(outbox(r).hello(), tag);
    }
  }
  __device__ bool await_hellos() const {
    bool same = true;
#pragma unroll 1
    for (int r = lane_id(); r < op.R; r += 32) {
      if (r != op.me) same &= await(inbox(r).hello(), r, Phase::kReady);
    }
    return same;
  }

  // Wait until `*word`, which rank `from` releases, is this operation's tag. False: give up.
  __device__ bool await(const uint64_t* word, int from, Phase phase) const {
    return load_acquire_sys(word) == tag || await_longer(op.call, tag, word, from, phase);
  }

  // Every thread of every block calls this last.
  template <typename Poison>
  __device__ void leave(int32_t* ticket, Poison&& poison) const {
    op.leave(poison, [&](Header& mine) {
      if (ticket != nullptr) *ticket = this->ticket();
      mine.started[index()] = started_;
      mine.in_flight[index()] = half_ == Half::kStart;
    });
  }

 private:
  struct Turn {
    uint64_t started, in_flight, generation;
    int ticket;  // of `done`; 0: this is a start
    bool is_mine;
  };
  // One of each block; shared memory of a function, so that headers may hold it.
  static __device__ Turn& turn() {
    __shared__ Turn t;
    return t;
  }
  // By another warp than the one that reads the rest of the header, at the same time.
  static __device__ void read_turn(const Call& call, SlotKind kind, Half half,
                                   const int32_t* ticket) {
    if (threadIdx.x != 32) return;
    const Header& mine = header_of(call);
    const int i = static_cast<int>(kind);
    Turn t;
    t.started = load_relaxed(&mine.started[i]);
    t.in_flight = load_relaxed(&mine.in_flight[i]);
    t.generation = load_relaxed(&mine.generation);
    t.ticket = half == Half::kDone ? *ticket : 0;
    t.is_mine = half == Half::kDone ? t.ticket == static_cast<int>(t.started & 0x7fffffff)
                                    : t.in_flight == 0;
    turn() = t;
  }
  __device__ int index() const { return static_cast<int>(kind_); }

 public:
  const Op op;
  uint64_t tag;  // of the whole operation, for both halves, on all ranks

 private:
  SlotKind kind_;
  Half half_;
  uint64_t started_;
  size_t first_;  // of this kind and parity, from the control block on
};

}  // namespace jax_ep
