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

// What an operation moves for each token of a rank under uniform routing, in rows, and what one SM
// moves through memory by itself, in GB/s; without the latter nothing is known.
struct Demand {
  double memory = 0;
  double link = 0;
  double gbs_per_sm = 0;
};

// Measured with 24 SMs, where SMs bind and not the memory: docs/performance.md, "SMs".
constexpr double kDispatchGbsPerSm = 67, kCombineGbsPerSm = 57;

// More SMs than exactly keep up: near that point neither SMs nor the memory are always busy.
constexpr double kSpareSms = 1.25;

// Ranks other than its own that a token is sent to.
inline double copies_of_a_token(int num_ranks, int top_k) {
  return (num_ranks - 1) * (1 - std::pow(1 - 1.0 / num_ranks, top_k));
}

// A token is read for the peers and for the own rank, arrivals are read, a row is written for each
// pair.
inline Demand dispatch_demand(int num_ranks, int top_k) {
  const double copies = copies_of_a_token(num_ranks, top_k);
  return {(num_ranks > 1 ? 2 : 1) + copies + top_k, copies, kDispatchGbsPerSm};
}

// A row is read for each pair, partials of other ranks are written and read, the sum is written.
inline Demand combine_demand(int num_ranks, int top_k) {
  const double copies = copies_of_a_token(num_ranks, top_k);
  return {top_k + 2 * copies + 1, copies, kCombineGbsPerSm};
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
  if (of.gbs_per_sm <= 0 || gpu.memory_gbs <= 0) return most;
  double gbs = gpu.memory_gbs;  // through memory, when memory or link is at its limit
  if (of.link > 0 && gpu.link_gbs > 0) gbs = std::min(gbs, gpu.link_gbs * of.memory / of.link);
  return std::clamp(static_cast<int>(std::ceil(kSpareSms * gbs / of.gbs_per_sm)), 1, most);
}

}  // namespace jax_ep
