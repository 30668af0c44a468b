// SPDX-License-Identifier: Apache-2.0
// The rings of one rank while an operation runs: where a message goes, and the waits for messages
// and for room. Numbers of messages go on over operations: the counters say where this one begins.
#pragma once
#include "transport.cuh"

namespace jax_ep {

// A place in a ring: of which node or rank, which message, in which of how many slots.
struct Turn {
  int ring;
  uint64_t number;
  uint32_t slot, slots;
  // That of the same message as the other side has it, in the ring of node or rank `ring`.
  __device__ Turn of(int ring) const { return {ring, number, slot, slots}; }
};

class Rings {
 public:
  __device__ Rings(const Op& op, const RingLayout& at)
      : op_(op),
        at_(at),
        base_(op.call.peers.control[op.me]),
        L(op.call.peers.node_ranks),
        N(op.R / L),
        node(op.me / L),
        index(op.me % L) {
    const auto* counters = reinterpret_cast<const uint64_t*>(base_ + at.counters);
    remote_ = load_relaxed(counters);
    own_ = load_relaxed(counters + 1);
    remote_slot_ = remote_ % at_.slots;
    own_slot_ = own_ * N % at_.own_slots;
  }

  // Message `chunk` of this operation from or to another node n, between ranks with my index.
  __device__ Turn message(int n, int chunk) const {
    return {n, remote_ + chunk, (remote_slot_ + chunk) % at_.slots, at_.slots};
  }
  // The `item`-th message of partials from or to another rank j of this node.
  __device__ Turn partial(int j, int item) const {
    return {j, own_ * N + item, (own_slot_ + item) % at_.own_slots, at_.own_slots};
  }

  // By the last thread of the operation: so many messages have gone through each ring.
  __device__ void advance(int remote, int own) const {
    auto* counters = reinterpret_cast<uint64_t*>(base_ + at_.counters);
    counters[0] = remote_ + remote;
    counters[1] = own_ + own;
  }

  __device__ int rank_of(int n) const { return n * L + index; }
  __device__ int other(int i) const { return i < node ? i : i + 1; }  // the i-th other node
  __device__ uint64_t stamp(const Turn& t) const { return make_stamp(op_.tag, t.number); }
  __device__ uint64_t credit(const Turn& t) const { return make_credit(op_.tag, t.number); }

  // Offsets, on every rank. Slots that node or rank `owner` receives into, of others.
  __device__ uint64_t packed(const Turn& t) const { return at_.packed + flag(t); }
  __device__ uint64_t arrived(const Turn& t) const { return at_.arrived + flag(t); }
  __device__ uint64_t credited(const Turn& t) const { return at_.credit + flag(t); }
  __device__ uint64_t filled(const Turn& t) const { return at_.filled + flag(t); }
  __device__ uint64_t emptied(const Turn& t) const { return at_.emptied + flag(t); }
  __device__ uint64_t received(const Turn& t, int owner) const {
    return at_.receive + slot(t, owner);
  }
  __device__ uint64_t partials(const Turn& t, int owner) const {
    return at_.partials + slot(t, owner);
  }
  __device__ uint64_t to_send(const Turn& t) const { return at_.send + slot(t, node); }
  __device__ uint64_t scalars(const Turn& t) const {
    return at_.scalars + t.slot * (kMostChunkPairs * sizeof(float));
  }

  // At an offset of rank r's arena, r of this node; of mine.
  __device__ char* of(int r, uint64_t offset) const { return op_.call.peers.control[r] + offset; }
  __device__ char* here(uint64_t offset) const { return base_ + offset; }
  __device__ uint64_t* word(uint64_t offset) const {
    return reinterpret_cast<uint64_t*>(base_ + offset);
  }

  // By one thread: wait until the slot of `t` is free, whose flag of the last message there is at
  // `credit_at`. `rank` gives it back: acquires that it has read the slot. False: give up.
  __device__ bool await_room(const Turn& t, uint64_t credit_at, int rank) const {
    if (t.number < t.slots) return true;
    const uint64_t last = make_credit(op_.tag, t.number - t.slots);
    return op_.await(word(credit_at), last, rank, Phase::kRoom);
  }
  // By one thread: wait until the message `t` of `rank` is there, with its flag at `flag_at`:
  // acquires it. False: give up.
  __device__ bool await_message(const Turn& t, uint64_t flag_at, int rank) const {
    return op_.await(word(flag_at), stamp(t), rank, Phase::kMessage);
  }

 private:
  __device__ uint64_t flag(const Turn& t) const {
    return (t.ring * t.slots + t.slot) * sizeof(uint64_t);
  }
  __device__ uint64_t slot(const Turn& t, int owner) const {  // which has no ring of its own
    const int ring = t.ring < owner ? t.ring : t.ring - 1;
    return (ring * t.slots + t.slot) * at_.slot_bytes;
  }

  const Op& op_;
  const RingLayout& at_;
  char* const base_;
  uint64_t remote_, own_;
  uint32_t remote_slot_, own_slot_;  // of the first message, and the first partial

 public:
  const int L, N;         // ranks of a node, nodes
  const int node, index;  // where I am
};

// The tokens of a chunk that a message has rows of; in shared memory.
struct TokenSet {
  uint32_t words[kMostChunkTokens / 32];

  // By all threads of a block, between block barriers.
  __device__ void clear() {
    if (threadIdx.x < kMostChunkTokens / 32) words[threadIdx.x] = 0;
  }
  // By one lane.
  __device__ void insert(int i) { atomicOr(&words[i / 32], 1u << i % 32); }
  __device__ bool has(int i) const { return words[i / 32] >> i % 32 & 1; }
  // Of those before the i-th: its row's place.
  __device__ int before(int i) const {
    int count = __popc(words[i / 32] & ((1u << i % 32) - 1));
    for (int w = 0; w < i / 32; ++w) count += __popc(words[w]);
    return count;
  }
  __device__ int count() const {
    int count = 0;
    for (uint32_t word : words) count += __popc(word);
    return count;
  }
};

// By the first warp: the head of a message or a partial. Everything else of it is there, or is
// written before the block barrier that follows.
__device__ inline void write_head(char* slot, uint64_t stamp, int rows, const TokenSet& tokens) {
  auto* head = reinterpret_cast<MessageHead*>(slot);
  if (threadIdx.x < kMostChunkTokens / 32) head->tokens[threadIdx.x] = tokens.words[threadIdx.x];
  if (threadIdx.x != 0) return;
  head->stamp = stamp;
  head->rows = rows;
}

// By one warp: the tokens of the message or partial at `slot`, below `chunk`. False, for all lanes:
// its head is not that of message `stamp`, or says more than there can be.
__device__ inline bool read_head(const char* slot, uint64_t stamp, int chunk, TokenSet* tokens) {
  const auto* head = reinterpret_cast<const MessageHead*>(slot);
  const int lane = lane_id();
  const uint2 seen = load_arrived(reinterpret_cast<const uint2*>(&head->stamp));
  uint32_t word = 0;
  if (lane < kMostChunkTokens / 32) {
    word = load_arrived(head->tokens + lane);
    tokens->words[lane] = word;
  }
  const int allowed = min_int(max_int(chunk - 32 * lane, 0), 32);
  const bool beyond = allowed < 32 && word >> allowed != 0;
  const uint32_t rows = warp_sum(__popc(word));
  return !__any_sync(kAllLanes, beyond) && load_arrived(&head->rows) == rows &&
         (uint64_t(seen.y) << 32 | seen.x) == stamp;
}

}  // namespace jax_ep
