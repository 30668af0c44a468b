// SPDX-License-Identifier: Apache-2.0
// A put to memory that this GPU addresses: stores by the warps of a team, or by one warp.
#pragma once
#include "../device/ptx.cuh"
#include "../device/warp.cuh"

namespace jax_ep {

constexpr int kCopyVecs = 8;  // of a thread in flight: 4 KiB of a warp

// Some warps of a block that do one thing together, or all of them.
struct Team {
  int thread;  // my place in it
  int threads;
  int barrier;  // its number: 0 is the block's own

  __device__ static Team whole_block() { return {int(threadIdx.x), int(blockDim.x), 0}; }
  // Teams of `threads` threads each, as many as the block has.
  __device__ static Team of(int threads) {
    return {int(threadIdx.x) % threads, threads, 1 + int(threadIdx.x) / threads};
  }
  __device__ void sync() const {
    __syncwarp();
    bar_sync(barrier, threads);
  }
  // Whether all say so.
  __device__ bool all(bool mine) const {
    __syncwarp();
    return bar_and(barrier, threads, mine);
  }
};

// Vecs [first, last) of `from`, which blocks of this GPU have written, to the same of `to`, by
// thread number `thread` of `step`.
template <int kVecs>
__device__ __forceinline__ void copy_vecs(char* to, const char* from, int first, int last,
                                          int thread, int step) {
  const auto* source = reinterpret_cast<const Vec*>(from);
  auto* target = reinterpret_cast<Vec*>(to);
#pragma unroll 1
  for (int i = first + thread; i < last; i += kVecs * step) {
    Vec v[kVecs];
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      if (i + j * step < last) v[j] = load_arrived(source + i + j * step);
    }
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      if (i + j * step < last) store_row(target + i + j * step, v[j]);
    }
  }
}

// Bytes [first, last); both are multiples of 16, but `last` may be one of 8.
__device__ inline void copy_by_team(const Team& team, char* to, const char* from, size_t first,
                                    size_t last) {
  copy_vecs<kCopyVecs>(to, from, static_cast<int>(first / sizeof(Vec)),
                       static_cast<int>(last / sizeof(Vec)), team.thread, team.threads);
  if (team.thread == 0 && last % sizeof(Vec) != 0) {
    const size_t i = last / sizeof(uint64_t) - 1;
    store_relaxed(reinterpret_cast<uint64_t*>(to) + i,
                  load_relaxed(reinterpret_cast<const uint64_t*>(from) + i));
  }
}

// The same by a warp, of whole Vecs.
__device__ inline void copy_by_warp(char* to, const char* from, size_t first, size_t last) {
  copy_vecs<kCopyVecs>(to, from, static_cast<int>(first / sizeof(Vec)),
                       static_cast<int>(last / sizeof(Vec)), lane_id(), 32);
}

}  // namespace jax_ep
