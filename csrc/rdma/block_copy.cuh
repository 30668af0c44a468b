// SPDX-License-Identifier: Apache-2.0
// A put to memory that this GPU addresses: stores by all threads of a block.
#pragma once
#include "../device/ptx.cuh"

namespace jax_ep {

constexpr int kCopyVecs = 4;  // of a thread in flight: 32 KiB of 512 threads

// Bytes [first, last) of `from`, which blocks of this GPU have written, to the same of `to`; both
// are multiples of 16, but `last` may be one of 8.
__device__ inline void copy_by_block(char* to, const char* from, size_t first, size_t last) {
  const auto* source = reinterpret_cast<const Vec*>(from);
  auto* target = reinterpret_cast<Vec*>(to);
  const int end = static_cast<int>(last / sizeof(Vec)), step = blockDim.x;
#pragma unroll 1
  for (int i = static_cast<int>(first / sizeof(Vec)) + threadIdx.x; i < end;
       i += kCopyVecs * step) {
    Vec v[kCopyVecs];
#pragma unroll
    for (int j = 0; j < kCopyVecs; ++j) {
      if (i + j * step < end) v[j] = load_arrived(source + i + j * step);
    }
#pragma unroll
    for (int j = 0; j < kCopyVecs; ++j) {
      if (i + j * step < end) store_row(target + i + j * step, v[j]);
    }
  }
  if (threadIdx.x == 0 && last % sizeof(Vec) != 0) {
    const size_t i = last / sizeof(uint64_t) - 1;
    store_relaxed(reinterpret_cast<uint64_t*>(to) + i,
                  load_relaxed(reinterpret_cast<const uint64_t*>(from) + i));
  }
}

}  // namespace jax_ep
