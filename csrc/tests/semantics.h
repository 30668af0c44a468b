// SPDX-License-Identifier: Apache-2.0
// dispatch and combine on the host, for all ranks, over a HostPlan: what the kernels must equal bit
// for bit. The same arithmetic as jax_ep/reference.py.
#pragma once
#include <cuda_fp8.h>

#include <algorithm>
#include <cstring>

#include "../plan/host_plan.h"
#include "case.h"

namespace jax_ep {

struct HostRows {  // of one rank; tail left at the poison of Buffer
  Bytes rows;
  std::vector<float> scales, scalars;
};

inline void quantize_block(const float* x, bool power_of_two, uint8_t* q, float* scale_out) {
  float amax = 0;
  for (int i = 0; i < kScaleBlock; ++i) amax = std::max(amax, std::fabs(x[i]));
  const float tiny = 1.17549435e-38f;
  float scale = amax < tiny ? 1.0f : std::max(amax * (1.0f / 448.0f), tiny);
  if (power_of_two) {
    uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    bits = (bits + 0x7fffffu) & 0x7f800000u;
    std::memcpy(&scale, &bits, 4);
  }
  const float inverse = 1.0f / scale;
  for (int i = 0; i < kScaleBlock; ++i)
    q[i] = __nv_cvt_float_to_fp8(x[i] * inverse, __NV_SATFINITE, __NV_E4M3);
  *scale_out = scale;
}

inline float dequantize_value(uint8_t q, float scale) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(q, __NV_E4M3))) * scale;
}

inline HostRows host_dispatch(const Case& c, const HostPlan& plan, int rank) {
  const Exchange& x = c.x;
  const size_t T = x.num_tokens, K = x.top_k, rows = x.num_rows, H = c.hidden, S = H / kScaleBlock;
  const bool fp8_rows = c.prequantized || c.wire == Wire::kQuantized;
  const size_t row_bytes = H * (fp8_rows ? 1 : size_of(c.type));
  HostRows out;
  out.rows.assign(rows * row_bytes, char(0xff));
  float ones;
  const uint32_t all = ~0u;
  std::memcpy(&ones, &all, 4);
  out.scales.assign(rows * S, ones);
  out.scalars.assign(rows, 0.0f);
  for (size_t row = 0; row < rows; ++row) {
    const int pair = plan.row_pair[rank * rows + row];
    char* to = out.rows.data() + row * row_bytes;
    if (pair < 0) {
      if (pair == kRowPadding || c.zero_tail) {
        std::memset(to, 0, row_bytes);
        std::fill_n(out.scales.begin() + row * S, S, 0.0f);
      }
      continue;
    }
    const size_t source = pair / (T * K), t = pair % (T * K) / K;
    out.scalars[row] = c.scalars_in[source][pair % (T * K)];
    const Bytes& in = c.rows_in[source];
    if (c.wire == Wire::kCopy) {
      std::memcpy(to, in.data() + t * row_bytes, row_bytes);
      if (c.prequantized)
        std::copy_n(c.scales_in[source].begin() + t * S, S, out.scales.begin() + row * S);
      continue;
    }
    for (size_t block = 0; block < S; ++block) {
      float values[kScaleBlock], scale;
      uint8_t q[kScaleBlock];
      for (int i = 0; i < kScaleBlock; ++i)
        values[i] = element_at(in, c.type, t * H + block * kScaleBlock + i);
      quantize_block(values, c.power_of_two, q, &scale);
      if (fp8_rows) {
        std::memcpy(to + block * kScaleBlock, q, kScaleBlock);
        out.scales[row * S + block] = scale;
      } else {
        for (int i = 0; i < kScaleBlock; ++i) {
          set_element(out.rows, c.type, row * H + block * kScaleBlock + i,
                      dequantize_value(q[i], scale));
        }
      }
    }
  }
  return out;
}

// Each value rounded to the case's type.
inline void round_values(const Case& c, std::vector<float>* values) {
  Bytes rounded(size_of(c.type));
  for (float& v : *values) {
    set_element(rounded, c.type, 0, v);
    v = element_at(rounded, c.type, 0);
  }
}

// What rank r adds to token t of `rank`, as it arrives there; nothing if it has none of its rows.
inline bool host_partial(const Case& c, const HostPlan& plan, const Bytes& y,
                         const std::vector<float>& weights, size_t r, size_t rank, size_t t,
                         std::vector<float>* partial) {
  const size_t T = c.x.num_tokens, K = c.x.top_k, H = c.hidden;
  const int* rows = &plan.token_rows[(r * c.x.num_ranks * T + rank * T + t) * K];
  if (rows[0] < 0) return false;
  partial->assign(H, 0.0f);
  for (size_t k = 0; k < K && rows[k] >= 0; ++k) {
    for (size_t h = 0; h < H; ++h) {
      volatile float product = element_at(y, c.type, rows[k] * H + h);  // no fused multiply-add
      if (c.weights) product = weights[rows[k]] * product;
      (*partial)[h] += product;
    }
  }
  round_values(c, partial);
  const bool crosses = c.quantized_partials && r != rank;
  for (size_t first = 0; crosses && first < H; first += kScaleBlock) {
    float scale;
    uint8_t q[kScaleBlock];
    quantize_block(&(*partial)[first], c.power_of_two, q, &scale);
    for (int i = 0; i < kScaleBlock; ++i) (*partial)[first + i] = dequantize_value(q[i], scale);
  }
  return true;
}

// `y` and `weights` of all ranks to the tokens of `rank`.
inline Bytes host_combine(const Case& c, const HostPlan& plan, const std::vector<Bytes>& y,
                          const std::vector<std::vector<float>>& weights, int rank) {
  const size_t R = c.x.num_ranks, T = c.x.num_tokens, H = c.hidden;
  const size_t per_node = c.ranks_per_node == 0 ? R : c.ranks_per_node;
  Bytes out(T * H * size_of(c.type));
  std::vector<float> total(H), of_node(H), partial(H);
  for (size_t t = 0; t < T; ++t) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (size_t r = 0; r < R; ++r) {
      if (r % per_node == 0) std::fill(of_node.begin(), of_node.end(), 0.0f);
      if (host_partial(c, plan, y[r], weights[r], r, rank, t, &partial)) {
        for (size_t h = 0; h < H; ++h) of_node[h] += partial[h];
      }
      if ((r + 1) % per_node != 0) continue;
      if (per_node != R) round_values(c, &of_node);
      for (size_t h = 0; h < H; ++h) total[h] += of_node[h];
    }
    for (size_t h = 0; h < H; ++h) set_element(out, c.type, t * H + h, total[h]);
  }
  return out;
}

}  // namespace jax_ep
