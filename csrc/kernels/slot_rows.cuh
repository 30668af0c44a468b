// SPDX-License-Identifier: Apache-2.0
// Rows of a small dispatch: what one thread holds of a row, pushing it to the slots of peers, and
// placing it, and what has arrived, in this rank's rows.
//
// A row is cut into tasks of one warp: 32 vectors each, and a last one for scales and scalars, so
// that nobody waits for one load after another. Integer divisions, loops over absent pairs and
// quantising twice cost as much as the link here, so there are none.
#pragma once
#include "../device/rows.cuh"
#include "../device/slots.cuh"
#include "slot_routing.cuh"

namespace jax_ep {

// What a row is while it travels: T's values as they are, or e4m3 with scales.
template <Wire W>
__device__ SlotRow slot_row(const SlotDispatchParams& p) {
  const bool scaled = W != Wire::kCopy || p.scales != nullptr;
  return {W == Wire::kCopy ? p.row_bytes : p.hidden, scaled ? p.hidden / kScaleBlock : 0};
}

// One task: a warp's part of the n-th token at hand. `vec` is this lane's vector; the last task of
// a row has none.
struct Task {
  int n, vec;
  bool is_last;

  __device__ Task(const Divider& by_tasks, int tasks, int number) : n(by_tasks(number)) {
    const int part = number - n * tasks;
    is_last = part == tasks - 1;
    vec = part * 32 + lane_id();
  }
};

// A Vec of x as it travels. All lanes of a warp take part in the making.
template <Wire W, typename T>
struct WireVec {
  using Word = typename Fp8<T>::Word;
  static constexpr int kLanes = kScaleBlock / Pack<T>::kCount;  // that share a scale
  Vec vec;                                                      // kCopy
  Fp8<T> q;                                                     // otherwise
  float scale;

  __device__ WireVec() {}
  __device__ WireVec(const SlotDispatchParams& p, const Vec& v) : vec(v) {
    if constexpr (W != Wire::kCopy) q = quantize(Pack<T>(v), p.power_of_two_scales, &scale);
  }
  // To `values` and `scales` of a row that holds it as it travels.
  __device__ void store(char* values, float* scales, int at) const {
    if constexpr (W == Wire::kCopy) {
      store_row(reinterpret_cast<Vec*>(values) + at, vec);
    } else {
      reinterpret_cast<Word*>(values)[at] = q.word;
      if (at % kLanes == 0) scales[at / kLanes] = scale;
    }
  }
};

// What a thread loads before it knows anything else, for its first task among the block's own
// tokens; the post warp, of the first of these.
struct Early {
  Vec vec{};
  int choice = -1;  // this lane's pair of the token
  float scalar = 0;
};

__device__ inline float scalar_of_lane(const SlotDispatchParams& p, int t) {
  const int K = p.exchange.top_k;
  return p.scalars != nullptr && lane_id() < K ? p.scalars[t * K + lane_id()] : 0.0f;
}

__device__ inline Vec load_x(const SlotDispatchParams& p, const SlotDispatchSizes& sizes, int t,
                             const Task& task) {
  if (task.is_last || task.vec >= sizes.x_vecs) return Vec{};
  return load_input(reinterpret_cast<const Vec*>(p.x) + size_t(t) * sizes.x_vecs + task.vec);
}

__device__ inline Early load_early(const SlotDispatchParams& p, const SlotDispatchSizes& sizes,
                                   int own) {
  Early early;
  if (is_post_warp()) {
    if (own > 0) early.choice = choice_of_lane(p, blockIdx.x);
    return early;
  }
  const Task task(sizes.by_x_tasks, sizes.x_tasks, threadIdx.x / 32);
  if (task.n >= min_int(own, kSlotGroup)) return early;
  const int t = blockIdx.x + task.n * gridDim.x;
  early.choice = choice_of_lane(p, t);
  early.vec = load_x(p, sizes, t, task);
  if (task.is_last) early.scalar = scalar_of_lane(p, t);
  return early;
}

// By one warp: the ranks that the lanes' choices name.
__device__ inline RankSet named_by(const SlotDispatchParams& p, const PlanSizes& sizes,
                                   int choice) {
  const bool valid = choice >= 0 && choice < p.exchange.num_experts;
  return RankSet::of_lanes(valid ? sizes.by_local(choice) : -1);
}

// By one warp: its task of my token t, to the peers that it names; for those on other nodes, once,
// to where the network takes it.
template <Wire W, typename T, typename S>
__device__ __forceinline__ void push_task(const SlotDispatchParams& p,
                                          const SlotDispatchSizes& sizes, const S& s, int t,
                                          const Task& task, const WireVec<W, T>& piece, int choice,
                                          float scalar) {
  const SlotRow lie = slot_row<W>(p);
  const RankSet to = s.outboxes_of(named_by(p, sizes.plan, choice));
  for (int r = 0; r < s.op.R; ++r) {
    if (!s.fills(r) || !to.has(r)) continue;
    char* slot = s.outbox(r).slot(t);
    if (!task.is_last) {
      if (task.vec < sizes.x_vecs) piece.store(slot, lie.scales_of(slot), task.vec);
      continue;
    }
    if (W == Wire::kCopy) {
      for (int j = lane_id(); j < lie.scales; j += 32) {
        lie.scales_of(slot)[j] = p.scales[size_t(t) * lie.scales + j];
      }
    }
    if (p.scalars != nullptr && lane_id() < p.exchange.top_k) {
      lie.scalars_of(slot)[lane_id()] = scalar;
    }
  }
}

// By the data warps: rows of the block's own tokens, to the peers that they name. `first` is the
// piece of the thread's first task.
template <Wire W, typename T, typename S>
__device__ void push_rows(const SlotDispatchParams& p, const SlotDispatchSizes& sizes, const S& s,
                          int own, const Early& early, const WireVec<W, T>& first) {
  for (int from = 0; from < own; from += kSlotGroup) {
    const int tasks = min_int(kSlotGroup, own - from) * sizes.x_tasks;
    for (int i = threadIdx.x / 32; i < tasks; i += kDataWarps) {
      const Task task(sizes.by_x_tasks, sizes.x_tasks, i);
      const int t = blockIdx.x + (from + task.n) * gridDim.x;
      if (from == 0 && i < kDataWarps) {
        push_task(p, sizes, s, t, task, first, early.choice, early.scalar);
      } else {
        push_task(p, sizes, s, t, task, WireVec<W, T>(p, load_x(p, sizes, t, task)),
                  choice_of_lane(p, t), scalar_of_lane(p, t));
      }
    }
    if constexpr (S::kSpansNodes) s.put_rows(p, sizes, slot_row<W>(p), from, own);
    rows_pushed(from + kSlotGroup >= own);
  }
}

// By one warp: `put(row)` for every row here of a token; `here` is that of this lane's pair.
template <typename Put>
__device__ __forceinline__ void for_rows(int here, Put&& put) {
  for (unsigned todo = __ballot_sync(kAllLanes, here >= 0); todo != 0; todo &= todo - 1) {
    put(size_t(__shfl_sync(kAllLanes, here, __ffs(todo) - 1)));
  }
}

// By one warp: the last task of a row, its scales, from `load(j)`, and scalars to the rows here.
template <typename Load>
__device__ __forceinline__ void place_extras(const SlotDispatchParams& p, int here, float scalar,
                                             Load&& load) {
  constexpr int kBatch = 4;
  const int scales = p.row_scales != nullptr ? p.hidden / kScaleBlock : 0;
  for (int base = lane_id(); base < scales + lane_id(); base += 32 * kBatch) {
    float scale[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) scale[j] = base + 32 * j < scales ? load(base + 32 * j) : 0;
    for_rows(here, [&](size_t row) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (base + 32 * j < scales) p.row_scales[row * scales + base + 32 * j] = scale[j];
      }
    });
  }
  // Last: it has been loaded with the scales.
  if (here >= 0 && p.row_scalars != nullptr) p.row_scalars[here] = scalar;
}

