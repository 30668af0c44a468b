// SPDX-License-Identifier: Apache-2.0
// The words of device/ptx.cuh for shared memory on the host: addresses, barriers, copies into it.
// A copy is there late, and in any order with others: when a number of looks at barriers have been
// taken. Some read what they copy when they begin, some when they end; alike for what they write.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda.h"

namespace jax_ep {

// An address: how far it is from something that is the block's own, or into what its launch sizes.
constexpr uint32_t kDynamic = 1u << 31, kOwn = 1u << 30;
inline char* shared_origin() {
  static thread_local char origin;
  return &origin;
}
inline uint32_t dynamic_shared_bytes() {
  return static_cast<uint32_t>(emulation::dynamic_shared_size());
}
inline uint32_t shared_address(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  const auto dynamic = reinterpret_cast<uintptr_t>(emulation::dynamic_shared());
  if (at - dynamic < dynamic_shared_bytes()) return kDynamic + static_cast<uint32_t>(at - dynamic);
  return kOwn + static_cast<uint32_t>(at - reinterpret_cast<uintptr_t>(shared_origin()));
}
inline char* at_shared(uint32_t address) {
  if (address >= kDynamic) return emulation::dynamic_shared() + (address - kDynamic);
  return shared_origin() + static_cast<int32_t>(address - kOwn);
}

template <typename V>
V load_shared(uint32_t address) {
  V v;
  std::memcpy(&v, at_shared(address), sizeof v);
  return v;
}

// A phase ends with the last arrival and the last byte that has been announced.
struct PhaseBarrier {
  uint8_t arrivals, missing;
  uint16_t phases;  // that are complete
  uint32_t bytes;   // that are missing
};
inline PhaseBarrier& barrier_at(uint32_t address) {
  return *reinterpret_cast<PhaseBarrier*>(at_shared(address));
}
inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  const auto n = static_cast<uint8_t>(arrivals);
  barrier_at(barrier) = {n, n, 0, 0};
}
inline void end_phase(PhaseBarrier& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  b.missing = b.arrivals;
  ++b.phases;
}
inline void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  PhaseBarrier& b = barrier_at(barrier);
  --b.missing;
  b.bytes += bytes;
  end_phase(b);
}
inline void arrive(uint32_t barrier) { arrive_and_expect(barrier, 0); }

// On its way. Without a barrier: of `thread`, whose arrival is a copy of nothing, behind all others
// that it has begun before.
struct Copy {
  uint64_t due;  // the look
  uint32_t to;
  const char* from;
  uint32_t bytes, barrier;
  unsigned thread;
  std::vector<char> read;  // unless it reads when it ends
};
constexpr uint32_t kNoBarrier = 0;

struct Copies {  // of a block
  std::vector<Copy> on_the_way;
  uint64_t looks = 0;
  int late = 0;  // bits of the number of looks that the next ones take, at most

  static Copies& here() {
    static thread_local Copies copies;
    return copies;
  }

  void begin(uint32_t to, const void* global, uint32_t bytes, uint32_t barrier) {
    emulation::Machine& machine = emulation::Machine::here();
    const auto* from = static_cast<const char*>(global);
    expect_fits(to, from, bytes);
    if (machine.chance(0.02)) late = machine.below(11);
    Copy copy{looks + machine.below(1 << late), to, from, bytes, barrier, threadIdx.x, {}};
    if (machine.chance(0.5)) copy.read.assign(from, from + bytes);
    if (machine.chance(0.5)) std::memcpy(at_shared(to), from, bytes);
    on_the_way.push_back(std::move(copy));
  }
  // When all is there that this thread has begun to copy.
  void arrive_later(uint32_t barrier) {
    uint64_t due = looks;
    for (const Copy& copy : on_the_way) {
      if (copy.thread == threadIdx.x) due = std::max(due, copy.due);
    }
    on_the_way.push_back({due, 0, nullptr, 0, barrier, threadIdx.x, {}});
  }

  void look() {
    ++looks;
    for (size_t i = 0; i < on_the_way.size();) {
      if (on_the_way[i].due > looks) {
        ++i;
        continue;
      }
      end(on_the_way[i]);
      on_the_way.erase(on_the_way.begin() + i);
    }
  }

 private:
  static void end(const Copy& copy) {
    if (copy.bytes > 0) {
      std::memcpy(at_shared(copy.to), copy.read.empty() ? copy.from : copy.read.data(), copy.bytes);
    }
    if (copy.barrier == kNoBarrier) return;
    if (copy.bytes == 0) return arrive(copy.barrier);
    PhaseBarrier& b = barrier_at(copy.barrier);
    b.bytes -= copy.bytes;
    end_phase(b);
  }
  static void expect_fits(uint32_t to, const char* from, uint32_t bytes) {
    const bool aligned = (to | bytes | reinterpret_cast<uintptr_t>(from)) % 16 == 0;
    if (aligned && to >= kDynamic && to - kDynamic + bytes <= dynamic_shared_bytes()) return;
    std::printf("a copy of %u bytes from %p to %x of %u bytes: expected multiples of 16, inside\n",
                bytes, static_cast<const void*>(from), to - kDynamic, dynamic_shared_bytes());
    std::fflush(stdout);
    std::_Exit(5);
  }
};

inline bool is_complete(uint32_t barrier, uint32_t parity) {
  Copies::here().look();
  if (barrier_at(barrier).phases % 2 != parity) return true;
  emulation::pause(false);  // the block's other warps go on
  return false;
}
inline bool is_complete_soon(uint32_t barrier, uint32_t parity) {
  return is_complete(barrier, parity);
}

#ifdef JAX_EP_EMULATION_OF_LANES  // copies as before Hopper
constexpr bool kBulkCopies = false;
#else
constexpr bool kBulkCopies = true;
#endif

inline void copy_bulk(uint32_t to, const void* global, uint32_t bytes, uint32_t barrier) {
  Copies::here().begin(to, global, bytes, barrier);
}
inline void copy_async(uint32_t to, const void* global) {
  Copies::here().begin(to, global, 16, kNoBarrier);
}
inline void arrive_when_copied(uint32_t barrier) { Copies::here().arrive_later(barrier); }
inline void fence_shared_for_bulk_copies() {}

}  // namespace jax_ep
