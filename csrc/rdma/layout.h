// SPDX-License-Identifier: Apache-2.0
// What a rank of a group that spans nodes has in the arena, behind its control block: rings of
// messages between nodes, rings of partial sums inside a node. `Config` sizes them.
//
// N nodes of L ranks; rank n * L + l is the l-th of node n. Messages between nodes go between ranks
// with the same l. The rings of a kind share their slots, of `slot_bytes` each, as the traffic
// shares the way: each ring has at least one.
//
// Flags of rings are tags as the control block's are, with the number of a message in its ring,
// from 1 on, in place of the epoch: a slot's `packed`, `arrived` and `filled` with the operation's
// signature, its `credit` and `emptied` with none. A message may take a slot when the last one
// there is credited.
#pragma once
#include "../layout/control.h"
#include "../plan/geometry.h"

namespace jax_ep {

struct RingSize {
  int slots = 0;       // of all rings of a kind together
  int slot_bytes = 0;  // a multiple of 128

  // Of each of `rings`.
  constexpr int slots_of(int rings) const { return rings > 0 ? (slots + rings - 1) / rings : 1; }
};

// Messages that have gone through each ring; on all ranks alike.
struct RingCounters {
  uint64_t remote;  // to and from each other node
  uint64_t own;     // chunks whose partials have gone through; times the number of nodes: partials
};

// Offsets from the start of the control block.
struct RingLayout {
  uint64_t counters, words, routed, packed, arrived, credit, send, receive, filled, emptied,
      partials, scalars, total;
  uint64_t slot_bytes;
  uint32_t slots, own_slots;  // of a ring between nodes, of one inside
};

constexpr int kRingFields = 12;
constexpr int kMostChunkTokens = 256;
constexpr int kMostChunkPairs = 1024;
constexpr int kChunksOfFew = 8, kFewTokens = 16;

// A rank's routing goes to each of `others` ranks of other nodes in pieces, a put each, so that
// about kMostPieces puts are made at one time.
constexpr int kMostPieces = 16;
struct RoutingPieces {
  int most;   // of any routing
  int words;  // of a piece, but for the last one; whole Vecs
  int count;

