// SPDX-License-Identifier: Apache-2.0
// Rows of a dispatch, by one warp: from one place to several, as they are, quantised, or back.
#pragma once
#include "../device/rows.cuh"
#include "../device/warp.cuh"
#include "launch.h"

namespace jax_ep {

// Up to 32 places that one row goes to: lane i holds the i-th.
struct Targets {
  char* row = nullptr;
  float* scales = nullptr;
  int count = 0;  // the same in all lanes
};

constexpr int kBatch = 4;  // Vecs of a lane in flight

// Vecs [first, last) of the row at `from` to the same place in every target.
template <bool kArrived>
__device__ void copy_row(const char* from, const Targets& to, int first, int last) {
  const auto* source = reinterpret_cast<const Vec*>(from);
  for (int base = first; base < last; base += 32 * kBatch) {
    Vec v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      if (at < last) v[j] = kArrived ? load_arrived(source + at) : load_input(source + at);
    }
    for (int i = 0; i < to.count; ++i) {
      auto* target = reinterpret_cast<Vec*>(of_lane(to.row, i));
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = base + j * 32 + lane_id();
        if (at < last) store_row(target + at, v[j]);
      }
    }
  }
}

// `count` scales at `from` to every target.
__device__ inline void copy_scales(const float* from, const Targets& to, int count) {
  for (int j = 0; j < count; j += 32) {
    const int at = j + lane_id();
    const float scale = at < count ? *reinterpret_cast<const volatile float*>(from + at) : 0.0f;
    for (int i = 0; i < to.count; ++i) {
      float* target = of_lane(to.scales, i);
      if (at < count) target[at] = scale;
    }
  }
}

// Vecs [first, last) of the row at `x`, quantised: to e4m3 and scales in every target, or (kBack)
// back to T. `first` is a multiple of a scale's block.
template <typename T, bool kBack>
__device__ void quantize_row(const DispatchParams& p, const T* x, const Targets& to, int first,
                             int last) {
  constexpr int kCount = Pack<T>::kCount, kLanes = kScaleBlock / kCount;
  using Word = typename Fp8<T>::Word;
  const auto* source = reinterpret_cast<const Vec*>(x);
  for (int base = first; base < last; base += 32 * kBatch) {
    Pack<T> v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      v[j].vec = at < last ? load_input(source + at) : Vec{};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      float scale;
      const Fp8<T> q = quantize(v[j], p.power_of_two_scales, &scale);
      const Vec back = kBack ? dequantize(q, scale).vec : Vec{};
      for (int i = 0; i < to.count; ++i) {
        char* row = of_lane(to.row, i);
        float* scales = of_lane(to.scales, i);
        if (at >= last) continue;
        if constexpr (kBack) {
          store_row(reinterpret_cast<Vec*>(row) + at, back);
        } else {
          reinterpret_cast<Word*>(row)[at] = q.word;
          if (at % kLanes == 0) scales[at / kLanes] = scale;
        }
      }
    }
  }
}

// A row that arrived as {e4m3 [H], scales [H/128]} at the start of its place: to T in every target,
// its own place included. The values of Vec v lie at byte v * kCount and go to byte v * 16, so
// going down from the last never overwrites what is still to be read; the scales are held in shared
// memory.
template <typename T>
__device__ void dequantize_row(const DispatchParams& p, const char* from, const Targets& to,
                               float* held) {
  constexpr int kCount = Pack<T>::kCount, kLanes = kScaleBlock / kCount, kStep = 32 * kBatch;
  using Word = typename Fp8<T>::Word;
  for (int j = lane_id(); j < p.hidden / kScaleBlock; j += 32) {
    held[j] = *reinterpret_cast<const volatile float*>(from + p.hidden + j * sizeof(float));
  }
  __syncwarp();
  const int vecs = p.hidden / kCount;
  for (int base = (vecs - 1) / kStep * kStep; base >= 0; base -= kStep) {
    Fp8<T> q[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      if (at < vecs) q[j].word = load_arrived(reinterpret_cast<const Word*>(from) + at);
    }
    __syncwarp();  // every lane has read before any lane writes
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      const Vec back = at < vecs ? dequantize(q[j], held[at / kLanes]).vec : Vec{};
      for (int i = 0; i < to.count; ++i) {
        auto* target = reinterpret_cast<Vec*>(of_lane(to.row, i));
        if (at < vecs) store_row(target + at, back);
      }
    }
  }
  __syncwarp();
}

// Row `t` of x, Vecs [first, last) as they come, to every target.
template <Wire W, typename T, bool kBack>
__device__ void send_row(const DispatchParams& p, int t, const Targets& to, int first, int last) {
  if constexpr (W == Wire::kCopy) {
    copy_row<false>(p.x + size_t(t) * p.row_bytes, to, first, last);
    if (first == 0 && p.scales != nullptr) {
      const int count = p.hidden / kScaleBlock;
      copy_scales(p.scales + size_t(t) * count, to, count);
    }
  } else {
    quantize_row<T, kBack>(p, reinterpret_cast<const T*>(p.x) + size_t(t) * p.hidden, to, first,
                           last);
  }
}

// Vecs of a row of x.
template <Wire W, typename T>
__device__ int row_vecs(const DispatchParams& p) {
  return (W == Wire::kCopy ? p.row_bytes : p.hidden * int(sizeof(T))) / int(sizeof(Vec));
}

}  // namespace jax_ep
