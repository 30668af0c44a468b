// SPDX-License-Identifier: Apache-2.0
// What is in 16 bytes of a row: element types, FP8 quantisation of 128 channels, rounding.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "../kernels/launch.h"
#include "ptx.cuh"
#include "warp.cuh"

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

// FP8 values of the channels of one Vec of T.
template <typename T>
struct Fp8 {
  static constexpr int kCount = Pack<T>::kCount;
  using Word = std::conditional_t<kCount == 8, uint2, uint32_t>;
  union {
    Word word;
    __nv_fp8_storage_t q[kCount];
  };
  __device__ Fp8() {}
  __device__ explicit Fp8(const Word& w) : word(w) {}
};

template <typename T>
__device__ __forceinline__ float to_float(const Fp8<T>& v, int i) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(v.q[i], __NV_E4M3)));
}

// One scale per 128 channels: amax / 448, e4m3(x * (1 / scale)), saturating. NaN stays NaN: the
// maximum is taken over the bits of |x|, where NaN is largest. Each lane brings one Vec, so 16 or
// 32 lanes share a scale; all lanes of the warp take part.
template <typename T>
__device__ __forceinline__ Fp8<T> quantize(const Pack<T>& x, bool power_of_two, float* scale_out) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) {
    bits = max(bits, __float_as_uint(to_float(x.element[i])) & 0x7fffffffu);
  }
#pragma unroll
  for (int d = 1; d < kScaleBlock / Pack<T>::kCount; d *= 2) {
    bits = max(bits, __shfl_xor_sync(kAllLanes, bits, d));
  }
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
  Fp8<T> out;
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; i += 2) {
    const float2 two = {__fmul_rn(to_float(x.element[i]), inverse),
                        __fmul_rn(to_float(x.element[i + 1]), inverse)};
    const __nv_fp8x2_storage_t both = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
    out.q[i] = static_cast<__nv_fp8_storage_t>(both & 0xff);
    out.q[i + 1] = static_cast<__nv_fp8_storage_t>(both >> 8);
  }
  *scale_out = scale;
  return out;
}

// The inverse: float32 products, each rounded once to T.
template <typename T>
__device__ __forceinline__ Pack<T> dequantize(const Fp8<T>& in, float scale) {
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) {
    out.element[i] = from_float<T>(__fmul_rn(to_float(in, i), scale));
  }
  return out;
}

}  // namespace jax_ep
