// SPDX-License-Identifier: Apache-2.0
// The words of CUDA C++ that the kernels use, for a host compiler. Types and conversions of FP8,
// bf16 and f16 are CUDA's own headers, which have them for the host.
#pragma once
#include <cuda_runtime.h>
// They define what follows for device code only.
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __noinline__
#undef __shared__
#define __shared__ static thread_local  // a block is a thread of the operating system
#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(v); }

inline float __uint_as_float(unsigned v) {
  float f;
  std::memcpy(&f, &v, sizeof f);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned v;
  std::memcpy(&v, &f, sizeof v);
  return v;
}
// The compiler must not contract: -ffp-contract=off.
// A NaN that is computed has no sign and is all ones but for that.
inline float computed(float f) { return f == f ? f : __uint_as_float(0x7fffffffu); }
inline float __fmul_rn(float a, float b) { return computed(a * b); }
inline float __fadd_rn(float a, float b) { return computed(a + b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return max(a >> 16, b >> 16) << 16 | max(a & 0xffffu, b & 0xffffu);
}
inline unsigned __vminu2(unsigned a, unsigned b) {
  return min(a >> 16, b >> 16) << 16 | min(a & 0xffffu, b & 0xffffu);
}

// Warps: all lanes take part.
template <typename V>
V from_lane(V mine, int lane) {
  static_assert(sizeof(V) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &mine, sizeof mine);
  word = emulation::exchange_in_warp(word)[lane];
  std::memcpy(&mine, &word, sizeof mine);
  return mine;
}
inline void __syncwarp() { emulation::exchange_in_warp(0); }
template <typename V>
V __shfl_sync(unsigned, V mine, int lane) {
  return from_lane(mine, lane % 32);
}
template <typename V>
V __shfl_xor_sync(unsigned, V mine, int mask) {
  return from_lane(mine, (threadIdx.x % 32) ^ mask);
}
template <typename V>
V __shfl_up_sync(unsigned, V mine, int delta) {
  const int lane = threadIdx.x % 32;
  return from_lane(mine, lane >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  const uint64_t* all = emulation::exchange_in_warp(mine);
  unsigned set = 0;
  for (int i = 0; i < 32; ++i) set |= unsigned(all[i] != 0) << i;
  return set;
}
inline bool __any_sync(unsigned mask, bool mine) { return __ballot_sync(mask, mine) != 0; }
inline bool __all_sync(unsigned mask, bool mine) { return __ballot_sync(mask, mine) == ~0u; }
inline int __reduce_min_sync(unsigned, int mine) {
  const uint64_t* all = emulation::exchange_in_warp(static_cast<uint32_t>(mine));
  for (int i = 0; i < 32; ++i) mine = min(mine, static_cast<int>(static_cast<uint32_t>(all[i])));
  return mine;
}
inline int __reduce_add_sync(unsigned, int mine) {
  const uint64_t* all = emulation::exchange_in_warp(static_cast<uint32_t>(mine));
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<int>(static_cast<uint32_t>(all[i]));
  return sum;
}
inline unsigned __reduce_or_sync(unsigned, unsigned mine) {
  const uint64_t* all = emulation::exchange_in_warp(mine);
  for (int i = 0; i < 32; ++i) mine |= static_cast<uint32_t>(all[i]);
  return mine;
}

// Blocks.
inline void __syncthreads() { emulation::count_in_block(false); }
inline int __syncthreads_or(bool mine) { return emulation::count_in_block(mine) > 0; }
inline int __syncthreads_and(bool mine) { return emulation::count_in_block(!mine) == 0; }

inline void __threadfence_system() {}
inline void __threadfence() {}

template <typename V>
V atomicAdd(V* p, V v) {
  const V old = *p;
  *p = old + v;
  return old;
}
template <typename V>
V atomicMax(V* p, V v) {
  const V old = *p;
  *p = old < v ? v : old;
  return old;
}
inline unsigned long long atomicExch(unsigned long long* p, unsigned long long v) {
  const unsigned long long old = *p;
  *p = v;
  return old;
}
inline unsigned atomicOr(unsigned* p, unsigned v) {
  const unsigned old = *p;
  *p = old | v;
  return old;
}
