// SPDX-License-Identifier: Apache-2.0
// combine's consumers: each thread adds up its columns of the rows that come through the ring. They
// share nothing with each other and wait for nobody but the filler.
#pragma once
#include "../device/rows.cuh"
#include "combine_parts.cuh"

namespace jax_ep {

// A consumer thread. kFp8: partials travel as e4m3 and scales.
template <typename T, bool kFp8>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(int segment_vecs, bool power_of_two, const Ring& ring,
                                      const Pushes& pushes)
      : ring_(ring),
        pushes_(pushes),
        stored_(shared_address(pushes.stored)),
        power_of_two_(power_of_two),
        first_(threadIdx.x - 32 * kFirstConsumer) {
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      if (first_ - lane_id() + j * kConsumers < segment_vecs) here_ = j + 1;
      at_[j] = computed_once(min_int(first_ + j * kConsumers, segment_vecs - 1));
    }
    here_ = computed_once(here_);
  }

  // All rows that the filler sends. What lies in a slot behind its row is added too, to columns
  // that are never stored.
  __device__ __forceinline__ void run() {
    if (here_ == kColumnVecs) {
      add_rows<true>();
    } else {
      add_rows<false>();
    }
  }

 private:
  using Word = typename Fp8<T>::Word;
  static constexpr int kLanes = kScaleBlock / Pack<T>::kCount;  // that share a scale

  // kAll: this warp has columns in every one of its places, and need not ask.
  template <bool kAll>
  __device__ __forceinline__ void add_rows() {
    for (;;) {
      const Note note = ring_.await();
      if (kFp8 && (note.what & kFp8Row)) {
        add_fp8_row<kAll>(vecs_of(note));
      } else {
        add_row<kAll>(note.weight);
      }
      if (note.what >= kSomething && !follow(note)) return;
    }
  }

  template <bool kAll>
  __device__ __forceinline__ void add_row(float weight) {
    Columns<kColumnVecs> row;
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      if (kAll || j < here_) row.v[j] = ring_.at<Vec>(at_[j] * int(sizeof(Vec)));
    }
    ring_.release();
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      if (kAll || j < here_) sum_.add(j, row.v[j], weight);
    }
  }

  // A partial as it has travelled: values, and behind all of them the scales.
  template <bool kAll>
  __device__ __forceinline__ void add_fp8_row(int vecs) {
    Word q[kColumnVecs];
    uint32_t scale[kColumnVecs];
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      if (!kAll && j >= here_) continue;
      q[j] = ring_.at<Word>(at_[j] * int(sizeof(Word)));
      scale[j] = ring_.at<uint32_t>(vecs * int(sizeof(Word)) + at_[j] / kLanes * 4);
    }
    ring_.release();
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      if (kAll || j < here_) sum_.add(j, Fp8<T>(q[j]), __uint_as_float(scale[j]));
    }
  }

  // What a note asks for after its row. False: stop.
  __device__ __forceinline__ bool follow(const Note& note) {
    const uint32_t place = note.what >> kPlaceShift;
    if (note.what & kClear) {
      keep_branch();
      sum_ = {};
    }
    if (note.what & kHold) {
      keep_branch();
      own_ = sum_.rounded();
      sum_ = {};
    }
    if (note.what & kAddOwn) {
#pragma unroll
      for (int j = 0; j < kColumnVecs; ++j) sum_.add(j, own_.v[j]);
    }
    if (note.what & kStore) {
      const Columns<kColumnVecs> columns = sum_.rounded();
      sum_ = {};
      if (kFp8 && (note.what & kTell)) {
        store_fp8(note, columns, reinterpret_cast<float*>(pushes_.scales[place]));
      } else {
        store(note, columns);
      }
    }
    if (note.what & kTell) {
      __syncwarp();  // the warp's pushes before the arrival
      if (lane_id() == 0) arrive(stored_ + place * 8);
    }
    return !(note.what & kStop);
  }

  __device__ __forceinline__ void store(const Note& note,
                                        const Columns<kColumnVecs>& columns) const {
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      const int at = first_ + j * kConsumers;
      if (at < vecs_of(note)) store_row(reinterpret_cast<Vec*>(note.to) + at, columns.v[j]);
    }
  }

  __device__ __forceinline__ void store_fp8(const Note& note, const Columns<kColumnVecs>& columns,
                                            float* scales) const {
#pragma unroll
    for (int j = 0; j < kColumnVecs; ++j) {
      const int at = first_ + j * kConsumers;
      if (at - lane_id() >= vecs_of(note)) return;  // the whole warp
      float scale;
      const Fp8<T> q = quantize(Pack<T>(columns.v[j]), power_of_two_, &scale);
      if (at >= vecs_of(note)) continue;
      reinterpret_cast<Word*>(note.to)[at] = q.word;
      if (at % kLanes == 0) scales[at / kLanes] = scale;
    }
  }

  Ring ring_;
  const Pushes& pushes_;
  const uint32_t stored_;  // address of its barriers
  const bool power_of_two_;
  const int first_;      // of my columns, in Vecs of an item
  int at_[kColumnVecs];  // my columns in a slot
  int here_ = 0;         // in so many of these some lane of this warp has columns
  RowSum<T, kColumnVecs> sum_;
  Columns<kColumnVecs> own_ = {};
};

// The whole role. A function of its own, so that what consumers keep in registers does not take
// them from the finder, which then spills.
template <typename T, bool kFp8>
__device__ __noinline__ void consume(int segment_vecs, bool power_of_two, Ring ring,
                                     const Pushes* pushes) {
  Consumer<T, kFp8>(segment_vecs, power_of_two, ring, *pushes).run();
}

}  // namespace jax_ep
