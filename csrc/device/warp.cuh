// SPDX-License-Identifier: Apache-2.0
// Words for the 32 lanes of a warp; how many warps a block has that takes a whole SM.
#pragma once
#include <cuda_runtime.h>

namespace jax_ep {

constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef JAX_EP_EMULATION  // as many as it says: each thread costs a stack
constexpr int kFullBlock = JAX_EP_EMULATION;
#else
constexpr int kFullBlock = 1024;
#endif

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

// `v`, by all lanes: kept in a register, where the compiler would rather compute it at each use.
__device__ __forceinline__ int computed_once(int v) { return __shfl_sync(kAllLanes, v, lane_id()); }

// The pointer that `lane` holds.
template <typename P>
__device__ __forceinline__ P* of_lane(P* p, int lane) {
  return reinterpret_cast<P*>(
      __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(p), lane));
}

__device__ __forceinline__ int warp_sum(int v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

__device__ __forceinline__ int warp_max(int v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v = max(v, __shfl_xor_sync(kAllLanes, v, d));
  return v;
}

// The lanes whose value has the same low `kBits` bits as mine: match.any by ballots, whose number
// does not depend on how many values differ.
template <int kBits>
__device__ __forceinline__ unsigned lanes_with(int value) {
  unsigned same = kAllLanes;
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    const bool set = value >> bit & 1;
    const unsigned with = __ballot_sync(kAllLanes, set);
    same &= set ? with : ~with;
  }
  return same;
}

// Sum over the lanes before this one; `total` receives the sum over all.
__device__ __forceinline__ int warp_prefix(int v, int* total) {
  int sum = v;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, d);
    if (lane_id() >= d) sum += other;
  }
  *total = __shfl_sync(kAllLanes, sum, 31);
  return sum - v;
}

}  // namespace jax_ep
