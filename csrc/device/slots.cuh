// SPDX-License-Identifier: Apache-2.0
// Small batches travel through slots (layout/slots.h): a sender pushes a row into the receiver's
// inbox, and the token's flag after it. No lease, as the memory is the library's own.
//
//   start n   hello, words, slots and flags -> every peer's inbox of n's set; empties the slots
//             that start n - 1 filled here
//   done n    awaits every peer's hello, and the words, flags and rows that it needs
//
// Nothing orders a row before its flag, as a fence waits for a flight there and back: the flag says
// that the row is on its way, and each of its words of 32 bits says for itself that it has come,
// as an empty slot holds ones. A row that has a word of ones is published: the fence, then a flag
// that says kWhole.
//
// Who may overwrite a slot when: a sender that starts n + 3, whose set is n's, has done n + 2, for
// which it awaited every peer's hello of n + 2; the peer sent that after its own start n + 1, which
// emptied the slots of n, and that began after its done n, the last to read them, as starts and
// dones of one kind take turns on a rank's stream. A start that finds another in flight is an error
// and pushes nothing. Who makes the slots empty for a new generation has awaited the kernels of the
// last one on all ranks.
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
enum Barrier { kPushed = 1, kData = 2, kPlanned = 3, kPosted = 4, kArrived = 5, kOpened = 6 };

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

// Whether a row that the block is pushing has a word that looks empty; until the post warp has read
// it.
__device__ inline volatile uint32_t& pushes_empty() {
  __shared__ uint32_t pushes;
  return pushes;
}

// By the data warps, when they have pushed a group of rows, and by the post warp before their
// flags: whether there was a word that looks empty. The data warps wait for it too, but for the
// last group.
__device__ __forceinline__ bool rows_pushed(bool last) {
  __syncwarp();
  if (!is_post_warp()) {
    bar_arrive(kPushed, kSlotThreads);
    if (!last) bar_sync(kPosted, kSlotThreads);
    return false;
  }
  bar_sync(kPushed, kSlotThreads);
  const bool any = pushes_empty() != 0;
  __syncwarp();
  if (lane_id() == 0) pushes_empty() = 0;
  __syncwarp();
  if (!last) bar_arrive(kPosted, kSlotThreads);
  return any;
}

// By all warps: the data warps wait until the post warp says whether what they need from peers is
// there, which is what `mine` is there.
__device__ __forceinline__ bool all_arrived(bool mine) {
  __syncwarp();
  return bar_and(kArrived, kSlotThreads, mine);
}

// A flag whose row has arrived with it.
constexpr uint64_t kWhole = uint64_t{1} << 62;

// Whether a word of 32 bits has not come yet, or looks like it.
__device__ __forceinline__ bool has_empty(uint32_t v) { return v == kEmptyWord; }
__device__ __forceinline__ bool has_empty(const uint2& v) { return max(v.x, v.y) == kEmptyWord; }
__device__ __forceinline__ bool has_empty(const uint4& v) {
  return max(max(v.x, v.y), max(v.z, v.w)) == kEmptyWord;
}

// What a rank knows of the last start of a kind: its set, and what it may have filled of each
// inbox, `tokens` slots and up to `bytes` of each.
struct LastStart {
  int set, tokens, bytes;
  __device__ uint64_t packed() const {
    return uint64_t(set) << 62 | uint64_t(tokens) << 32 | uint32_t(bytes);
  }
  __device__ static LastStart of(uint64_t packed) {
    return {int(packed >> 62), int(packed >> 32) & 0x3fffffff, int(packed)};
  }
  __device__ int next_set() const { return set + 1 < kSlotSets ? set + 1 : 0; }
};

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
  // Of all, `scalars` included.
  __device__ int filled(int scalars) const {
    return bytes + (scales + scalars) * int(sizeof(float));
  }
};

// The rank for whose rows the block has given up, -1 for none.
__device__ inline volatile int& missed_rank() {
  __shared__ int rank;
  return rank;
}

// Wait for a flag that is not there yet. False: give up.
__device__ __noinline__ inline bool await_flag_longer(const Call& call, uint64_t tag,
                                                      const uint64_t* flag, int from,
                                                      uint64_t* seen) {
  const uint64_t start = now_ns();
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      *seen = load_acquire_sys(flag);
      if ((*seen & ~kWhole) == tag) {
        note_wait(call, from, start);
        return true;
      }
    }
    if (is_hopeless(call, tag, start, from, Phase::kRows, *seen & ~kWhole)) return false;
  }
}

