// SPDX-License-Identifier: Apache-2.0
// combine's consumers: each thread adds up its columns of the rows that come through the ring. They
// share nothing with each other and wait for nobody but the producer.
#pragma once
#include "../device/rows.cuh"
#include "combine_parts.cuh"

namespace jax_ep {

// This thread's columns of a row.
struct Columns {
  Vec v[kColumnVecs];
};

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

// A float32 sum of rows of type T.
template <typename T>
struct Sum {
  float value[kColumnVecs][Pack<T>::kCount] = {};

  __device__ __forceinline__ void add(int j, const Vec& row, float weight) {
    float x[Pack<T>::kCount];
    unpack<T>(row, x);
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount; ++i) {
      value[j][i] = __fadd_rn(value[j][i], __fmul_rn(weight, x[i]));
    }
  }

  __device__ __forceinline__ Columns rounded() const {
    Columns columns;
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) pack.element[i] = from_float<T>(value[j][i]);
      columns.v[j] = pack.vec;
    }
    return columns;
  }
};

// What a note asks for after its row. False: stop.
template <typename T>
__device__ __forceinline__ bool follow(const Note& note, int first, Sum<T>& sum, Columns& own,
                                       uint32_t stored) {
  if (note.what & kClear) sum = Sum<T>();
  if (note.what & kHold) {
    own = sum.rounded();
    sum = Sum<T>();
  }
  if (note.what & kAddOwn) {
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) sum.add(j, own.v[j], 1.0f);
  }
  if (note.what & kStore) {
    const Columns columns = sum.rounded();
    sum = Sum<T>();
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      const int at = first + j * kConsumers;
      if (at < int(note.what % kSomething)) {
        store_row(reinterpret_cast<Vec*>(note.to) + at, columns.v[j]);
      }
    }
  }
  if (note.what & kTell) {
    __syncwarp();  // the warp's pushes before the arrival
    if (lane_id() == 0) arrive(stored + (note.what >> kPlaceShift) * 8);
  }
  return !(note.what & kStop);
}

// By a consumer warp, all rows that the producer sends. What lies in a slot behind its row is added
// too, to columns that are never stored.
template <typename T>
__device__ __forceinline__ void consume(Ring ring, int slot_vecs, const Pushes& pushes) {
  const uint32_t stored = shared_address(pushes.stored);
  const int first = threadIdx.x - 32 * kFirstConsumer;
  int at[kColumnVecs];
  bool here[kColumnVecs];  // some lane of this warp has columns
#pragma unroll
  for (int j = 0; j < kColumnVecs; ++j) {
    here[j] = first - lane_id() + j * kConsumers < slot_vecs;
    at[j] = min_int(first + j * kConsumers, slot_vecs - 1) * int(sizeof(Vec));
  }
  Sum<T> sum;
  Columns own = {}, row = {};
  for (;;) {
    const Note note = ring.await();
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      if (here[j]) row.v[j] = ring.column(at[j]);
    }
    ring.release();
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      if (here[j]) sum.add(j, row.v[j], note.weight);
    }
    if (note.what >= kSomething && !follow(note, first, sum, own, stored)) return;
  }
}

}  // namespace jax_ep
