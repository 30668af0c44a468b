// SPDX-License-Identifier: Apache-2.0
#include "stats_ring.h"

#include "group.h"  // require

namespace jax_ep {

StatsRing::StatsRing(int device, int num_ranks) : num_ranks_(num_ranks) {
  int before = 0;
  require(cudaGetDevice(&before), "cudaGetDevice");
  require(cudaSetDevice(device), "cudaSetDevice");
  require(cudaMalloc(&words_, bytes()), "cudaMalloc of timings");
  require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  require(cudaSetDevice(before), "cudaSetDevice");
  clear();
}

void StatsRing::clear() {
  const std::vector<uint64_t> none(count());
  copy(words_, none.data(), bytes());
}

std::vector<uint64_t> StatsRing::read(const char* header) {
  Header was{};
  copy(&was, header, sizeof was);
  // Blocks of a small batch may still run when its epoch is complete.
  const uint64_t newest = was.slot_left >= was.slot_blocks ? was.epoch : was.epoch - 1;
  std::vector<uint64_t> ring(count());
  copy(ring.data(), words_, bytes());
  return decode_stats(ring, num_ranks_, newest);
}

// On any device: a copy, unlike a kernel, may go to a stream of another one than the current.
void StatsRing::copy(void* to, const void* from, size_t bytes) const {
  require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "cudaMemcpy of timings");
  require(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

}  // namespace jax_ep
