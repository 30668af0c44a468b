// SPDX-License-Identifier: Apache-2.0
// The kernels between nodes over any transport, and how they are launched: the library's file
// compiles them over NVSHMEM, tests over peers' memory.
#pragma once
#include <algorithm>

#include "combine_nodes.cuh"
#include "dispatch_nodes.cuh"
#include "exchange_routing.cuh"

namespace jax_ep {

constexpr int kRoutingThreads = 512;
constexpr int kRoutingBlocks = 8;  // at most

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

// Every compiled variant: rows as bytes, and two FP8 deliveries of three types; three types of y.
template <typename Visit>
cudaError_t for_dispatch_variant(Element x, Wire wire, Visit&& visit) {
  constexpr std::integral_constant<Wire, Wire::kCopy> copy;
  constexpr std::integral_constant<Wire, Wire::kQuantized> quantized;
  constexpr std::integral_constant<Wire, Wire::kDequantized> dequantized;
  if (wire == Wire::kCopy) return visit(copy, float{});
  auto by_wire = [&](auto type) {
    return wire == Wire::kQuantized ? visit(quantized, type) : visit(dequantized, type);
  };
  if (x == Element::kBf16) return by_wire(__nv_bfloat16{});
  if (x == Element::kF16) return by_wire(__half{});
  return x == Element::kF32 ? by_wire(float{}) : cudaErrorInvalidValue;
}
template <typename Visit>
cudaError_t for_combine_variant(Element y, Visit&& visit) {
  if (y == Element::kBf16) return visit(__nv_bfloat16{});
  if (y == Element::kF16) return visit(__half{});
  return y == Element::kF32 ? visit(float{}) : cudaErrorInvalidValue;
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
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return cudaGetLastError();
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
  cudaError_t error = load(&node_routing<Transport>);
  for (Element e : {Element::kBf16, Element::kF16, Element::kF32}) {
    for (Wire wire : {Wire::kCopy, Wire::kQuantized, Wire::kDequantized}) {
      if (error != cudaSuccess) return error;
      error = for_dispatch_variant(e, wire, [&](auto w, auto type) {
        return load(&node_dispatch<decltype(w)::value, decltype(type), Transport>);
      });
    }
    if (error != cudaSuccess) return error;
    error = for_combine_variant(
        e, [&](auto type) { return load(&node_combine<decltype(type), Transport>); });
  }
  return error;
}

}  // namespace jax_ep
