// SPDX-License-Identifier: Apache-2.0
// The transport over NVSHMEM, whose headers come first: those of point-to-point operations.
#pragma once
#include "block_copy.cuh"
#include "launch.h"
#include "transport.cuh"

namespace jax_ep {

struct Nvshmem {
  char* arena;  // my control block, in NVSHMEM's heap: an address there names every rank's
  RankElements of;

  __device__ void put_signal(const Team& team, int rank, uint64_t to, const char* from,
                             size_t bytes, uint64_t signal, uint64_t value) const {
    if (char* const there = static_cast<char*>(nvshmem_ptr(arena, of.element[rank]))) {
      // NVSHMEM's own copy has fewer bytes in flight.
      copy_by_team(team, there + to, from, 0, bytes);
      team.sync();  // the team's stores before the signal, which publishes them
      if (team.thread == 0) store_release_sys(reinterpret_cast<uint64_t*>(there + signal), value);
      return;
    }
    if (team.thread >= 32) return;  // one warp is enough to tell a NIC
    // What others have written before the barrier, for a NIC that the host tells of the put.
    if (team.thread == 0) __threadfence_system();
    __syncwarp();
    nvshmemx_putmem_signal_nbi_warp(arena + to, from, bytes, word(signal), value,
                                    NVSHMEM_SIGNAL_SET, of.element[rank]);
  }
  // Out of line: NVSHMEM's code for every way there is long.
  __device__ __noinline__ void put_signal_by_warp(int rank, uint64_t to, const char* from,
                                                  size_t bytes, uint64_t signal,
                                                  uint64_t value) const {
    if (char* const there = static_cast<char*>(nvshmem_ptr(arena, of.element[rank]))) {
      copy_by_warp(there + to, from, 0, bytes);
      __syncwarp();  // the warp's stores before the signal, which publishes them
      if (lane_id() == 0) {
        store_release_sys(reinterpret_cast<uint64_t*>(there + signal), value);
      }
      return;
    }
    if (lane_id() == 0) __threadfence_system();  // as above
    nvshmemx_putmem_signal_nbi_warp(arena + to, from, bytes, word(signal), value,
                                    NVSHMEM_SIGNAL_SET, of.element[rank]);
  }
  __device__ void signal(int rank, uint64_t at, uint64_t value) const {
    __threadfence_system();
    nvshmemx_signal_op(word(at), value, NVSHMEM_SIGNAL_SET, of.element[rank]);
  }
  // Asks for any value, so this does not wait: it is how NVSHMEM makes data that a NIC has written
  // before the signal visible, where loads alone do not.
  __device__ void receive(const uint64_t* at) const {
    nvshmem_signal_wait_until(const_cast<uint64_t*>(at), NVSHMEM_CMP_GE, 0);
  }

 private:
  __device__ uint64_t* word(uint64_t offset) const {
    return reinterpret_cast<uint64_t*>(arena + offset);
  }
};

inline Nvshmem transport_of(const Call& call, const RankElements& e) {
  return {call.peers.control[call.peers.rank], e};
}

}  // namespace jax_ep
