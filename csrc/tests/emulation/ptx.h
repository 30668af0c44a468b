// SPDX-License-Identifier: Apache-2.0
// The words of device/ptx.cuh on the host. Ordered accesses are where others may run: each of them
// pauses now and then. Stores and atomics may be to a window of weak_memory.h. The words of shared
// memory are in shared.h.
#pragma once
#include <type_traits>

#include "cuda.h"
#include "shared.h"
#include "weak_memory.h"

namespace jax_ep {

// Every few ordered accesses of whoever runs, others go on in between.
inline void others_may_run() {
  static thread_local unsigned accesses = 0;
  if (++accesses % 7 == 0) emulation::pause(false);
}

// Whether the store was to a window, and has been taken.
template <typename V>
bool store_in_window(V* p, const V& v, bool releases = false) {
  emulation::WeakMemory* memory = emulation::weak_memory;
  return memory != nullptr && memory->store(p, &v, sizeof v, releases);
}
template <typename V>
V* at_home(V* p) {
  emulation::WeakMemory* memory = emulation::weak_memory;
  return memory == nullptr ? p : static_cast<V*>(memory->home_of(p));
}

// Among the blocks of a rank.
inline void release(const void* p) {
  if (emulation::weak_memory != nullptr) emulation::weak_memory->release(p);
}
inline void acquire(const void* p) {
  if (emulation::weak_memory != nullptr) emulation::weak_memory->acquire(p);
}

template <typename V>
void ordered_store(V* p, const V& v, bool releases = false) {
  others_may_run();
  if (!store_in_window(p, v, releases)) std::memcpy(p, &v, sizeof v);
}
template <typename V>
V ordered_load(const V* p) {
  others_may_run();
  V v;
  std::memcpy(&v, at_home(const_cast<V*>(p)), sizeof v);
  if (emulation::weak_memory != nullptr) emulation::weak_memory->look(p, sizeof v);
  return v;
}

inline void store_release_sys(uint64_t* p, uint64_t v) { ordered_store(p, v, true); }
inline void store_release_gpu(uint64_t* p, uint64_t v) {
  ordered_store(p, v);
  release(p);
}
template <typename V>
void store_relaxed(V* p, const std::common_type_t<V>& v) {
  ordered_store(p, v);
}
inline uint64_t load_acquire_sys(const uint64_t* p) { return ordered_load(p); }
template <typename V>
V load_acquire_gpu(const V* p) {
  const V v = ordered_load(p);
  acquire(p);
  return v;
}
template <typename V>
V load_relaxed(const V* p) {
  return ordered_load(p);
}

inline uint32_t add_relaxed_gpu(uint32_t* p, uint32_t v) {
  others_may_run();
  return atomicAdd(p, v);
}
inline uint32_t add_acq_rel_gpu(uint32_t* p, uint32_t v) {
  const uint32_t old = add_relaxed_gpu(p, v);
  release(p);
  acquire(p);
  return old;
}
inline uint64_t cas_acq_rel_sys(uint64_t* p, uint64_t expected, uint64_t v) {
  others_may_run();
  p = at_home(p);
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
inline void store_row(Vec* p, const Vec& v) {
  if (!store_in_window(p, v)) *p = v;
}

inline void add_release_gpu(uint64_t* p, uint64_t v) {
  others_may_run();
  *p += v;
  release(p);
}
inline void fence_global_for_bulk_copies() {}
inline void keep_branch() {}

inline void bar_sync(int id, int threads) { emulation::meet_in_block(id, threads, true, true); }
inline void bar_arrive(int id, int threads) { emulation::meet_in_block(id, threads, true, false); }
inline bool bar_and(int id, int threads, bool mine) {
  return emulation::meet_in_block(id, threads, mine, true);
}

}  // namespace jax_ep
