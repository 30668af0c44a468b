// SPDX-License-Identifier: Apache-2.0
// Time of operations in a row on all ranks, replayed as CUDA graphs and taken on the device.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "replay.h"

namespace jax_ep {

constexpr int kReplays = 40, kFirstReplays = 5;  // the first do not count

// Of one operation on the slowest rank, over replays.
struct Times {
  double median_us, max_us;
};

// `issue(r)` puts one operation of rank r, on `devices[r]`, on its stream; a graph has `operations`
// of them. `wait()` returns when all streams are done.
template <typename Issue, typename Wait>
Times time_replays(const std::vector<int>& devices, const std::vector<cudaStream_t>& streams,
                   int operations, Issue&& issue, Wait&& wait) {
  const int R = static_cast<int>(streams.size());
  std::vector<std::unique_ptr<Replay>> graphs;
  std::vector<std::vector<cudaEvent_t>> events(R);  // before and after each replay
  for (int r = 0; r < R; ++r) {
    require(cudaSetDevice(devices[r]), "cudaSetDevice");
    graphs.push_back(std::make_unique<Replay>(streams[r], [&] {
      for (int i = 0; i < operations; ++i) issue(r);
    }));
    events[r].resize(2 * kReplays);
    for (cudaEvent_t& event : events[r]) require(cudaEventCreate(&event), "cudaEventCreate");
  }
  for (int i = 0; i < kReplays; ++i) {
    for (int r = 0; r < R; ++r) {
      require(cudaSetDevice(devices[r]), "cudaSetDevice");
      require(cudaEventRecord(events[r][2 * i], streams[r]), "cudaEventRecord");
      graphs[r]->launch(streams[r]);
      require(cudaEventRecord(events[r][2 * i + 1], streams[r]), "cudaEventRecord");
    }
  }
  wait();
  std::vector<double> us;
  for (int i = kFirstReplays; i < kReplays; ++i) {
    float slowest = 0;
    for (int r = 0; r < R; ++r) {
      float ms;
      require(cudaEventElapsedTime(&ms, events[r][2 * i], events[r][2 * i + 1]), "elapsed time");
      slowest = std::max(slowest, ms);
    }
    us.push_back(slowest * 1e3 / operations);
  }
  for (const auto& of_rank : events) {
    for (cudaEvent_t event : of_rank) require(cudaEventDestroy(event), "cudaEventDestroy");
  }
  std::sort(us.begin(), us.end());
  return {us[us.size() / 2], us.back()};
}

}  // namespace jax_ep
