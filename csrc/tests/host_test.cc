// SPDX-License-Identifier: Apache-2.0
// What can be proved without a GPU: the layout of the control block, the cutting of work, the rows
// granted to experts, the host plan's own invariants.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdio>
#include <random>
#include <set>

#include "../layout/control.h"
#include "../layout/stats.h"
#include "../plan/host_plan.h"
#include "../plan/tiling.h"
#include "../rdma/layout.h"
#include "../runtime/sms.h"
#include "expect.h"

namespace jax_ep {
namespace {

void control_fields_do_not_overlap() {
  for (int R : {1, 2, 8, 64}) {
    Field fields[kControlFields];
    const ControlLayout at = control_layout(R, fields);
    size_t end = 0;
    for (const Field& f : fields) {
      EXPECT(f.offset >= end && f.offset % 128 == 0 && f.bytes > 0);
      end = f.offset + f.bytes;
    }
    EXPECT(at.total >= end);
    if (R <= 8) EXPECT(at.total <= 8u << 20);
  }
}

void tags_tell_operations_apart() {
  std::set<uint64_t> seen;
  for (uint64_t generation : {1, 2, 63}) {
    for (uint64_t epoch : {1ull, 2ull, 0xffffffffull}) {
      for (uint32_t signature : {0u, 1u, 0xffffffu}) {
        const uint64_t tag = make_tag(generation, epoch, signature);
        EXPECT(seen.insert(tag).second);
        EXPECT((tag & (kTaken | kRevoked)) == 0);
      }
    }
  }
}

void words_carry_two_choices_and_a_tag() {
  std::set<uint32_t> tags;
  for (uint64_t generation : {1, 2, 3, 62, 63}) {
    for (uint64_t epoch : {1ull, 2ull, 3ull, 1000000ull, 0xffffffffull}) {
      const uint64_t tag = make_tag(generation, epoch, 0x123456);
      EXPECT(word_tag(tag) != 0 && tags.insert(word_tag(tag)).second);
      EXPECT(word_tag(tag) == word_tag(make_tag(generation, epoch, 0)));
    }
  }
  EXPECT(word_tag(make_tag(1, 0u - 0x9e3779b1u, 0)) != 0);
  for (int even : {-1, 0, 7, kMaxExperts - 1}) {
    for (int odd : {-1, 0, 8, kMaxExperts - 1}) {
      const uint64_t word = make_word(0xfedcba98u, even, odd);
      EXPECT(tag_of(word) == 0xfedcba98u);
      EXPECT(choice_of(word, 12) == even && choice_of(word, 13) == odd);
    }
  }
}

void dividers_divide() {
  std::mt19937 rng(4);
  for (int divisor : {1, 2, 3, 7, 8, 127, 128, 3072, 4095, 65535, 65536, 1 << 30, INT_MAX}) {
    const Divider divide(divisor);
    for (int n : {0, 1, divisor - 1, divisor, INT_MAX - 1, INT_MAX})
      EXPECT(divide(n) == n / divisor);
    for (int i = 0; i < 1000; ++i) {
      const int n = int(rng() >> (1 + rng() % 31));
      EXPECT(divide(n) == n / divisor);
    }
  }
}

void tiles_cover_the_tokens() {
  for (int R : {1, 2, 8, 64}) {
    for (int T : {1, 2, 63, 128, 1000, 2048, 4096, 65536}) {
      for (int K : {1, 3, 8, 32}) {
        if (T * K > kMaxPairs) continue;
        for (int blocks : {1, 2, 7, 24, 108, 132, 148, 1000}) {
          const Exchange x{R, 64, T, K, 64, 1, 0};
          const PlanSizes sizes(x, blocks);
          const Tiling& t = sizes.tiling;
          EXPECT(t.tokens >= 1 && t.tokens * K <= kMostTilePairs && t.tokens * K <= sizes.held);
          EXPECT(t.tiles * t.tokens >= R * T && (t.tiles - 1) * t.tokens < R * T);
          EXPECT(t.per_block * blocks >= t.tiles && (t.per_block == 1) == (t.tiles <= blocks));
          EXPECT(size_t(t.tiles) * sizes.experts / 2 <= PlanSizes::table_words(x));
          EXPECT(sizes.groups >= 1 && sizes.groups * sizes.experts / 8 <= kPlanThreads);
        }
      }
    }
  }
}

void chunks_fit_their_flags() {
  for (int T : {1, 2, 31, 127, 128, 129, 4096, 65535, 65536}) {
    const int chunk = chunk_tokens(T, kMaxChunks);
    EXPECT(chunk >= 1 && ceil_div(T, chunk) <= kMaxChunks);
  }
}

void every_block_has_a_role() {
  for (int blocks : {1, 2, 3, 16, 132}) {
    for (int R : {1, 2, 8}) {
      const Roles roles = split_roles(blocks, R, 16);
      EXPECT(roles.local >= 1 && roles.wire + roles.local >= blocks);
      EXPECT((R == 1) == (roles.wire == 0));
      std::set<int> warps;  // each of the first local items is given to one warp
      for (int block = 0; block < blocks; ++block) {
        for (int w = 0; w < 32; ++w) warps.insert(local_warp(roles, block, blocks, w, 32));
      }
      for (int i = 0; i < roles.local * 32; ++i) EXPECT(warps.count(i) == 1);
    }
  }
}

void water_filling_matches_the_slow_way() {
  std::mt19937 rng(1);
  for (int i = 0; i < 2000; ++i) {
    std::vector<int> blocks(1 + rng() % 12);
    for (int& b : blocks) b = int(rng() % 9);
    const int budget = int(rng() % 40);
    std::vector<int> slow(blocks.size(), 0);
    int left = budget;  // one block to each hungry expert in turn, lowest id first
    for (bool fed = true; fed && left > 0;) {
      fed = false;
      for (size_t e = 0; e < blocks.size() && left > 0; ++e) {
        if (slow[e] == blocks[e]) continue;
        ++slow[e], --left;
        fed = true;
      }
    }
    EXPECT(grant_blocks(blocks, budget) == slow);
  }
}

void host_plan_is_a_bijection() {
  std::mt19937 rng(2);
  for (int i = 0; i < 200; ++i) {
    const int R = 1 << rng() % 4, local = 1 + int(rng() % 5);
    const int A = 1 + int(rng() % 4);
    Exchange x{R, R * local, 1 + int(rng() % 20), 1 + int(rng() % 6), 0, A, 0};
    x.num_rows = A * (1 + int(rng() % 60));
    std::vector<int> idx(size_t(R) * x.num_pairs());
    for (int& e : idx) e = int(rng() % (x.num_experts + 1)) - 1;
    const HostPlan p = host_plan(x, idx);
    int kept = 0, named = 0;
    for (size_t pair = 0; pair < idx.size(); ++pair) {
      named += idx[pair] >= 0;
      if (p.pair_row[pair] < 0) continue;
      ++kept;
      EXPECT(p.row_pair[size_t(p.pair_rank[pair]) * x.num_rows + p.pair_row[pair]] == int(pair));
    }
    int owned = 0, dropped = 0, counted = 0;
    for (int pair : p.row_pair) owned += pair >= 0;
    for (int d : p.num_dropped) dropped += d;
    for (int c : p.counts) counted += c;
    EXPECT(owned == kept && counted == kept && kept + dropped == named);
  }
}

// Two ranks, top-8: nearly every token has one copy, so 11 rows pass through memory for each token
// of a dispatch, as of a combine, and one crosses the link. Rows of 14336 bytes.
void default_sms_keep_up_with_memory_or_link() {
  const Speeds h100{132, 3352, 478}, slow_link{132, 3352, 20}, silent{132, 0, 0};
  const double row = 14336;
  const Demand rows = dispatch_demand(2, 8, row), sums = combine_demand(2, 8, row);
  for (const Demand& of : {rows, sums}) {
    EXPECT(std::abs(of.memory_bytes / row - 11) < 0.05 && std::abs(of.link_bytes / row - 1) < 0.05);
  }
  EXPECT(default_sms(h100, rows) == 63);  // 1.25 * 3352 / 67 = 62.5: memory binds
  EXPECT(default_sms(h100, sums) == 67);  // 2.48 us of an SM, 0.0470 of the memory
  EXPECT(default_sms(h100, combine_demand(2, 6, 4096)) == 100);  // 1.87 us, 0.0110
  EXPECT(default_sms(slow_link, rows) == 5);                     // 1.25 * 20 * 11 / 67 = 4.1
  EXPECT(default_sms({16, 3352, 478}, rows) == 12);
  EXPECT(default_sms(silent, rows) == 100 && default_sms(h100, Demand{}) == 100);
  EXPECT(default_sms({132, 3352, 0}, rows) == 63);  // a link that does not say is no bound

  EXPECT(leaving_room(132) == 100 && leaving_room(33) == 25);
  EXPECT(leaving_room(3) == 3 && leaving_room(1) == 1);
  const Demand alone = dispatch_demand(1, 8, row);  // nothing crosses a link
  EXPECT(alone.link_bytes == 0 && alone.memory_bytes == 9 * row && default_sms(h100, alone) == 63);
  EXPECT(default_sms(h100, dispatch_demand(8, 8, row)) == 29);  // 4.6 copies: the link binds
  for (int R : {1, 2, 8, 64}) {
    for (int K : {1, 8, 32}) {
      EXPECT(copies_of_a_token(R, K) <= std::min(R - 1, K));
      for (const Speeds& gpu : {h100, slow_link, silent}) {
        const int n = default_sms(gpu, combine_demand(R, K, row));
        EXPECT(n >= 1 && n <= leaving_room(gpu.sms));
      }
    }
  }
}

void ring_fields_do_not_overlap() {
  for (const auto& [nodes, local] : {std::pair{2, 1}, {2, 8}, {8, 8}, {64, 1}}) {
    const RingSize size{3, 4096};
    Field fields[kRingFields];
    const size_t first = control_layout(nodes * local).total;
    const RingLayout at = ring_layout(nodes, local, size, first, fields);
    size_t end = first;
    for (const Field& f : fields) {
      EXPECT(f.offset >= end && f.offset % 128 == 0);
      EXPECT(f.bytes > 0 || (local == 1 && f.name == std::string("partials")));
      end = f.offset + f.bytes;
    }
    EXPECT(at.counters == fields[0].offset && at.scalars == fields[kRingFields - 1].offset);
    EXPECT(at.total >= end && at.slot_bytes == 4096);
    EXPECT(at.slots * (nodes - 1) >= 3 && (at.slots - 1) * (nodes - 1) < 3);
    EXPECT(local == 1 || (at.own_slots * (local - 1) >= 3 && (at.own_slots - 1) * (local - 1) < 3));
  }
}

void pieces_hold_all_of_a_routing() {
  for (int others : {1, 2, 7, 16, 17, 63}) {
    for (int words : {1, 2, 3, 31, 32, 33, 12345, kMaxPairs / 2}) {
      const RoutingPieces p(others, words);
      EXPECT(p.words % 2 == 0 && p.count >= 1 && p.count <= p.most);
      EXPECT(p.count * p.words >= words && (p.count - 1) * p.words < words);
      EXPECT(p.most == 1 || p.most * others <= kMostPieces);
    }
  }
}

void stamps_tell_messages_apart() {
  const uint64_t tag = make_tag(5, 77, 0xabcdef);
  std::set<uint64_t> seen;
  for (uint64_t number : {0ull, 1ull, 76ull, 0xfffffffeull}) {
    EXPECT(make_stamp(tag, number) == make_tag(5, number + 1, 0xabcdef));
    EXPECT(make_credit(tag, number) == make_tag(5, number + 1, 0));
    EXPECT(seen.insert(make_stamp(tag, number)).second);
    EXPECT(seen.insert(make_credit(tag, number)).second);
  }
}

void messages_fit_their_slots() {
  for (int T : {1, 2, 100, 256, 257, 4096, 65536}) {
    for (int K : {1, 8, 32}) {
      if (T * K > kMaxPairs) continue;
      const Exchange x{16, 64, T, K, 64, 1, 0};
      const MessageShape any = dispatch_message(x, 14336, 0, kAnySlot);
      const size_t most = most_slot_bytes(any);
      for (size_t slot : {most, most / 2, any.bytes(1), any.bytes(1) - 1}) {
        const MessageShape m = dispatch_message(x, 14336, 0, slot);
        if (m.chunk == 0) {
          EXPECT(any.bytes(ceil_div(T, kMaxChunks)) > slot || slot < most / 2);
          continue;
        }
        EXPECT(m.bytes(m.chunk) <= slot && m.rows_at() % 128 == 0);
        EXPECT(m.chunk * K <= kMostChunkPairs && m.chunk <= kMostChunkTokens);
        EXPECT(ceil_div(T, m.chunk) <= kMaxChunks);
      }
      EXPECT(any.chunk > 0 && dispatch_message(x, 14336, 0, most).chunk == any.chunk);
      const MessageShape scaled = dispatch_message(x, 7168, 56, kAnySlot);
      EXPECT(scaled.row_bytes == 7168 + 224 && combine_message(x, 0, 1024 * 8).chunk > 0);
    }
  }
  constexpr int kDefaultSlotBytes = 33 << 12;  // Rdma.ring_slot_bytes
  const Exchange x{16, 256, 8192, 8, 64, 1, 0};
  EXPECT(dispatch_message(x, 16384, 0, kDefaultSlotBytes).chunk == 8);
  EXPECT(combine_message(x, 16384, kDefaultSlotBytes).chunk == 8);
}

void every_block_has_a_role_between_nodes() {
  for (int blocks = kLeastDispatchBlocks; blocks <= 200; ++blocks) {
    for (int local : {1, 2, 8}) {
      for (int percent : {0, 1, 25, 100}) {
        const NodeShares all{percent, percent, percent, percent, percent};
        const NodeRoles r = split_node_roles(blocks, local, all);
        EXPECT(r.wire + r.send + r.put + r.forward + r.local == blocks);
        EXPECT((r.wire >= 1) == (local > 1) && r.send >= 1 && r.put >= 1);
        EXPECT(r.forward >= 1 && r.local >= 1);
      }
    }
  }
  for (int blocks = kLeastCombineBlocks; blocks <= 200; ++blocks) {
    for (const auto& [ranks, local] : {std::pair{2, 1}, {4, 2}, {16, 8}, {64, 8}, {64, 32}}) {
      for (int K : {1, 8, 32}) {
        for (int percent : {0, 1, 50, 100}) {
          const NodeShares all{percent, percent, percent, percent, percent};
          const CombineRoles r = split_combine_roles(blocks, ranks, local, K, all);
          EXPECT(r.partial + r.gateway + r.put + r.reduce == blocks);
          EXPECT((r.partial >= 1) == (local > 1) && r.gateway >= 1);
          EXPECT(r.put >= 1 && r.reduce >= 1);
        }
      }
    }
  }
}

// What a rank's kernels write of operation `number`.
void write_record(std::vector<uint64_t>& ring, int R, uint64_t number) {
  uint64_t* r = &ring[number % kStatsRing * stats_words(R)];
  for (int i = 0; i < kStamps; ++i) r[i] = 10 * number + i;
  r[static_cast<int>(Stamp::kNumber)] = number;
  if (number % 2) r[kStamps + 1] = pack_wait(number, 7 * number);
}

void stats_are_of_operations_that_ended() {
  const int R = 3, words = stats_words(R);
  std::vector<uint64_t> ring(size_t(kStatsRing) * words);
  EXPECT(decode_stats(ring, R, 0).empty() && decode_stats(ring, R, 100).empty());
  for (uint64_t newest : {uint64_t{1}, uint64_t{10}, uint64_t{4096}, uint64_t{9000}}) {
    for (uint64_t n = 1; n <= newest + 1; ++n) write_record(ring, R, n);  // one is still running
    const std::vector<uint64_t> records = decode_stats(ring, R, newest);
    const uint64_t kept = std::min<uint64_t>(newest, kStatsRing - kStatsMargin);
    EXPECT(records.size() == kept * words);
    uint64_t sum = 0;
    for (size_t i = 0; i < records.size(); i += words) {
      const uint64_t n = records[i];
      sum += n;
      EXPECT(n > newest - kept && n <= newest && records[i + 6] == 10 * n + 6);
      EXPECT(records[i + kStamps] == 0 && records[i + kStamps + 2] == 0);
      EXPECT(records[i + kStamps + 1] == (n % 2 ? 7 * n : 0));  // not that of an earlier turn
    }
    EXPECT(sum == kept * newest - kept * (kept - 1) / 2);  // each of them once
  }
  EXPECT(wait_of(pack_wait(5, uint64_t{1} << 40), 5) == 0xffffffffu);
  EXPECT(pack_wait(5 + kStatsRing, 0) > pack_wait(5, 1000));
}

}  // namespace
}  // namespace jax_ep

int main() {
  using namespace jax_ep;
  control_fields_do_not_overlap();
  tags_tell_operations_apart();
  words_carry_two_choices_and_a_tag();
  dividers_divide();
  tiles_cover_the_tokens();
  chunks_fit_their_flags();
  every_block_has_a_role();
  water_filling_matches_the_slow_way();
  host_plan_is_a_bijection();
  default_sms_keep_up_with_memory_or_link();
  ring_fields_do_not_overlap();
  pieces_hold_all_of_a_routing();
  stamps_tell_messages_apart();
  messages_fit_their_slots();
  every_block_has_a_role_between_nodes();
  stats_are_of_operations_that_ended();
  std::printf(failures ? "%d failures\n" : "host tests passed\n", failures);
  return failures != 0;
}
