// SPDX-License-Identifier: Apache-2.0
// The transport over NVSHMEM, whose headers come first: those of point-to-point operations.
#pragma once
#include "launch.h"
#include "transport.cuh"

namespace jax_ep {

struct Nvshmem {
  char* arena;  // my control block, in NVSHMEM's heap: an address there names every rank's
  RankElements of;

  __device__ void put_signal(int rank, uint64_t to, const char* from, size_t bytes, uint64_t signal,
                             uint64_t value) const {
    // What the block has written before the barrier, for a NIC that the host tells of the put.
    if (threadIdx.x == 0) __threadfence_system();
    nvshmemx_putmem_signal_nbi_block(arena + to, from, bytes, word(signal), value,
                                     NVSHMEM_SIGNAL_SET, of.element[rank]);
  }
  __device__ void signal(int rank, uint64_t at, uint64_t value) const {
    __threadfence_system();
    nvshmemx_signal_op(word(at), value, NVSHMEM_SIGNAL_SET, of.element[rank]);
  }
  // The value is there, so this does not wait: it is how NVSHMEM makes data that a NIC has written
  // before it visible, where loads alone do not.
  __device__ void receive(const uint64_t* at, uint64_t value) const {
    nvshmem_signal_wait_until(const_cast<uint64_t*>(at), NVSHMEM_CMP_EQ, value);
  }

 private:
  __device__ uint64_t* word(uint64_t offset) const {
    return reinterpret_cast<uint64_t*>(arena + offset);
  }
};

}  // namespace jax_ep
