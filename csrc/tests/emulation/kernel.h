// SPDX-License-Identifier: Apache-2.0
// The words of device/kernel.cuh on the host: a kernel goes to the machine. The stream's address is
// the number of a stream.
#pragma once
#include <tuple>

#include "cuda.h"

namespace jax_ep {

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), const dim3& blocks, int threads, size_t shared,
                          cudaStream_t stream, const Args&... args) {
  const int number = static_cast<int>(reinterpret_cast<uintptr_t>(stream));
  emulation::Machine::here().launch(
      number, "stream " + std::to_string(number), static_cast<int>(blocks.x), threads, shared,
      [kernel, all = std::tuple<Args...>(args...)] { std::apply(kernel, all); });
  return cudaSuccess;
}

inline char* dynamic_shared() { return emulation::dynamic_shared(); }

template <typename... Params>
cudaError_t allow_dynamic_shared(void (*)(Params...), size_t) {
  return cudaSuccess;
}

// What the tests say.
inline int shared_of_launches = 0;
inline cudaError_t most_dynamic_shared(int* bytes) {
  *bytes = shared_of_launches;
  return cudaSuccess;
}

}  // namespace jax_ep
