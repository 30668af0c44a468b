// SPDX-License-Identifier: Apache-2.0
// The kernels between nodes over any transport, and how they are launched: the library's file
// compiles them over NVSHMEM, tests over peers' memory.
#pragma once
#include <algorithm>

#include "../device/kernel.cuh"
#include "combine_nodes.cuh"
#include "dispatch_nodes.cuh"
#include "exchange_routing.cuh"
#include "variants.h"

namespace jax_ep {

constexpr int kRoutingThreads = 512;
constexpr int kRoutingBlocks = kMostPieces;  // at most

template <typename Transport>
__global__ void __launch_bounds__(kRoutingThreads, 1)
    node_routing(const __grid_constant__ WithTransport<NodeRouting, Transport> p) {
  exchange_routing(p);
}

template <Wire W, typename T, typename Transport>
__global__ void __launch_bounds__(kThreads, 1)
    node_dispatch(const __grid_constant__ WithTransport<NodeDispatch, Transport> p) {
  extern __shared__ float held[];
  dispatch_between_nodes<W, T>(p, held);
}

template <typename T, typename Transport>
__global__ void __launch_bounds__(kStageThreads, 1)
    node_combine(const __grid_constant__ WithTransport<NodeCombine, Transport> p) {
  combine_between_nodes<T>(p);
}

template <typename Transport>
cudaError_t launch_routing_over(const NodeRouting& params, const Transport& transport,
                                const Launch& how) {
  const WithTransport<NodeRouting, Transport> p{params, transport};
  const int blocks = std::min(std::max(how.num_sms, 1), kRoutingBlocks);
  node_routing<<<blocks, kRoutingThreads, 0, how.stream>>>(p);
  return cudaGetLastError();
}

template <typename Transport>
cudaError_t launch_dispatch_over(const NodeDispatch& params, const Transport& transport, Element x,
                                 Wire wire, const Launch& how) {
  if (params.shape.chunk == 0) return cudaErrorInvalidValue;
  const WithTransport<NodeDispatch, Transport> p{params, transport};
  const int blocks = std::max(how.num_sms, kLeastDispatchBlocks);
  return for_dispatch_variant(x, wire, [&](auto w, auto type) {
    constexpr Wire W = decltype(w)::value;
    constexpr auto kernel = &node_dispatch<W, decltype(type), Transport>;
    const size_t scales = params.dispatch.hidden / kScaleBlock;
    const size_t shared = W == Wire::kDequantized ? kWarps * scales * sizeof(float) : 0;
    const cudaError_t error = allow_dynamic_shared(kernel, shared);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, kThreads, shared, how.stream>>>(p);
    return cudaGetLastError();
  });
}

template <typename Transport>
cudaError_t launch_combine_over(const NodeCombine& params, const Transport& transport, Element y,
                                const Launch& how) {
  if (params.shape.chunk == 0) return cudaErrorInvalidValue;
  const WithTransport<NodeCombine, Transport> p{params, transport};
  const int blocks = std::max(how.num_sms, kLeastCombineBlocks);
  return for_combine_variant(y, [&](auto type) {
    node_combine<decltype(type)><<<blocks, kStageThreads, 0, how.stream>>>(p);
    return cudaGetLastError();
  });
}

// Load every variant on the current device: lazily, the first launch would wait for running
// kernels.
template <typename Transport>
cudaError_t load_kernels_over() {
  cudaFuncAttributes attributes;
  auto load = [&](auto kernel) {
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  };
  const cudaError_t routing = load(&node_routing<Transport>);
  if (routing != cudaSuccess) return routing;
  const cudaError_t dispatch = for_each_dispatch_variant([&](auto w, auto type) {
    return load(&node_dispatch<decltype(w)::value, decltype(type), Transport>);
  });
  if (dispatch != cudaSuccess) return dispatch;
  return for_each_combine_variant(
      [&](auto type) { return load(&node_combine<decltype(type), Transport>); });
}

}  // namespace jax_ep
