// SPDX-License-Identifier: Apache-2.0
// Every compiled variant of the kernels between nodes: dispatch of rows as bytes and of two FP8
// deliveries of three types, combine of three types.
#pragma once
#include <type_traits>

#include "../kernels/launch.h"

namespace jax_ep {

// `visit` is given the wire and the type as values.
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

// All of them, until one is an error.
template <typename Visit>
cudaError_t for_each_dispatch_variant(Visit&& visit) {
  for (Element e : {Element::kBf16, Element::kF16, Element::kF32}) {
    for (Wire wire : {Wire::kCopy, Wire::kQuantized, Wire::kDequantized}) {
      const cudaError_t error = for_dispatch_variant(e, wire, visit);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}
template <typename Visit>
cudaError_t for_each_combine_variant(Visit&& visit) {
  for (Element e : {Element::kBf16, Element::kF16, Element::kF32}) {
    const cudaError_t error = for_combine_variant(e, visit);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_ep