// By one warp: its task of my token t, to the rows here.
template <Wire W, typename T>
__device__ __forceinline__ void place_own(const SlotDispatchParams& p,
                                          const SlotDispatchSizes& sizes, int t, const Task& task,
                                          int here, const WireVec<W, T>& piece, float scalar) {
  const int scales = p.hidden / kScaleBlock;
  if (task.is_last) {
    if constexpr (W == Wire::kCopy) {
      place_extras(p, here, scalar, [&](int j) { return p.scales[size_t(t) * scales + j]; });
    } else if (here >= 0 && p.row_scalars != nullptr) {
      p.row_scalars[here] = scalar;  // scales are stored beside the values
    }
    return;
  }
  const bool there = task.vec < sizes.x_vecs;
  if constexpr (W == Wire::kDequantized) {
    const Vec back = dequantize(piece.q, piece.scale).vec;
    for_rows(here, [&](size_t row) {
      if (there) store_row(reinterpret_cast<Vec*>(p.rows + row * p.row_bytes) + task.vec, back);
    });
  } else {
    for_rows(here, [&](size_t row) {
      if (there) piece.store(p.rows + row * p.row_bytes, p.row_scales + row * scales, task.vec);
    });
  }
}

// By one warp: its task of a peer's token, from its slot to the rows here. Its flag has been
// acquired.
template <Wire W, typename T>
__device__ __forceinline__ void place_arrived(const SlotDispatchParams& p,
                                              const SlotDispatchSizes& sizes, const Task& task,
                                              int here, const char* slot) {
  const SlotRow lie = slot_row<W>(p);
  const auto* scales = reinterpret_cast<const uint32_t*>(lie.scales_of(slot));
  if (task.is_last) {
    const auto* scalars = reinterpret_cast<const uint32_t*>(lie.scalars_of(slot)) + lane_id();
    const bool scaled = p.row_scalars != nullptr && here >= 0;
    const float scalar = scaled ? __uint_as_float(load_arrived(scalars)) : 0.0f;
    place_extras(p, here, scalar, [&](int j) { return __uint_as_float(load_arrived(scales + j)); });
    return;
  }
  const bool there = task.vec < sizes.slot_lanes;
  Vec v{};
  if constexpr (W == Wire::kDequantized) {
    if (there) {
      const Fp8<T> q(load_arrived(reinterpret_cast<const typename Fp8<T>::Word*>(slot) + task.vec));
      const int block = task.vec / WireVec<W, T>::kLanes;
      v = dequantize(q, __uint_as_float(load_arrived(scales + block))).vec;
    }
  } else if (there) {
    v = load_arrived(reinterpret_cast<const Vec*>(slot) + task.vec);
  }
  for_rows(here, [&](size_t row) {
    if (there) store_row(reinterpret_cast<Vec*>(p.rows + row * p.row_bytes) + task.vec, v);
  });
}

}  // namespace jax_ep
