// SPDX-License-Identifier: Apache-2.0
// Stamps of the running operation, where its rank records timings (layout/stats.h): elsewhere
// `Call::stats` is null, a branch that all threads take alike. What is behind it is out of line, so
// that the kernels' loops and registers stay as they are without it.
#pragma once
#include "../kernels/launch.h"
#include "ptx.cuh"

namespace jax_ep {

// What `Op::read_header` has read; one of each block, in shared memory of a function, so that this
// header may hold it.
__device__ inline uint64_t* header_words() {
  alignas(128) __shared__ uint64_t words[32];
  return words;
}

constexpr int kBeganAtWord = 28;  // of them, in block 0: when it began

__device__ inline uint64_t number_of_operation() {
  return reinterpret_cast<const Header*>(header_words())->epoch + 1;
}

__device__ inline unsigned long long* stamp_of(const Call& call, Stamp stamp, int rank = 0) {
  const uint64_t record = number_of_operation() % kStatsRing;
  return call.stats + record * stats_words(call.peers.num_ranks) + static_cast<int>(stamp) + rank;
}

__device__ __noinline__ inline void store_stamp(const Call& call, Stamp what) {
  *stamp_of(call, what) = now_ns();
}
__device__ __noinline__ inline void store_begin(const Call& call) {
  *stamp_of(call, Stamp::kBegin) = header_words()[kBeganAtWord];
  *stamp_of(call, Stamp::kOperation) = static_cast<uint32_t>(call.operation);
  *stamp_of(call, Stamp::kNumber) = number_of_operation();
}

// By one thread; of several, the last to store counts.
__device__ __forceinline__ void stamp(const Call& call, Stamp what) {
  if (call.stats != nullptr) store_stamp(call, what);
}
// By one thread of block 0, when it leaves.
__device__ __forceinline__ void stamp_begin(const Call& call) {
  if (call.stats != nullptr) store_begin(call);
}

// A wait for `rank`, which began at `start`, is over. By functions that only wait.
__device__ inline void note_wait(const Call& call, int rank, uint64_t start) {
  if (call.stats == nullptr) return;
  const uint64_t waited = pack_wait(number_of_operation(), now_ns() - start);
  atomicMax(stamp_of(call, Stamp::kWaits, rank), static_cast<unsigned long long>(waited));
}

}  // namespace jax_ep
