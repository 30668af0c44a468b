// SPDX-License-Identifier: Apache-2.0
// Slots: memory of each rank that holds what peers sent of small batches (decode), so that they
// need not wait for a lease. It lies behind the control block; `Config` sizes it.
//
//   [kind][parity][source]  {hello, flag[token], word[token][K/2], slot[token]}
//
// A slot holds a row as it travels: values, then scales (FP8), then the token's K scalars.
//
// A rank of a group that spans nodes has outboxes behind these, from where the network takes what
// goes to other nodes. Each is laid out as the inbox that it is for.
//
//   [parity][rank]  of a rank of another node: words for it, packed; partials of its tokens
//                   at my own place: my rows, once each, whatever number of ranks they go to
#pragma once
#include <cstddef>
#include <cstdint>

namespace jax_ep {

enum class SlotKind : uint32_t { kDispatch = 0, kCombine = 1 };

constexpr int kMaxSlotPairs = 8192;    // R*T*K of one small batch
constexpr int kMaxSlotExperts = 1024;  // what fits 48 KiB of shared memory beside them

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// What the slots of a group hold at most.
struct SlotSize {
  int tokens = 0;     // of one rank; 0: no slots
  int row_bytes = 0;  // without scales
};

constexpr size_t kSlotWords = 16;  // of routing, per token: two choices each

// Offsets within what one source sends, in the order of memory; a slot has `stride` bytes.
struct SlotLayout {
  uint32_t flags, words, rows, stride;
  size_t total;
};

// The scales of a row are at most 1/32 of it, a token has at most 32 scalars.
constexpr SlotLayout slot_layout(const SlotSize& s) {
  const size_t flags = 128, words = flags + round_up(s.tokens * sizeof(uint64_t), 128);
  const size_t rows = words + s.tokens * kSlotWords * sizeof(uint64_t);
  const size_t stride = round_up(size_t(s.row_bytes) + s.row_bytes / 32 + 128, 128);
  auto u32 = [](size_t v) { return static_cast<uint32_t>(v); };
  return {u32(flags), u32(words), u32(rows), u32(stride), rows + s.tokens * stride};
}

constexpr int kInboxSets = 4, kOutboxSets = 2;  // [kind][parity], [parity]

// Of one rank; of its outboxes, which follow.
constexpr size_t slot_bytes(int num_ranks, const SlotSize& s) {
  return s.tokens == 0 ? 0 : kInboxSets * size_t(num_ranks) * slot_layout(s).total;
}
constexpr size_t outbox_bytes(int num_ranks, const SlotSize& s) {
  return slot_bytes(num_ranks, s) / kInboxSets * kOutboxSets;
}

}  // namespace jax_ep
