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

// The value whose bits these are.
template <typename T>
__device__ __forceinline__ float from_bits(uint32_t bits);
template <>
__device__ __forceinline__ float from_bits<float>(uint32_t bits) {
  return __uint_as_float(bits);
}
template <>
__device__ __forceinline__ float from_bits<__half>(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
template <>
__device__ __forceinline__ float from_bits<__nv_bfloat16>(uint32_t bits) {
  return __uint_as_float(bits << 16);
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

// The values of one Vec.
template <typename T>
__device__ __forceinline__ void unpack(const Vec& vec, float (&value)[Pack<T>::kCount]) {
  const Pack<T> pack(vec);
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) value[i] = to_float(pack.element[i]);
}

// Two in a word, which are the upper halves of floats: one instruction each.
template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(const Vec& vec, float (&value)[8]) {
  const uint32_t words[4] = {vec.x, vec.y, vec.z, vec.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = __uint_as_float(words[i] << 16);
    value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// FP8 values of the channels of one Vec of T.
template <typename T>
struct Fp8 {
  static constexpr int kCount = Pack<T>::kCount;
  using Word = std::conditional_t<kCount == 8, uint2, uint32_t>;
  union {
    Word word;
    __nv_fp8_storage_t q[kCount];
    uint32_t four[kCount / 4];
  };
  __device__ Fp8() {}
  __device__ explicit Fp8(const Word& w) : word(w) {}
};

template <typename T>
__device__ __forceinline__ float to_float(const Fp8<T>& v, int i) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(v.q[i], __NV_E4M3)));
}

// The largest |x| of a Vec of each of the lanes that share a scale, by the bits of |x|, which are
// ordered as the values are, NaN largest. Types of 16 bits go two at a time.
template <typename T>
__device__ __forceinline__ float block_amax(const Pack<T>& x) {
  uint32_t bits;
  if constexpr (sizeof(T) == 2) {
    constexpr uint32_t kNoSigns = 0x7fff7fffu;
    const uint32_t two = __vmaxu2(__vmaxu2(x.vec.x & kNoSigns, x.vec.y & kNoSigns),
                                  __vmaxu2(x.vec.z & kNoSigns, x.vec.w & kNoSigns));
    bits = max(two & 0xffffu, two >> 16);
  } else {
    constexpr uint32_t kNoSign = 0x7fffffffu;
    bits =
        max(max(x.vec.x & kNoSign, x.vec.y & kNoSign), max(x.vec.z & kNoSign, x.vec.w & kNoSign));
  }
#pragma unroll
  for (int d = 1; d < kScaleBlock / Pack<T>::kCount; d *= 2) {
    bits = max(bits, __shfl_xor_sync(kAllLanes, bits, d));
  }
  return from_bits<T>(bits);
}

// One scale per 128 channels: amax / 448, e4m3(x * (1 / scale)), saturating. NaN stays NaN. Each
// lane brings one Vec, so 16 or 32 lanes share a scale; all lanes of the warp take part.
template <typename T>
__device__ __forceinline__ Fp8<T> quantize(const Pack<T>& x, bool power_of_two, float* scale_out) {
  const float tiny = __uint_as_float(0x00800000u);  // smallest normal
  const float amax = block_amax(x);
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
    const uint32_t both = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
    out.four[i / 4] = i % 4 == 0 ? both : out.four[i / 4] | both << 16;  // bytes go to the stack
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

// Some Vecs of a row that a thread has.
template <int kVecs>
struct Columns {
  Vec v[kVecs];
};

// Its part of a sum of rows of type T, in float32.
template <typename T, int kVecs>
struct RowSum {
  float value[kVecs][Pack<T>::kCount] = {};

  __device__ __forceinline__ void add(int j, const Vec& row, float weight) {
    float x[Pack<T>::kCount];
    unpack<T>(row, x);
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount; ++i) {
      value[j][i] = __fadd_rn(value[j][i], __fmul_rn(weight, x[i]));
    }
  }

  __device__ __forceinline__ void add(int j, const Vec& row) {  // as with a weight of one
    float x[Pack<T>::kCount];
    unpack<T>(row, x);
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount; ++i) value[j][i] = __fadd_rn(value[j][i], x[i]);
  }

  __device__ __forceinline__ void add(int j, const Fp8<T>& q, float scale) {
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount; ++i) {
      value[j][i] = __fadd_rn(value[j][i], __fmul_rn(to_float(q, i), scale));
    }
  }

  __device__ __forceinline__ Columns<kVecs> rounded() const {
    Columns<kVecs> columns;
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) pack.element[i] = from_float<T>(value[j][i]);
      columns.v[j] = pack.vec;
    }
    return columns;
  }
};

}  // namespace jax_ep