// An operation on slots, or one half of it.
//
// Its blocks do not wait for the last one to leave: that of the blocks which was the last to begin
// completes the epoch, as all have then read the header. Who has left is only counted: for the next
// operation, which finds out whether this one is still running (its own blocks may have left by
// then, so there may be more than all of the earlier ones), and for a block that has given up,
// which waits for all others and then poisons the results.
class SlotOp {
 public:
  // By all threads of a block, first of all; a barrier of the data warps.
  __device__ static void open() {
    if (is_counter()) {
      init_barrier(entered(), 1);
      block_gave_up() = 0;
      pushes_empty() = 0;
      missed_rank() = -1;
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
    const LastStart last = LastStart::of(was.last_start[i]);
    set_ = half == Half::kDone ? last.set : last.next_set();
    is_mine_ = half == Half::kDone ? Op::ticket_read() == this->ticket() : was.in_flight[i] == 0;
    tag = make_tag(was.generation, started_, call.signature);
    first_ = first_of(set_);
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

  // What this rank has sent to `rank`, and what `source` has sent here.
  __device__ Inbox outbox(int rank) const {
    const Peers& peers = op.call.peers;
    return Inbox(peers.slots, peers.control[rank] + first_ + op.me * peers.slots.total);
  }
  __device__ Inbox inbox(int source) const { return inbox_at(first_, source); }

  // By the data warps of a start: the slots that the last start of this kind filled here.
  __device__ void empty_last() const {
    const LastStart last = LastStart::of(Op::as_read().last_start[index()]);
    const size_t first = first_of(last.set);
    const int vecs = ceil_div(last.bytes, int(sizeof(Vec)));
#pragma unroll 1
    for (int i = 1; i < op.R; ++i) {
      const Inbox inbox = inbox_at(first, op.me + i < op.R ? op.me + i : op.me + i - op.R);
#pragma unroll 1
      for (int t = blockIdx.x; t < last.tokens; t += gridDim.x) {
        auto* slot = reinterpret_cast<Vec*>(inbox.slot(t));
#pragma unroll 1
        for (int v = threadIdx.x; v < vecs; v += kDataThreads) {
          store_row(slot + v, Vec{kEmptyWord, kEmptyWord, kEmptyWord, kEmptyWord});
        }
      }
    }
  }

  // By the post warp: a token's row has been pushed to `rank`. `is_whole`: it has a word that looks
  // empty.
  __device__ void post_row(int rank, int token, bool is_whole) const {
    uint64_t* flag = outbox(rank).flag(token);
    if (is_whole) {
      store_release_sys(flag, tag | kWhole);  // publishes the row
    } else {
      store_relaxed(flag, tag);
    }
  }
  // By the post warp: wait for the flag of a row. False: give up. What it says of the row is in
  // `is_whole`.
  __device__ bool await_flag(int source, int token, bool* is_whole) const {
    const uint64_t* flag = inbox(source).flag(token);
    uint64_t seen = load_acquire_sys(flag);  // if it says kWhole, acquires the row
    const bool there =
        (seen & ~kWhole) == tag || await_flag_longer(op.call, tag, flag, source, &seen);
    *is_whole = there && seen != tag;
    return there;
  }
  // By a data warp: a part of a row whose flag has been awaited: Vec, uint2 or uint32_t. Anything
  // if the block gives up; `leave` says so, as a call here would cost registers.
  template <typename V>
  __device__ __forceinline__ V take(const V* at, int source, bool is_whole) const {
    V v = load_relaxed(at);
    if (is_whole) return v;
    for (uint64_t start = 0; has_empty(v) && block_gave_up() == 0; v = load_relaxed(at)) {
      const uint64_t now = now_ns();
      if (start == 0) start = now;
      if (now - start <= Op::as_read().timeout_ns && !op.broken()) continue;
      missed_rank() = source;
      block_gave_up() = 1;
    }
    return v;
  }

  // By one warp: greet all peers, and await their greetings (false: give up). A greeting says
  // which operation the peer runs, and that the slots of the last but one start are empty.
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

  // Every thread of every block calls this last. A start may have filled `row_bytes` of the slots
  // of `tokens` tokens. If some have given up, one block poisons the results.
  template <typename Poison>
  __device__ void leave(int32_t* ticket, int tokens, int row_bytes, Poison&& poison) const {
    __shared__ bool poisons;
    __syncthreads();
    const bool gave_up = block_gave_up();
    if (is_counter()) {
      Header& mine = op.header();
      if (begun_ + 1 == gridDim.x) complete(mine, ticket, {set_, tokens, row_bytes});
      if (gave_up && missed_rank() >= 0) {
        is_hopeless(op.call, tag, 0, missed_rank(), Phase::kRows, 0);  // reports it
      }
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
  __device__ void complete(Header& mine, int32_t* ticket, const LastStart& start) const {
    if (ticket != nullptr) *ticket = this->ticket();
    mine.started[index()] = started_;
    mine.in_flight[index()] = half_ == Half::kStart;
    if (pushes()) mine.last_start[index()] = start.packed();
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
  // A set's slots, from the control block on.
  __device__ size_t first_of(int set) const {
    const Peers& peers = op.call.peers;
    return peers.at.total + (index() * kSlotSets + set) * op.R * peers.slots.total;
  }
  __device__ Inbox inbox_at(size_t first, int source) const {
    const Peers& peers = op.call.peers;
    return Inbox(peers.slots, peers.control[op.me] + first + source * peers.slots.total);
  }

 public:
  const Op op;
  uint64_t tag;  // of the whole operation, for both halves, on all ranks

 private:
  SlotKind kind_;
  Half half_;
  uint64_t started_;
  int set_;
  bool is_mine_;
  uint32_t begun_ = ~0u - 1;  // blocks that began before this one, of the thread that counts
  size_t first_;              // this start's slots, from the control block on
};

}  // namespace jax_ep
