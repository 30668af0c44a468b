// SPDX-License-Identifier: Apache-2.0
// A put to memory that this GPU addresses: stores by all threads of a block, or of a warp.
#pragma once
#include "../device/ptx.cuh"
#include "../device/warp.cuh"

namespace jax_ep {

constexpr int kCopyVecs = 4;      // of a thread in flight: 32 KiB of 512 threads
constexpr int kWarpCopyVecs = 8;  // 4 KiB of a warp

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
__device__ inline void copy_by_block(char* to, const char* from, size_t first, size_t last) {
  copy_vecs<kCopyVecs>(to, from, static_cast<int>(first / sizeof(Vec)),
                       static_cast<int>(last / sizeof(Vec)), threadIdx.x, blockDim.x);
  if (threadIdx.x == 0 && last % sizeof(Vec) != 0) {
    const size_t i = last / sizeof(uint64_t) - 1;
    store_relaxed(reinterpret_cast<uint64_t*>(to) + i,
                  load_relaxed(reinterpret_cast<const uint64_t*>(from) + i));
  }
}

// The same by a warp, of whole Vecs.
__device__ inline void copy_by_warp(char* to, const char* from, size_t first, size_t last) {
  copy_vecs<kWarpCopyVecs>(to, from, static_cast<int>(first / sizeof(Vec)),
                           static_cast<int>(last / sizeof(Vec)), lane_id(), 32);
}

}  // namespace jax_ep
