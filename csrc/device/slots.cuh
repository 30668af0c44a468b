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
#include "../plan/tiling.h"
#include "op.cuh"
#include "warp.cuh"

namespace jax_ep {

// Warps of a block: the last one, the post warp, publishes what the data warps have pushed.
constexpr int kSlotThreads = kFullBlock;
constexpr int kDataWarps = kSlotThreads / 32 - 1;
constexpr int kDataThreads = 32 * kDataWarps;

__device__ __forceinline__ bool is_post_warp() { return threadIdx.x >= kDataThreads; }

// Barriers of a block besides __syncthreads.
enum Barrier {
  kPushed = 1,
  kData = 2,
  kPlanned = 3,
  kPosted = 4,
  kArrived = 5,
  kOpened = 6,
  kRouted = 7,
};

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

// By all warps: the data warps wait until the post warp says whether what they need from peers is
// there, which is what `mine` is there.
__device__ __forceinline__ bool all_arrived(bool mine) {
  __syncwarp();
  return bar_and(kArrived, kSlotThreads, mine);
}

// The same of the routing of other nodes, which comes first.
__device__ __forceinline__ bool all_routed(bool mine) {
  __syncwarp();
  return bar_and(kRouted, kSlotThreads, mine);
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

// A token of the group: number t of rank `source`.
struct Token {
  int source, t;
  __device__ int of_group(int T) const { return source * T + t; }
};

// The tokens that a block works on: some of its own rank's, and some of the peers'.
struct Share {
  int own, peers;  // how many
  int me, R, T;

  __device__ Share(const Divider& by_blocks, int me, int R, int T) : me(me), R(R), T(T) {
    auto count = [&](int first, int n) {
      return first < n ? by_blocks(n - first + gridDim.x - 1) : 0;
    };
    own = count(blockIdx.x, T);
    peers = count(last(), (R - 1) * T);
  }
  __device__ int all() const { return own + peers; }
  // The i-th of each kind; of all, own ones first.
  __device__ int own_token(int i) const { return blockIdx.x + i * gridDim.x; }
  __device__ Token peer(const Divider& by_tokens, int i) const {
    const int n = last() + i * gridDim.x, peer = by_tokens(n);
    const int source = me + 1 + peer;
    return {source < R ? source : source - R, n - peer * T};
  }
  __device__ Token any(const Divider& by_tokens, int i) const {
    return i < own ? Token{me, own_token(i)} : peer(by_tokens, i - own);
  }

 private:
  // Peers' tokens are dealt out from the last block on, which has fewer own ones.
  __device__ static int last() { return gridDim.x - 1 - blockIdx.x; }
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
//
// Its blocks do not wait for the last one to leave: that of the blocks which was the last to begin
// completes the epoch, as all have then read the header. Who has left is only counted: for the next
// operation, which finds out whether this one is still running (its own blocks may have left by
// then, so there may be more than all of the earlier ones), and for a block that has given up,
// which waits for all others and then poisons the results.
class SlotOp {
 public:
  // What extends it (rdma/slot_op_nodes.cuh) says true, and hides what is another way there.
  static constexpr bool kSpansNodes = false;

  // By all threads of a block, first of all; a barrier of the data warps.
  __device__ static void open() {
    if (is_counter()) {
      init_barrier(entered(), 1);
      block_gave_up() = 0;
    }
    __syncwarp();
    if (is_post_warp()) {
      bar_arrive(kOpened, kSlotThreads);
    } else {
      bar_sync(kOpened, kSlotThreads);
    }
  }
  // By all threads of a block. The post warp reads the header; a data warp comes when it likes, and
  // does not wait for the others.
  __device__ SlotOp(const Call& call, SlotKind kind, Half half, const int32_t* ticket)
      : op(call, [&] { enter(call, half == Half::kDone ? ticket : nullptr); }),
        kind_(kind),
        half_(half) {
    const Header& was = Op::as_read();
    const int i = index();
    started_ = was.started[i] + (half == Half::kDone ? 0 : 1);
    is_mine_ = half == Half::kDone ? Op::ticket_read() == this->ticket() : was.in_flight[i] == 0;
    tag = make_tag(was.generation, started_, call.signature);
    const Peers& peers = call.peers;
    first_ = peers.at.total + (i * 2 + parity()) * op.R * peers.slots.total;
  }

  // By the post warp, once: this block has begun, and has read the header. Where waiting for the
  // answer holds nobody up.
  __device__ void count() {
    if (is_counter()) begun_ = atomicAdd(&op.header().slot_begun, 1u);
  }

  __device__ bool pushes() const { return half_ != Half::kDone; }
  __device__ bool receives() const { return half_ != Half::kStart; }
  __device__ int ticket() const { return static_cast<int>(started_ & 0x7fffffff); }

  // With one answer for all threads of a block. True: nothing is pushed or awaited.
  __device__ bool began_broken() const {
    const bool broken = op.began_broken();
    if (!broken && is_mine_) return false;
    if (is_counter()) {
      block_gave_up() = 1;
      if (!broken) op.fail(Fault::kInFlight, Phase::kEntry, op.me, started_, Op::ticket_read());
    }
    return true;
  }

  // Whether what this rank has for `rank` goes there by stores.
  __device__ bool stores_to(int rank) const { return rank != op.me; }
  // In which outboxes a row for the ranks `named` is stored; whether that of `rank` holds rows.
  __device__ RankSet outboxes_of(const RankSet& named) const { return named; }
  __device__ bool fills(int rank) const { return rank != op.me; }

  // What this rank has sent to `rank`, and what `source` has sent here.
  __device__ Inbox outbox(int rank) const {
    const Peers& peers = op.call.peers;
    return Inbox(peers.slots, peers.control[rank] + first_ + op.me * peers.slots.total);
  }
  __device__ Inbox inbox(int source) const {
    const Peers& peers = op.call.peers;
    return Inbox(peers.slots, peers.control[op.me] + first_ + source * peers.slots.total);
  }

  // Where the words of routing lie that hold part `h` of the choices of token `t` of `source`.
  __device__ const uint64_t* arrived_words(int source, int t, int h) const {
    return inbox(source).words(t) + 2 * h;
  }

  // Where what this rank sends lies on a peer, from its control block on.
  __device__ uint64_t sent_at() const { return first_ + op.me * op.call.peers.slots.total; }
  // What is in use of two copies.
  __device__ int parity() const { return static_cast<int>(started_ & 1); }

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

  // By the post warp.
  __device__ void stamp_once(Stamp what) const {
    if (is_counter()) stamp(op.call, what);
  }

  // Every thread of every block calls this last. If some have given up, one block poisons the
  // results.
  template <typename Poison>
  __device__ void leave(int32_t* ticket, Poison&& poison) const {
    __shared__ bool poisons;
    __syncthreads();
    const bool gave_up = block_gave_up();
    if (is_counter()) {
      Header& mine = op.header();
      if (begun_ + 1 == gridDim.x) complete(mine, ticket);
      poisons = gave_up && atomicExch(&mine.slot_poisoned, op.epoch()) != op.epoch();
      add_release_gpu(&mine.slot_left, 1);  // publishes the block's results to who poisons them
      if (blockIdx.x == 0) stamp_begin(op.call);
      stamp(op.call, Stamp::kEnd);
    }
    if (!gave_up) return;
    __syncthreads();
    if (!poisons) return;
    if (is_counter()) {
      await_leaving();
      report_peer(op.call, Phase::kEntry);  // nobody may have waited
    }
    __syncthreads();
    poison();
  }

 private:
  // The thread that counts its block.
  __device__ static bool is_counter() { return threadIdx.x == kDataThreads; }

  __device__ static void enter(const Call& call, const int32_t* ticket) {
    if (is_post_warp()) {
      Op::read_header(call, ticket);
      __syncwarp();
      if (is_counter()) arrive(entered());  // publishes it to the data warps
      return;
    }
    while (!is_complete_soon(entered(), 0)) {
    }
  }
  // Complete when the block's header has been read.
  __device__ static uint32_t entered() {
    __shared__ uint64_t barrier;
    return shared_address(&barrier);
  }

  // The next kernel on the stream sees it.
  __device__ void complete(Header& mine, int32_t* ticket) const {
    if (ticket != nullptr) *ticket = this->ticket();
    mine.started[index()] = started_;
    mine.in_flight[index()] = half_ == Half::kStart;
    mine.slot_blocks = all_left();
    mine.slot_begun = 0;
    __threadfence();  // another operation that finds the new epoch finds the rest
    mine.epoch = op.epoch();
  }
  // `slot_left` when all blocks of this operation have left.
  __device__ uint64_t all_left() const { return Op::as_read().slot_blocks + gridDim.x; }
  // They do in bounded time, as the group is broken.
  __device__ void await_leaving() const {
    const uint64_t start = now_ns(), bound = op.header().timeout_ns / 4 * 5;
    while (load_acquire_gpu(&op.header().slot_left) < all_left() && now_ns() - start < bound) {
    }
  }
  __device__ int index() const { return static_cast<int>(kind_); }

 public:
  const Op op;
  uint64_t tag;  // of the whole operation, for both halves, on all ranks

 private:
  SlotKind kind_;
  Half half_;
  uint64_t started_;
  bool is_mine_;
  uint32_t begun_ = ~0u - 1;  // blocks that began before this one, of the thread that counts
  size_t first_;              // of this kind and parity, from the control block on
};

}  // namespace jax_ep
