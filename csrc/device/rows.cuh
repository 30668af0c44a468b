// SPDX-License-Identifier: Apache-2.0
// What is in 16 bytes of a row: element types, FP8 quantisation of 128 channels, rounding.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../kernels/launch.h"
#include "ptx.cuh"

namespace jax_ep {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// The elements of one Vec.
template <typename T>
struct Pack {
  static constexpr int kCount = sizeof(Vec) / sizeof(T);
  union {
    Vec vec;
    T element[kCount];
  };
  __device__ Pack() {}
  __device__ explicit Pack(const Vec& v) : vec(v) {}
};

// 16 consecutive channels of a row, one lane's share while quantising; 8 lanes hold a scale's
// block.
constexpr int kLaneChannels = 16;
constexpr int kScaleLanes = kScaleBlock / kLaneChannels;

struct Quantized {
  Vec q;        // 16 e4m3 values
  float scale;  // of the block of 128 channels that they belong to
};

// One scale per 128 channels: amax / 448, e4m3(x * (1 / scale)), saturating. NaN stays NaN: the
// maximum is taken over the bits of |x|, where NaN is largest. All lanes of the warp take part.
__device__ inline Quantized quantize_lane(const float (&x)[kLaneChannels], bool power_of_two) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) bits = max(bits, __float_as_uint(x[i]) & 0x7fffffffu);
#pragma unroll
  for (int d = 1; d < kScaleLanes; d *= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, d));
  const float tiny = __uint_as_float(0x00800000u);  // smallest normal
  const float amax = __uint_as_float(bits);
  float scale = 1.0f;
  if (!(amax < tiny)) {
    scale = __fmul_rn(amax, 1.0f / 448.0f);
    if (scale < tiny) scale = tiny;
  }
  if (power_of_two) {
    scale = __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & 0x7f800000u);
  }
  const float inverse = __fdiv_rn(1.0f, scale);
  union {
    Vec vec;
    __nv_fp8_storage_t q[kLaneChannels];
  } out;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    out.q[i] = __nv_cvt_float_to_fp8(__fmul_rn(x[i], inverse), __NV_SATFINITE, __NV_E4M3);
  }
  return {out.vec, scale};
}

__device__ __forceinline__ float dequantize(__nv_fp8_storage_t q, float scale) {
  return __fmul_rn(__half2float(__half(__nv_cvt_fp8_to_halfraw(q, __NV_E4M3))), scale);
}

// One lane's 16 channels at `row`, as floats.
template <typename T>
__device__ inline void load_lane(const T* row, int channel, float (&x)[kLaneChannels]) {
  constexpr int kVecs = kLaneChannels / Pack<T>::kCount;
#pragma unroll
  for (int v = 0; v < kVecs; ++v) {
    const Pack<T> pack(load_input(reinterpret_cast<const Vec*>(row + channel) + v));
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount; ++i)
      x[v * Pack<T>::kCount + i] = to_float(pack.element[i]);
  }
}

// The inverse of quantize_lane, as the Vecs of T: kLaneChannels * sizeof(T) bytes.
template <typename T>
struct Dequantized {
  static constexpr int kVecs = kLaneChannels / Pack<T>::kCount;
  Vec vec[kVecs];
  __device__ Dequantized(const Vec& q, float scale) {
    union {
      Vec all;
      __nv_fp8_storage_t q[kLaneChannels];
    } in;
    in.all = q;
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) {
        pack.element[i] = from_float<T>(dequantize(in.q[v * Pack<T>::kCount + i], scale));
      }
      vec[v] = pack.vec;
    }
  }
};

}  // namespace jax_ep
