// SPDX-License-Identifier: Apache-2.0
// The words of device/ptx.cuh on the host. Ordered accesses are where others may run: each of them
// pauses now and then. Barriers in shared memory and bulk copies are not here.
#pragma once
#include "cuda.h"

namespace jax_ep {

// Every few ordered accesses of whoever runs, others go on in between.
inline void others_may_run() {
  static thread_local unsigned accesses = 0;
  if (++accesses % 7 == 0) emulation::pause(false);
}

template <typename V>
void ordered_store(V* p, V v) {
  others_may_run();
  *reinterpret_cast<volatile V*>(p) = v;
}
template <typename V>
V ordered_load(const V* p) {
  others_may_run();
  return *reinterpret_cast<const volatile V*>(p);
}

inline void store_release_sys(uint64_t* p, uint64_t v) { ordered_store(p, v); }
inline void store_release_gpu(uint64_t* p, uint64_t v) { ordered_store(p, v); }
inline void store_relaxed(uint64_t* p, uint64_t v) { ordered_store(p, v); }
inline uint64_t load_acquire_sys(const uint64_t* p) { return ordered_load(p); }
inline uint32_t load_acquire_gpu(const uint32_t* p) { return ordered_load(p); }
inline uint64_t load_acquire_gpu(const uint64_t* p) { return ordered_load(p); }
inline uint64_t load_relaxed(const uint64_t* p) { return ordered_load(p); }

inline uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t v) {
  others_may_run();
  return atomicAdd(p, v);
}
inline uint32_t add_relaxed_gpu(uint32_t* p, uint32_t v) { return add_acq_rel_gpu(p, v); }
inline uint64_t cas_acq_rel_sys(uint64_t* p, uint64_t expected, uint64_t v) {
  others_may_run();
  const uint64_t old = *p;
  if (old == expected) *p = v;
  return old;
}

// Who asks for the time waits.
inline uint64_t now_ns() {
  emulation::pause(true);
  return emulation::now();
}

using Vec = uint4;

inline Vec load_input(const Vec* p) { return *p; }
inline Vec load_arrived(const Vec* p) { return *p; }
inline uint2 load_arrived(const uint2* p) { return *p; }
inline uint32_t load_arrived(const uint32_t* p) { return *p; }
inline void store_row(Vec* p, const Vec& v) { *p = v; }

}  // namespace jax_ep
