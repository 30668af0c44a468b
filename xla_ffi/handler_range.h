// SPDX-License-Identifier: Apache-2.0
// The time that a handler takes, as profilers show it: an NVTX range in the domain "jax_ep", where
// the toolkit has NVTX. Without a profiler it is a test of one pointer.
#pragma once
#if __has_include(<nvtx3/nvtx3.hpp>)
#include <nvtx3/nvtx3.hpp>

namespace jax_ep {

struct NvtxDomain {
  static constexpr char const* name{"jax_ep"};
};
using HandlerRange = nvtx3::scoped_range_in<NvtxDomain>;

}  // namespace jax_ep
#else
namespace jax_ep {

struct HandlerRange {
  explicit HandlerRange(const char*) {}
};

}  // namespace jax_ep
#endif
