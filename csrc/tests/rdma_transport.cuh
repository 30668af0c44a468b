// SPDX-License-Identifier: Apache-2.0
// The kernels' transport over plain addresses of all arenas, for tests on GPUs that reach each
// other. `adverse`: puts start late, go in two halves in either order, and their signals come late
// again; so does every other signal. What a put reads after it has returned, the emulation shows.
#pragma once
#include "../rdma/block_copy.cuh"
#include "../rdma/transport.cuh"

namespace jax_ep {

struct PeerTransport {
  char* arena[kMaxRanks];
  uint32_t adverse;  // 0, or a seed

  __device__ void put_signal(const Team& team, int rank, uint64_t to, const char* from,
                             size_t bytes, uint64_t signal, uint64_t value) const {
    put_torn(rank, bytes, value, [&](size_t first, size_t last) {
      copy_by_team(team, arena[rank] + to, from, first, last);
    });
    team.sync();  // the team's stores before the signal
    if (team.thread == 0) this->signal(rank, signal, value);
  }
  __device__ void put_signal_by_warp(int rank, uint64_t to, const char* from, size_t bytes,
                                     uint64_t signal, uint64_t value) const {
    put_torn(rank, bytes, value,
             [&](size_t first, size_t last) { copy_by_warp(arena[rank] + to, from, first, last); });
    __syncwarp();  // the warp's stores before the signal
    if (lane_id() == 0) this->signal(rank, signal, value);
  }
  __device__ void signal(int rank, uint64_t at, uint64_t value) const {
    delay(dice(static_cast<uint32_t>(value >> 24) * 37 + rank));
    store_release_sys(reinterpret_cast<uint64_t*>(arena[rank] + at), value);
  }
  __device__ void receive(const uint64_t*) const {}

 private:
  // `copy(first, last)` in two halves.
  template <typename Copy>
  __device__ void put_torn(int rank, size_t bytes, uint64_t value, Copy&& copy) const {
    const uint32_t luck = dice(static_cast<uint32_t>(value >> 24) * 31 + rank);
    const size_t half = bytes / 32 * 16;
    const bool in_order = (luck & 1) != 0;
    delay(luck);
    copy(in_order ? 0 : half, in_order ? half : bytes);
    delay(luck >> 8);
    copy(in_order ? half : 0, in_order ? bytes : half);
  }
  __device__ uint32_t dice(uint32_t n) const {
    uint32_t v = (n + adverse) * 0x9e3779b1u;
    v ^= v >> 15;
    return v * 0x85ebca6bu;
  }
  __device__ void delay(uint32_t luck) const {
    if (adverse != 0 && luck % 4 == 0) __nanosleep(luck % 16384);
  }
};

}  // namespace jax_ep
