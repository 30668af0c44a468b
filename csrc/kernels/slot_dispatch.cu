// SPDX-License-Identifier: Apache-2.0
// dispatch of a small batch inside a node: its kernels, and how they are launched.
#include "../device/kernel.cuh"
#include "slot_dispatch.cuh"

namespace jax_ep {
namespace {

template <Wire W, typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_dispatch_kernel(const __grid_constant__ SlotDispatchParams p,
                         const __grid_constant__ SlotDispatchSizes sizes) {
  slot_dispatch_body<W, T, SlotOp>(p, sizes);
}

template <Wire W, typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_dispatch_all_ranks(const SlotDispatchParams* p,
                            const __grid_constant__ SlotDispatchSizes sizes) {
  slot_dispatch_body<W, T, SlotOp>(p[blockIdx.y], sizes);
}

template <Wire W, typename T>
cudaError_t launch(const SlotDispatchParams* params, const Exchange& e, Element x, int hidden,
                   const Launch& how) {
  const int blocks = min_int(how.num_sms, e.num_ranks * e.num_tokens);
  const SlotDispatchSizes sizes = slot_dispatch_sizes<W, T>(e, blocks, hidden, x);
  const size_t shared = SlotShared::bytes(e);
  if (how.all_ranks == 0) {
    return launch_kernel(slot_dispatch_kernel<W, T>, blocks, kSlotThreads, shared, how.stream,
                         *params, sizes);
  }
  if constexpr (kAllRanks) {
    return launch_kernel(slot_dispatch_all_ranks<W, T>, dim3(blocks, how.all_ranks), kSlotThreads,
                         shared, how.stream, params, sizes);
  }
  return cudaErrorNotSupported;
}

template <Wire W, typename T>
cudaError_t load() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes,
                               reinterpret_cast<const void*>(&slot_dispatch_kernel<W, T>));
}

// Every compiled variant: rows as bytes, and two FP8 deliveries of three types.
template <typename Visit>
cudaError_t for_variant(Element x, Wire wire, Visit&& visit) {
  using Quantized = std::integral_constant<Wire, Wire::kQuantized>;
  using Dequantized = std::integral_constant<Wire, Wire::kDequantized>;
  if (wire == Wire::kCopy) return visit(std::integral_constant<Wire, Wire::kCopy>{}, float{});
  auto by_type = [&](auto type) {
    return wire == Wire::kQuantized ? visit(Quantized{}, type) : visit(Dequantized{}, type);
  };
  switch (x) {
    case Element::kBf16:
      return by_type(__nv_bfloat16{});
    case Element::kF16:
      return by_type(__half{});
    case Element::kF32:
      return by_type(float{});
    case Element::kFp8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_slot_dispatch(const SlotDispatchParams* params, const Exchange& e, Element x,
                                 Wire wire, int hidden, const Launch& how) {
  return for_variant(x, wire, [&](auto w, auto type) {
    return launch<decltype(w)::value, decltype(type)>(params, e, x, hidden, how);
  });
}

cudaError_t load_slot_dispatch() {
  for (Wire wire : {Wire::kCopy, Wire::kQuantized, Wire::kDequantized}) {
    for (Element x : {Element::kBf16, Element::kF16, Element::kF32}) {
      const cudaError_t error = for_variant(
          x, wire, [](auto w, auto type) { return load<decltype(w)::value, decltype(type)>(); });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace jax_ep
