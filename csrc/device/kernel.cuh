// SPDX-License-Identifier: Apache-2.0
// How a kernel is launched, and the shared memory that its launch sizes.
#pragma once
#ifdef JAX_EP_EMULATION
#include "../tests/emulation/kernel.h"
#else
#include <cuda_runtime.h>

namespace jax_ep {

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), const dim3& blocks, int threads, size_t shared,
                          cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t how{};
  how.gridDim = blocks;
  how.blockDim = dim3(threads);
  how.dynamicSmemBytes = shared;
  how.stream = stream;
  return cudaLaunchKernelEx(&how, kernel, args...);
}

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char base[];
  return base;
}

// Before a launch with `bytes` of dynamic shared memory. Kernels have 18 KiB of static memory at
// most, and 48 in all need no leave.
template <typename... Params>
cudaError_t allow_dynamic_shared(void (*kernel)(Params...), size_t bytes) {
  if (bytes <= 24 * 1024) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  return error == cudaSuccess ? error : cudaGetLastError();
}

// What a launch may have on the current device.
inline cudaError_t most_dynamic_shared(int* bytes) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

}  // namespace jax_ep
#endif
