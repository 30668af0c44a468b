// SPDX-License-Identifier: Apache-2.0
// The ring of one rank's timings (layout/stats.h), from the host's side. Like a control block it is
// never freed: captured CUDA graphs hold its address.
#pragma once
#include <cuda_runtime.h>

#include <vector>

#include "../layout/stats.h"

namespace jax_ep {

class StatsRing {
 public:
  // Throws std::runtime_error, as the others do.
  StatsRing(int device, int num_ranks);
  StatsRing(const StatsRing&) = delete;
  StatsRing& operator=(const StatsRing&) = delete;

  unsigned long long* words() const { return words_; }

  // Forget all records, as the operations are numbered anew. No operation may run.
  void clear();

  // The records of the operations that have ended, as `decode_stats` gives them; `header` is the
  // rank's. Copies on a stream of its own: neither waits for the device's operations nor holds them
  // up.
  std::vector<uint64_t> read(const char* header);

 private:
  size_t count() const { return size_t(kStatsRing) * stats_words(num_ranks_); }
  size_t bytes() const { return count() * sizeof(uint64_t); }
  void copy(void* to, const void* from, size_t bytes) const;

  int num_ranks_;
  unsigned long long* words_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

}  // namespace jax_ep