  JAX_EP_HD constexpr RoutingPieces(int others, int all_words)
      : most(max_int(1, kMostPieces / max_int(1, others))),
        words(max_int(2, ceil_div(all_words, 2 * most) * 2)),
        count(ceil_div(all_words, words)) {}
};

// The declaration of the layout: `visit(name, writer, bytes)` in order. Nothing goes to oneself.
template <typename Visit>
constexpr void visit_rings(int nodes, int local_ranks, const RingSize& size, Visit&& visit) {
  const size_t N = nodes, L = local_ranks, slots = size.slots_of(nodes - 1);
  const size_t own_slots = size.slots_of(local_ranks - 1);
  const size_t flags = slots * sizeof(uint64_t), own_flags = own_slots * sizeof(uint64_t);
  const size_t ring = slots * size.slot_bytes, own_ring = own_slots * size.slot_bytes;
  visit("counters", "this rank", sizeof(RingCounters));
  visit("words", "this rank: its routing [parity][pair/2]", 2 * kMaxPairs / 2 * sizeof(uint64_t));
  visit("routed", "rank r of another node: routed[parity][r][piece]",
        2 * N * L * RoutingPieces((N - 1) * L, 0).most * sizeof(uint64_t));
  visit("packed", "this rank: messages to node n: packed[n][slot]", N * flags);
  visit("arrived", "rank of node n: arrived[n][slot]", N * flags);
  visit("credit", "rank of node n: credit[n][slot]", N * flags);
  visit("send", "this rank: messages [other node][slot]", (N - 1) * ring);
  visit("receive", "rank of node n: messages [other node][slot]", (N - 1) * ring);
  visit("filled", "rank j of this node: filled[j][slot]", L * own_flags);
  visit("emptied", "rank j of this node: emptied[j][slot]", L * own_flags);
  visit("partials", "rank j of this node: partials[other j][slot]", (L - 1) * own_ring);
  visit("scalars", "ranks of this node: scalars[slot][pair of a chunk]",
        own_slots * kMostChunkPairs * sizeof(float));
}

// Offsets of the fields, the first at `first`; `fields`, if given, receives names and sizes too.
constexpr RingLayout ring_layout(int nodes, int local_ranks, const RingSize& size, size_t first,
                                 Field* fields = nullptr) {
  size_t offsets[kRingFields] = {}, end = round_up(first, 128);
  int n = 0;
  visit_rings(nodes, local_ranks, size, [&](const char* name, const char* writer, size_t bytes) {
    offsets[n] = end;
    if (fields != nullptr) fields[n] = Field{name, writer, end, bytes};
    end = round_up(end + bytes, 128);
    ++n;
  });
  return {offsets[0],
          offsets[1],
          offsets[2],
          offsets[3],
          offsets[4],
          offsets[5],
          offsets[6],
          offsets[7],
          offsets[8],
          offsets[9],
          offsets[10],
          offsets[11],
          end,
          uint64_t(size.slot_bytes),
          uint32_t(size.slots_of(nodes - 1)),
          uint32_t(size.slots_of(local_ranks - 1))};
}

// `tag` with message number `number` of a ring, counted from 0, in place of the epoch.
JAX_EP_HD uint64_t make_stamp(uint64_t tag, uint64_t number) {
  return (tag & ~(uint64_t{0xffffffffu} << 24)) | ((number + 1) & 0xffffffffu) << 24;
}
JAX_EP_HD uint64_t make_credit(uint64_t tag, uint64_t number) {
  return make_stamp(tag, number) & ~uint64_t{0xffffffu};
}

// At the start of every message and every partial.
struct alignas(16) MessageHead {
  uint64_t stamp;
  uint32_t rows;  // that follow, packed; of a partial: at its token's place in the chunk
  uint32_t reserved;
  uint32_t tokens[kMostChunkTokens / 32];  // of the chunk: a bit for each that has a row
};

// Where a pair's row goes, as dispatch's messages say it.
struct Place {
  int32_t rank;  // of the group; -1: not to this node
  int32_t row;
};

// A message of a chunk: head; what it says of pairs; rows.
//
//   dispatch   head   Place [row][K]   scalar [row][K]   {row as it travels} [row]
//   combine    head   scalar [token][K]                  {partial sum} [row]
//   partial    head                                      {partial sum} [token]
struct MessageShape {
  int chunk;  // tokens, at most
  int top_k;  // K
  int pair_bytes;
  int row_bytes;  // a multiple of 16

