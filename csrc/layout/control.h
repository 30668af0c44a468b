// SPDX-License-Identifier: Apache-2.0
// The control block: the small piece of device memory of each rank that all its peers map. It holds
// every flag, the routing that peers push to the plan, and where peers' output buffers are.
//
// A flag word is {state 2, generation 6, epoch 32, signature 24} and is compared for equality: the
// epoch counts the group's operations on the device, the signature tells operations and shapes
// apart. A word of routing has no flag: it carries two choices and a tag of 32 bits, and is stored
// and loaded whole.
#pragma once
#include <cstddef>
#include <cstdint>

#include "host_device.h"
#include "slots.h"

namespace jax_ep {

constexpr int kMaxRanks = 64;
constexpr int kMaxTopK = 32;
constexpr int kMaxExperts = 3072;   // what fits the plan's shared memory
constexpr int kMaxPairs = 65536;    // T*K of one rank
constexpr int kMaxChunks = 1024;    // done flags of one source in one operation
constexpr int kMaxOutputs = 3;      // buffers of one operation that peers write
constexpr int kMaxAllocations = 8;  // pieces of a peer's memory that this process has mapped

// A place in a rank's memory, as every process can name it.
struct Location {
  uint64_t offset;      // from the start of the allocation; one process: the address itself
  uint32_t allocation;  // index into `Header::mapping`; 0 with base 0 in one process
  uint32_t reserved;
};

// "My output of this operation may be written": pushed by peer p into my `ready[p]`.
struct alignas(128) Ready {
  Location output[kMaxOutputs];
  uint64_t bytes[kMaxOutputs];  // of each output: pushes are checked against it
  uint64_t tag;                 // released last
};

// My output lent to one peer, in my own block: OPEN by me, TAKEN by the peer's compare-and-swap
// before its first push, or REVOKED by me when I give up. Who finds TAKEN waits until the peer has
// left.
constexpr uint64_t kTaken = uint64_t{1} << 62;
constexpr uint64_t kRevoked = uint64_t{2} << 62;

enum class Fault : uint32_t {
  kNone = 0,
  kTimeout = 1,   // a peer did not arrive in time
  kMismatch = 2,  // a peer runs another operation, or other shapes
  kRouting = 3,   // topk_idx outside [-1, E)
  kBounds = 4,    // a push would have left the peer's buffer
  kRevoked = 5,   // this rank came after the peer had given up
  kBusy = 6,      // two operations of the group at once on this rank
  kPeer = 7,      // a peer reported one of these
  kInFlight = 8,  // start and done of a small batch did not take turns
};

enum class Phase : uint32_t {
  kRouting = 0,
  kReady = 1,
  kRows = 2,
  kGrid = 3,
  kEntry = 4,
  kMessage = 5,  // between the stages of an operation between nodes
  kRoom = 6,     // in a ring for the next message
};

// What went wrong first on this rank; in host memory that the device writes.
struct FaultRecord {
  uint32_t fault;      // Fault; written last
  uint32_t operation;  // Operation
  uint32_t phase;      // Phase
  int32_t rank;        // who waited
  int32_t awaited;     // for whom
  uint64_t seen;
  uint64_t wanted;
};

// State of one rank; written by its own kernels, `broken` by peers too. The first line is what an
// operation reads when it begins.
struct alignas(128) Header {
  uint64_t epoch;         // operations completed
  uint64_t plans;         // plans completed; its parity picks the routing buffer
  uint64_t broken;        // sticky, 0 or 1 + the rank that failed first: every wait gives up
  uint64_t generation;    // of the group: `initialize` counts it up and starts the epochs anew
  uint64_t timeout_ns;    // bound of every wait
  FaultRecord* record;    // this rank's, in host memory
  uint64_t started[2];    // of each SlotKind: small batches started; the parity picks the slots
  uint64_t in_flight[2];  // alike: 1 between start and done
  uint64_t slot_blocks;   // blocks of all small batches, those that have begun
  // Counters of the running kernel, each on a line of its own; the last block to leave resets them.
  alignas(128) uint32_t left;          // blocks that have left
  alignas(128) uint32_t barrier;       // arrivals at the grid's meeting
  alignas(128) uint32_t wire_ticket;   // items to push that have been taken
  alignas(128) uint32_t local_ticket;  // items of local work that have been taken
  // Operations that have begun: as many as have completed, unless one is still running.
  alignas(128) unsigned long long began;
  // Blocks of small batches: of the running one that have begun, which the last to begin resets;
  // of all that have left; the epoch of the last one whose results were poisoned.
  alignas(128) uint32_t slot_begun;
  alignas(128) uint64_t slot_left;
  alignas(128) unsigned long long slot_poisoned;
};

// One named piece of the control block.
struct Field {
  const char* name;
  const char* writer;
  size_t offset;
  size_t bytes;
};

// Where the pieces are, in a group of `num_ranks`; the same on every rank.
struct ControlLayout {
  uint32_t header, mapping, pushed, borrowed, lease, left, ready, done, hello, routing, total;
};

constexpr int kControlFields = 10;

// The declaration of the layout: `visit(name, writer, bytes)` in order.
template <typename Visit>
constexpr void visit_control(int num_ranks, Visit&& visit) {
  const size_t R = num_ranks;
  visit("header", "this rank; `broken` also peers", sizeof(Header));
  visit("mapping", "host, once", R * kMaxAllocations * sizeof(char*));
  visit("pushed", "this rank: items of [peer][chunk] pushed", R * kMaxChunks * sizeof(uint32_t));
  visit("borrowed", "this rank: leases that it has taken", R * sizeof(uint64_t));
  visit("lease", "this rank, then peer p: lease[p]", R * sizeof(uint64_t));
  visit("left", "peer p, after a failure: left[p]", R * sizeof(uint64_t));
  visit("ready", "peer p: ready[p]", R * sizeof(Ready));
  visit("done", "peer p: done[p][chunk]", R * kMaxChunks * sizeof(uint64_t));
  visit("hello", "peer p: hello[parity][p]", 2 * R * sizeof(uint64_t));
  visit("routing", "peer p: routing[parity][p][pair/2]", 2 * R * kMaxPairs / 2 * sizeof(uint64_t));
}

// Offsets of the fields; `fields`, if given, receives names and sizes too.
constexpr ControlLayout control_layout(int num_ranks, Field* fields = nullptr) {
  size_t offsets[kControlFields] = {}, end = 0;
  int n = 0;
  visit_control(num_ranks, [&](const char* name, const char* writer, size_t bytes) {
    offsets[n] = end;
    if (fields != nullptr) fields[n] = Field{name, writer, end, bytes};
    end = round_up(end + bytes, 128);
    ++n;
  });
  auto u32 = [](size_t v) { return static_cast<uint32_t>(v); };
  return {u32(offsets[0]), u32(offsets[1]), u32(offsets[2]), u32(offsets[3]),
          u32(offsets[4]), u32(offsets[5]), u32(offsets[6]), u32(offsets[7]),
          u32(offsets[8]), u32(offsets[9]), u32(end)};
}

JAX_EP_HD uint64_t make_tag(uint64_t generation, uint64_t epoch, uint32_t signature) {
  return ((generation & 0x3f) << 56) | ((epoch & 0xffffffffu) << 24) | (signature & 0xffffffu);
}

// The tag of a word of routing: one for each of the 2^32 operations of a generation, shifted by the
// generation, so that a word which its sender stores late is not taken for one of the next. Never
// zero, as memory that nobody has written is.
JAX_EP_HD uint32_t word_tag(uint64_t tag) {
  const uint32_t epoch = static_cast<uint32_t>(tag >> 24);
  const uint32_t mixed = epoch + static_cast<uint32_t>(tag >> 56) * 0x9e3779b1u;
  return mixed == 0 ? 1 : mixed;
}

JAX_EP_HD uint64_t make_word(uint32_t tag, int even, int odd) {
  return uint64_t{tag} << 32 | (odd & 0xffffu) << 16 | (even & 0xffffu);
}

JAX_EP_HD uint32_t tag_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }

// The choice of pair `pair`, which the word holds.
JAX_EP_HD int choice_of(uint64_t word, int pair) {
  return static_cast<int16_t>(word >> (pair % 2 * 16));
}

// The peers of one rank as its kernels see them; a kernel argument. Those of its node are the ranks
// from `node_first` on, `node_ranks` of them: all, unless the group spans nodes.
struct Peers {
  char* control[kMaxRanks];  // rank r's control block, at this rank's address; null on other nodes
  ControlLayout at;
  SlotLayout slots;  // behind the control block, from `at.total` on
  int rank;
  int num_ranks;
  int node_first;
  int node_ranks;
};

}  // namespace jax_ep
