// SPDX-License-Identifier: Apache-2.0
// How many SMs an operation takes when the caller does not say: enough to keep up with the memory,
// or with the link where that is slower, and no more, so that other kernels find room. Host
// arithmetic on what the GPU says of itself; results do not depend on it.
#pragma once
#include <algorithm>
#include <cmath>

namespace jax_ep {

// What a GPU says of itself, in GB/s; 0: it does not say.
struct Speeds {
  int sms = 1;
  double memory_gbs = 0;
  double link_gbs = 0;  // to all peers together, one direction
};

// What an operation does for each token of a rank under uniform routing. Without `sm_us` nothing is
// known.
struct Demand {
  double memory_bytes = 0;
  double link_bytes = 0;
  double sm_us = 0;  // how long it takes one SM by itself
};

// Measured with 24 SMs, where SMs bind and not the memory: docs/performance.md, "SMs". What one SM
// moves through memory in GB/s, and what it takes it besides to form one sum of combine, a token's
// on one rank, in us.
constexpr double kDispatchGbsPerSm = 67, kCombineGbsPerSm = 200, kCombineUsPerSum = 0.85;

// More SMs than exactly keep up: near that point neither SMs nor the memory are always busy.
constexpr double kSpareSms = 1.25;

// Ranks other than its own that a token is sent to.
inline double copies_of_a_token(int num_ranks, int top_k) {
  return (num_ranks - 1) * (1 - std::pow(1 - 1.0 / num_ranks, top_k));
}

// A token is read for the peers and for the own rank, arrivals are read, a row is written for each
// pair.
inline Demand dispatch_demand(int num_ranks, int top_k, double row_bytes) {
  const double copies = copies_of_a_token(num_ranks, top_k);
  const double bytes = ((num_ranks > 1 ? 2 : 1) + copies + top_k) * row_bytes;
  return {bytes, copies * row_bytes, bytes / (1e3 * kDispatchGbsPerSm)};
}

// A row is read for each pair, partials of other ranks are written and read, the sum is written.
inline Demand combine_demand(int num_ranks, int top_k, double row_bytes) {
  const double copies = copies_of_a_token(num_ranks, top_k);
  const double bytes = (top_k + 2 * copies + 1) * row_bytes;
  return {bytes, copies * row_bytes,
          (1 + copies) * kCombineUsPerSum + bytes / (1e3 * kCombineGbsPerSm)};
}

// Two kernels that both wait for other GPUs, on two streams: were they to want more than all SMs,
// each could hold, on one GPU, what the other waits for on another one. So an operation leaves SMs
// to a collective of someone else, unless the caller says how many it is to take. NCCL, unless told
// otherwise, takes some 32 blocks at most.
constexpr int kLeftToOthers = 32;

// At most, of the SMs that a rank may have.
inline int leaving_room(int sms) { return sms - std::min(kLeftToOthers, sms / 4); }

// As many as leave room where something is not known.
inline int default_sms(const Speeds& gpu, const Demand& of) {
  const int most = leaving_room(gpu.sms);
  if (of.sm_us <= 0 || of.memory_bytes <= 0 || gpu.memory_gbs <= 0) return most;
  double us = of.memory_bytes / (1e3 * gpu.memory_gbs);  // where memory or link is at its limit
  if (gpu.link_gbs > 0) us = std::max(us, of.link_bytes / (1e3 * gpu.link_gbs));
  return std::clamp(static_cast<int>(std::ceil(kSpareSms * of.sm_us / us)), 1, most);
}

}  // namespace jax_ep