  JAX_EP_HD size_t rows_at() const {
    return (sizeof(MessageHead) + size_t(chunk) * top_k * pair_bytes + 127) / 128 * 128;
  }
  JAX_EP_HD size_t bytes(int rows) const { return rows_at() + size_t(rows) * row_bytes; }
};

// The shape of messages whose slots have `slot_bytes`: chunks as inside a node, and of few tokens
// larger ones, if they fit. `chunk` is 0 if even the smallest do not: there are at most kMaxChunks.
JAX_EP_HD MessageShape message_shape(int num_tokens, int top_k, int pair_bytes, int row_bytes,
                                     uint64_t slot_bytes) {
  MessageShape shape{0, top_k, pair_bytes, row_bytes};
  const int least = max_int(1, ceil_div(num_tokens, kMaxChunks));
  const int wanted = min_int(kFewTokens, ceil_div(num_tokens, kChunksOfFew));
  for (int chunk = max_int(wanted, chunk_tokens(num_tokens, kMaxChunks)); chunk >= least; --chunk) {
    shape.chunk = chunk;
    if (shape.bytes(chunk) <= slot_bytes && chunk * top_k <= kMostChunkPairs) return shape;
  }
  shape.chunk = 0;
  return shape;
}

// Of a dispatch: a row travels as `value_bytes` of values, then its scales, if it has any.
JAX_EP_HD MessageShape dispatch_message(const Exchange& x, int value_bytes, int num_scales,
                                        uint64_t slot_bytes) {
  const int scale_bytes = (num_scales * int(sizeof(float)) + 15) / 16 * 16;
  return message_shape(x.num_tokens, x.top_k, int(sizeof(Place) + sizeof(float)),
                       value_bytes + scale_bytes, slot_bytes);
}

// Of a combine: a row of sums in y's type; none, if only scalars come back.
JAX_EP_HD MessageShape combine_message(const Exchange& x, int row_bytes, uint64_t slot_bytes) {
  return message_shape(x.num_tokens, x.top_k, sizeof(float), row_bytes, slot_bytes);
}

// What `slot_bytes` must be at least so that messages have as many tokens as they may: the shape of
// one in slots without bound.
constexpr uint64_t kAnySlot = ~uint64_t{0};
inline int most_slot_bytes(const MessageShape& in_any_slot) {
  return static_cast<int>(round_up(in_any_slot.bytes(in_any_slot.chunk), 128));
}

// How the blocks of a launch share the roles between nodes: `wire` and `local` as inside a node,
// the first and the last blocks, between them `send`, `put` and `forward`.
struct NodeRoles {
  int wire, send, put, forward, local;
};

// Percent of blocks, of which `wire` takes its share first; 0 for the default.
struct NodeShares {
  int wire = 0, send = 0, put = 0, forward = 0, gateway = 0;
};

constexpr int kLeastDispatchBlocks = 5, kLeastCombineBlocks = 4;  // one for each role
constexpr int kNodeWirePercent = 25, kSendPercent = 24, kPutPercent = 16, kForwardPercent = 38;
constexpr int kCombinePutPercent = 12;

// At least one block, and at least `left` for others.
JAX_EP_HD int share_of(int blocks, int percent, int usual, int left) {
  return max_int(1, min_int(blocks - left, blocks * (percent > 0 ? percent : usual) / 100));
}

JAX_EP_HD NodeRoles split_node_roles(int num_blocks, int local_ranks, const NodeShares& percent) {
  NodeRoles r;
  r.wire = local_ranks == 1 ? 0 : share_of(num_blocks, percent.wire, kNodeWirePercent, 4);
  const int others = num_blocks - r.wire;
  r.send = share_of(others, percent.send, kSendPercent, 3);
  r.put = min_int(share_of(others, percent.put, kPutPercent, 3), others - r.send - 2);
  r.forward =
      min_int(share_of(others, percent.forward, kForwardPercent, 3), others - r.send - r.put - 1);
  r.local = others - r.send - r.put - r.forward;
  return r;
}

// The same of a combine: blocks that make partials, sum a node's, put, and sum the nodes'. But for
// those that put, by what they move, in rows of a token: each reads its rank's own, K / R about,
// and rows of all that may come.
struct CombineRoles {
  int partial, gateway, put, reduce;
};

JAX_EP_HD CombineRoles split_combine_roles(int num_blocks, int num_ranks, int local_ranks,
                                           int top_k, const NodeShares& percent) {
  const int N = num_ranks / local_ranks, L = local_ranks;
  // In 1 / R of a row.
  const int mine = top_k, partials = (L - 1) * min_int(top_k, num_ranks);
  const int partial = N * (L - 1) * (mine + min_int(top_k, num_ranks));
  const int gateway = (N - 1) * (mine + partials + num_ranks);
  const int reduce = mine + partials + N * num_ranks;
  const int usual = 100 * gateway / (gateway + reduce);
  CombineRoles r;
  r.put = share_of(num_blocks, percent.put, kCombinePutPercent, 3);
  const int others = num_blocks - r.put;
  r.partial = L == 1 ? 0 : share_of(others, 100 * partial / (partial + gateway + reduce), 1, 2);
  r.gateway = share_of(others - r.partial, percent.gateway, usual, 1);
  r.reduce = others - r.partial - r.gateway;
  return r;
}

}  // namespace jax_ep
