// SPDX-License-Identifier: Apache-2.0
// One test or one timing: sizes, routing, rows, and how elements are read and written on the host.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <random>
#include <vector>

#include "../kernels/launch.h"

namespace jax_ep {

using Bytes = std::vector<char>;
inline size_t size_of(Element e) { return e == Element::kF32 ? 4 : e == Element::kFp8 ? 1 : 2; }

inline float element_at(const Bytes& a, Element type, size_t i) {
  if (type == Element::kF32) return reinterpret_cast<const float*>(a.data())[i];
  if (type == Element::kF16) return __half2float(reinterpret_cast<const __half*>(a.data())[i]);
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(a.data())[i]);
}

inline void set_element(Bytes& a, Element type, size_t i, float v) {
  if (type == Element::kF32) reinterpret_cast<float*>(a.data())[i] = v;
  if (type == Element::kF16) reinterpret_cast<__half*>(a.data())[i] = __float2half_rn(v);
  if (type == Element::kBf16)
    reinterpret_cast<__nv_bfloat16*>(a.data())[i] = __float2bfloat16_rn(v);
}

// Everything that describes one test or one timing.
struct Case {
  Exchange x;
  int hidden = 0;
  Element type = Element::kBf16;
  Wire wire = Wire::kCopy;
  bool prequantized = false;  // x is fp8 with scales
  bool power_of_two = false;
  bool zero_tail = false;
  bool weights = true;
  bool quantized_partials = false;  // combine with FP8 on the wire
  int num_sms = 4;
  int wire_percent = 0;
  bool single_launch = false;
  int ranks_per_node = 0;      // 0: one node
  std::vector<int> topk_idx;   // [R, T, K]
  std::vector<Bytes> rows_in;  // [R][T, H]
  std::vector<std::vector<float>> scales_in, scalars_in;
};

}  // namespace jax_ep
