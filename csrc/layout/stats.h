// SPDX-License-Identifier: Apache-2.0
// Timings of one rank's last operations: a ring of records in its own device memory, where its
// kernels stamp and from where the host copies, without either waiting for the other.
//
// A record is never cleared. Its number says which operation it is of; time only grows, so a stamp
// older than `begin` is of an earlier operation; a wait carries the turn of the ring in which it
// was noted.
#pragma once
#include <cstdint>
#include <vector>

#include "host_device.h"

namespace jax_ep {

constexpr int kStatsRing = 4096;  // operations
constexpr int kStatsMargin = 64;  // the oldest, which may be overwritten while the host copies

// 64-bit words of a record; then a wait for each rank.
enum class Stamp : int {
  kNumber = 0,     // of the operation on this rank, from 1
  kOperation = 1,  // Operation
  kBegin = 2,      // nanoseconds: block 0 begins
  kReady = 3,      // large batches: all leases are taken; of a plan: all routing is there
  kPushed = 4,     // the last push is published
  kArrived = 5,    // small batches: all that peers send is there
  kEnd = 6,        // the last block leaves
  kWaits = 7,
};
constexpr int kStamps = static_cast<int>(Stamp::kWaits);

JAX_EP_HD int stats_words(int num_ranks) { return kStamps + num_ranks; }

// A wait: the turn of the ring above, nanoseconds below.
JAX_EP_HD uint64_t pack_wait(uint64_t number, uint64_t ns) {
  return number / kStatsRing << 32 | (ns < 0xffffffffu ? ns : 0xffffffffu);
}
JAX_EP_HD uint64_t wait_of(uint64_t packed, uint64_t number) {
  return packed >> 32 == (number / kStatsRing & 0xffffffffu) ? packed & 0xffffffffu : 0;
}

// The records of a copied ring, of operations up to `newest`; waits as plain nanoseconds.
inline std::vector<uint64_t> decode_stats(const std::vector<uint64_t>& ring, int num_ranks,
                                          uint64_t newest) {
  const size_t words = stats_words(num_ranks);
  std::vector<uint64_t> records;
  for (size_t i = 0; i < kStatsRing; ++i) {
    const uint64_t* r = &ring[i * words];
    const uint64_t number = r[static_cast<int>(Stamp::kNumber)];
    const bool is_of_slot = number > 0 && number % kStatsRing == i;
    if (!is_of_slot || number > newest || number + kStatsRing - kStatsMargin <= newest) continue;
    records.insert(records.end(), r, r + kStamps);
    for (size_t w = kStamps; w < words; ++w) records.push_back(wait_of(r[w], number));
  }
  return records;
}

}  // namespace jax_ep
