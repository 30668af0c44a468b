// SPDX-License-Identifier: Apache-2.0
// dispatch of a small batch, plan included: one launch, one flight.
//
//           data warps                                   post warp (of each block)
//   start   per token of mine (a block has one, or few):   its choices -> every peer's inbox, as
//   words
//             its row -> the slot of each peer that it
//             names (quantised on the way)
//                                       rows are pushed ->  the token's flag on these peers
//   done    all choices of the group -> the plan, by each
//             block for itself (slot_routing.cuh)
//                                       plan is there ---> experts of rows, padding, tail
//           per token of the group (a block's share):       every peer's hello
//             own: its row to each of its rows here
//             a peer's: when its flag says that it is there,
//               from its slot to each of its rows here
//
// `start` and `done` are one launch or two. Nothing of ours is resident between the two. Rows are
// the large path's, bit for bit. Slots, and who may overwrite them when: device/slots.cuh.
#include "../device/rows.cuh"
#include "../device/slots.cuh"
#include "slot_routing.cuh"

namespace jax_ep {
namespace {

// What a row is while it travels: T's values as they are, or e4m3 with scales.
template <Wire W, typename T>
__device__ SlotRow slot_row(const SlotDispatchParams& p) {
  const bool scaled = W != Wire::kCopy || p.scales != nullptr;
  return {W == Wire::kCopy ? p.row_bytes : p.hidden, scaled ? p.hidden / kScaleBlock : 0};
}

// Vecs of a row of x.
template <Wire W, typename T>
__device__ int row_vecs(const SlotDispatchParams& p) {
  return (W == Wire::kCopy ? p.row_bytes : p.hidden * int(sizeof(T))) / int(sizeof(Vec));
}

// One Vec of a row that is on its way: of the n-th token at hand.
struct Item {
  int n, vec;
  bool there;  // false: only completes the warp
  bool first;  // this thread's first one
};

// By the data warps: `work(item)` for every Vec of `count` rows; a warp has one row at a time.
template <typename Work>
__device__ __forceinline__ void for_vecs(int count, int vecs, Work&& work) {
  const int padded = (vecs + 31) / 32 * 32;
  for (int i = threadIdx.x; i < count * padded; i += kDataThreads) {
    const int n = i / padded, vec = i - n * padded;
    work(Item{n, vec, vec < vecs, i < kDataThreads});
  }
}

// What a thread loads before it knows anything else: of its first item among the block's own
// tokens.
struct Early {
  Vec v{};
  int choice = -1;  // this lane's pair of the token
};

__device__ const Vec* row_of_x(const SlotDispatchParams& p, int vecs, int t) {
  return reinterpret_cast<const Vec*>(p.x) + size_t(t) * vecs;
}

__device__ Early load_early(const SlotDispatchParams& p, int vecs, int own) {
  Early early;
  const int padded = (vecs + 31) / 32 * 32, K = p.exchange.top_k;
  const int n = threadIdx.x / padded, vec = threadIdx.x - n * padded;
  if (n >= min_int(own, kSlotGroup) || is_post_warp()) return early;
  const int t = blockIdx.x + n * gridDim.x;
  if (vec < vecs) early.v = load_input(row_of_x(p, vecs, t) + vec);
  if (lane_id() < K) early.choice = p.topk_idx[t * K + lane_id()];
  return early;
}

// The Vec of x that an item of one of the block's own tokens is.
__device__ Vec vec_of_x(const SlotDispatchParams& p, int vecs, int t, const Item& i,
                        const Early* early) {
  if (early != nullptr && i.first) return early->v;
  return i.there ? load_input(row_of_x(p, vecs, t) + i.vec) : Vec{};
}

// By one warp: the ranks that my token t names.
__device__ RankSet named_by(const SlotDispatchParams& p, int choice) {
  const bool valid = choice >= 0 && choice < p.exchange.num_experts;
  return RankSet::of_lanes(valid ? choice / p.exchange.local_experts() : -1);
}

__device__ int choice_of_lane(const SlotDispatchParams& p, int t) {
  const int K = p.exchange.top_k;
  return lane_id() < K ? p.topk_idx[t * K + lane_id()] : -1;
}

// By one warp: a Vec of each lane of my token t, and with the row's first warp its scales and
// scalars, to the peers that it names.
template <Wire W, typename T>
__device__ void push_vec(const SlotDispatchParams& p, const SlotOp& s, const SlotRow& lie, int t,
                         const Item& i, const Vec& v, const RankSet& named) {
  using Word = typename Fp8<T>::Word;
  constexpr int kLanes = kScaleBlock / Pack<T>::kCount;
  Fp8<T> q;
  float scale = 0;
  if constexpr (W != Wire::kCopy) q = quantize(Pack<T>(v), p.power_of_two_scales, &scale);
  for (int r = 0; r < s.op.R; ++r) {
    if (r == s.op.me || !named.has(r)) continue;
    char* slot = s.outbox(r).slot(t);
    if (i.there) {
      if constexpr (W == Wire::kCopy) {
        store_row(reinterpret_cast<Vec*>(slot) + i.vec, v);
      } else {
        reinterpret_cast<Word*>(slot)[i.vec] = q.word;
        if (i.vec % kLanes == 0) lie.scales_of(slot)[i.vec / kLanes] = scale;
      }
    }
    if (i.vec >= 32) continue;
    if (W == Wire::kCopy) {
      for (int j = lane_id(); j < lie.scales; j += 32) {
        lie.scales_of(slot)[j] = p.scales[size_t(t) * lie.scales + j];
      }
    }
    if (p.scalars != nullptr && lane_id() < p.exchange.top_k) {
      lie.scalars_of(slot)[lane_id()] = p.scalars[t * p.exchange.top_k + lane_id()];
    }
  }
}

// By the data warps: rows of the block's own tokens, to the peers that they name.
template <Wire W, typename T>
__device__ void push_rows(const SlotDispatchParams& p, const SlotOp& s, int own,
                          const Early& early) {
  const SlotRow lie = slot_row<W, T>(p);
  const int vecs = row_vecs<W, T>(p);
  for (int first = 0; first < own; first += kSlotGroup) {
    for_vecs(min_int(kSlotGroup, own - first), vecs, [&](const Item& i) {
      const int t = blockIdx.x + (first + i.n) * gridDim.x;
      const bool is_early = first == 0 && i.first;
      const Vec v = vec_of_x(p, vecs, t, i, first == 0 ? &early : nullptr);
      push_vec<W, T>(p, s, lie, t, i, v,
                     named_by(p, is_early ? early.choice : choice_of_lane(p, t)));
    });
    rows_pushed(first + kSlotGroup >= own);
  }
}

// By the post warp: words of the block's own tokens, and flags of their rows.
__device__ void post_tokens(const SlotDispatchParams& p, const SlotOp& s, int own) {
  if (blockIdx.x == 0) s.greet();
  for (int i = 0; i < own; ++i) push_words(p, s, blockIdx.x + i * gridDim.x);
  if (s.op.R == 1) return;
  for (int first = 0; first < own; first += kSlotGroup) {
    rows_pushed(first + kSlotGroup >= own);
    for (int i = first; i < min_int(first + kSlotGroup, own); ++i) {
      const int t = blockIdx.x + i * gridDim.x;
      const RankSet named = named_by(p, choice_of_lane(p, t));
      for (int r = lane_id(); r < s.op.R; r += 32) {
        if (r != s.op.me && named.has(r)) {
          store_release_sys(s.outbox(r).flag(t), s.tag);  // publishes the token's row
        }
      }
    }
  }
}

// To every row of the n-th token here: `put(row)`.
template <typename Put>
__device__ __forceinline__ void for_rows(const Tokens& tokens, int n, int K, Put&& put) {
  for (int k = 0; k < K; ++k) {
    const int row = tokens.here[n][k];
    if (row >= 0) put(size_t(row));
  }
}

// Scalars of a token's pairs, by lanes of one warp.
__device__ void place_scalars(const SlotDispatchParams& p, const Tokens& tokens, int n,
                              const volatile float* scalars) {
  if (p.row_scalars == nullptr || lane_id() >= p.exchange.top_k) return;
  const int row = tokens.here[n][lane_id()];
  if (row >= 0) p.row_scalars[row] = scalars[lane_id()];
}

// The rows of one of my own tokens here.
template <Wire W, typename T>
__device__ void place_own(const SlotDispatchParams& p, const Tokens& tokens, const Item& i, int t,
                          const Vec& v) {
  using Word = typename Fp8<T>::Word;
  constexpr int kLanes = kScaleBlock / Pack<T>::kCount;
  const int K = p.exchange.top_k, scales = p.hidden / kScaleBlock;
  if constexpr (W == Wire::kCopy) {
    for_rows(tokens, i.n, K, [&](size_t row) {
      if (i.there) store_row(reinterpret_cast<Vec*>(p.rows + row * p.row_bytes) + i.vec, v);
      if (i.vec >= 32 || p.row_scales == nullptr) return;
      for (int j = lane_id(); j < scales; j += 32) {
        p.row_scales[row * scales + j] = p.scales[size_t(t) * scales + j];
      }
    });
  } else {
    float scale;
    const Fp8<T> q = quantize(Pack<T>(v), p.power_of_two_scales, &scale);
    const Vec back = W == Wire::kDequantized ? dequantize(q, scale).vec : Vec{};
    for_rows(tokens, i.n, K, [&](size_t row) {
      if (!i.there) return;
      char* to = p.rows + row * p.row_bytes;
      if constexpr (W == Wire::kDequantized) {
        store_row(reinterpret_cast<Vec*>(to) + i.vec, back);
      } else {
        reinterpret_cast<Word*>(to)[i.vec] = q.word;
        if (i.vec % kLanes == 0) p.row_scales[row * scales + i.vec / kLanes] = scale;
      }
    });
  }
  if (i.vec < 32 && p.scalars != nullptr) place_scalars(p, tokens, i.n, p.scalars + t * K);
}

// Vecs of a row as it lies in its slot: what one lane takes of it.
template <Wire W, typename T>
__device__ int slot_vecs(const SlotDispatchParams& p, const SlotRow& lie) {
  return lie.bytes / (W == Wire::kDequantized ? Pack<T>::kCount : int(sizeof(Vec)));
}

// The rows of a peer's token here; its flag has been acquired.
template <Wire W, typename T>
__device__ void place_arrived(const SlotDispatchParams& p, const Tokens& tokens, const Item& i,
                              const SlotRow& lie, const char* slot) {
  using Word = typename Fp8<T>::Word;
  constexpr int kLanes = kScaleBlock / Pack<T>::kCount;
  const int K = p.exchange.top_k;
  const auto* scales = reinterpret_cast<const uint32_t*>(lie.scales_of(slot));
  if constexpr (W == Wire::kDequantized) {
    Vec back{};
    if (i.there) {
      Fp8<T> q(load_arrived(reinterpret_cast<const Word*>(slot) + i.vec));
      back = dequantize(q, __uint_as_float(load_arrived(scales + i.vec / kLanes))).vec;
    }
    for_rows(tokens, i.n, K, [&](size_t row) {
      if (i.there) store_row(reinterpret_cast<Vec*>(p.rows + row * p.row_bytes) + i.vec, back);
    });
  } else {
    const Vec v = i.there ? load_arrived(reinterpret_cast<const Vec*>(slot) + i.vec) : Vec{};
    for_rows(tokens, i.n, K, [&](size_t row) {
      if (i.there) store_row(reinterpret_cast<Vec*>(p.rows + row * p.row_bytes) + i.vec, v);
    });
    if (i.vec < 32 && p.row_scales != nullptr) {
      for (int j = lane_id(); j < lie.scales; j += 32) {
        const float scale = __uint_as_float(load_arrived(scales + j));
        for_rows(tokens, i.n, K, [&](size_t row) { p.row_scales[row * lie.scales + j] = scale; });
      }
    }
  }
  if (i.vec < 32) place_scalars(p, tokens, i.n, lie.scalars_of(slot));
}

// What no pair says of rows, by warp number `warp` of `warps` of the launch: experts, and zeros in
// padding, and in the tail if asked. Scalars are zero in both.
__device__ void describe_and_zero(const SlotDispatchParams& p, const SlotOp& s, const Segments& seg,
                                  int warp, int warps) {
  const int rows = p.exchange.num_rows, scales = p.hidden / kScaleBlock;
  for (int base = warp * 32; base < rows; base += warps * 32) {
    const int row = base + lane_id();
    int state = 0;
    if (row < rows) {
      state = expert_of_row(p.exchange, s.op.me, seg, row);
      p.plan.expert_ids[row] = max_int(state, -1);
      if (state < 0) p.plan.row_pair[row] = state;
      if (state < 0 && p.row_scalars != nullptr) p.row_scalars[row] = 0.0f;
    }
    const bool zero = state == kRowPadding || (state == kRowTail && p.zero_tail);
    for (unsigned todo = __ballot_sync(kAllLanes, zero); todo != 0; todo &= todo - 1) {
      const size_t r = base + __ffs(todo) - 1;
      auto* to = reinterpret_cast<Vec*>(p.rows + r * p.row_bytes);
      for (int v = lane_id(); v < p.row_bytes / int(sizeof(Vec)); v += 32) store_row(to + v, Vec{});
      if (p.row_scales == nullptr) continue;
      for (int j = lane_id(); j < scales; j += 32) p.row_scales[r * scales + j] = 0.0f;
    }
  }
}

// Whether there may be rows to zero: then the data warps describe rows too.
__device__ bool may_zero(const SlotDispatchParams& p) {
  return p.zero_tail || p.exchange.alignment > 1;
}

// By one warp of the data warps for each token: what the plan says of it, or (others) wait for its
// flag, if it has rows here. False: give up.
__device__ bool describe_or_await(const SlotDispatchParams& p, const PlanSizes& sizes,
                                  const SlotOp& s, const SlotShared& shared, const Share& share,
                                  int first, int count, const Tokens& tokens) {
  const int warp = threadIdx.x / 32, K = p.exchange.top_k;
  if (warp < count) describe_token(p, sizes, s, shared, share, warp, first + warp, tokens);
  const int n = warp - count;
  if (n < 0 || n >= count || first + n < share.own) return true;
  const bool here = lane_id() < K && tokens.here[n][lane_id()] >= 0;
  if (!__any_sync(kAllLanes, here) || lane_id() != 0) return true;
  const int source = share.source(first + n);
  return s.await(s.inbox(source).flag(share.token(first + n)), source, Phase::kRows);  // acquires
}

// By the data warps.
template <Wire W, typename T>
__device__ void place_rows(const SlotDispatchParams& p, const PlanSizes& sizes, const SlotOp& s,
                           const SlotShared& shared, const Share& share, const Early& early) {
  __shared__ Tokens tokens;
  const SlotRow lie = slot_row<W, T>(p);
  const int x_vecs = row_vecs<W, T>(p), vecs = slot_vecs<W, T>(p, lie);
  for (int first = 0; first < share.all; first += kSlotGroup) {
    const int count = min_int(kSlotGroup, share.all - first);
    const int own = min_int(max_int(share.own - first, 0), count);
    rank_tokens(p, sizes, s, shared, share, first, count, tokens);
    for_vecs(own, x_vecs, [&](const Item& i) {
      const int t = share.token(first + i.n);
      place_own<W, T>(p, tokens, i, t, vec_of_x(p, x_vecs, t, i, first == 0 ? &early : nullptr));
    });
    // What one thread has acquired, all threads may read.
    if (!data_and(describe_or_await(p, sizes, s, shared, share, first, count, tokens))) return;
    for_vecs(count - own, vecs, [&](Item i) {
      i.n += own;
      const char* slot = s.inbox(share.source(first + i.n)).slot(share.token(first + i.n));
      place_arrived<W, T>(p, tokens, i, lie, slot);
    });
    data_sync();  // `tokens` is the next group's
  }
  if (may_zero(p)) {
    describe_and_zero(p, s, shared.segments, blockIdx.x + gridDim.x * (threadIdx.x / 32),
                      gridDim.x * kDataWarps);
  }
}

// By the post warp, when the plan is there.
__device__ void post_plan(const SlotDispatchParams& p, const SlotOp& s, const SlotShared& shared) {
  if (!may_zero(p)) describe_and_zero(p, s, shared.segments, blockIdx.x, gridDim.x);
  if (blockIdx.x == gridDim.x - 1) {
    describe_experts(p.plan, p.exchange, s.op.me, shared.segments, shared.totals);
  }
  if (blockIdx.x == 0) s.await_hellos();
}

__device__ __noinline__ void poison_dispatch(const SlotDispatchParams& p) {
  const size_t rows = p.exchange.num_rows;
  poison_plan(p.plan, p.exchange);
  poison_bytes(p.rows, rows * p.row_bytes);
  poison_bytes(p.row_scales, rows * (p.hidden / kScaleBlock) * sizeof(float));
  poison_bytes(p.row_scalars, rows * sizeof(float));
}

template <Wire W, typename T>
__device__ void run_data_warps(const SlotDispatchParams& p, const PlanSizes& sizes, const SlotOp& s,
                               const SlotShared& shared, const Share& share, const Early& early,
                               bool* planned) {
  if (s.pushes() && share.R > 1) push_rows<W, T>(p, s, share.own, early);
  if (!s.receives()) return;
  const bool there = plan_segments(p, sizes, s, shared);
  if (threadIdx.x == 0) *planned = there;
  __syncwarp();
  bar_arrive(kPlanned, kSlotThreads);
  if (there) place_rows<W, T>(p, sizes, s, shared, share, early);
}

__device__ void run_post_warp(const SlotDispatchParams& p, const SlotOp& s,
                              const SlotShared& shared, const Share& share, const bool* planned) {
  if (s.pushes()) post_tokens(p, s, share.own);
  if (!s.receives()) return;
  bar_sync(kPlanned, kSlotThreads);
  if (*planned) post_plan(p, s, shared);
}

template <Wire W, typename T>
__device__ void dispatch_body(const SlotDispatchParams& p, const PlanSizes& sizes) {
  extern __shared__ __align__(16) char base[];
  __shared__ bool planned;
  const Share share(p.call.peers.rank, p.call.peers.num_ranks, p.exchange.num_tokens);
  const Early early = load_early(p, row_vecs<W, T>(p), share.own);
  const SlotOp s(p.call, SlotKind::kDispatch, p.half, p.started);
  const SlotShared shared(base, p.exchange);
  if (!s.began_broken()) {
    if (is_post_warp()) {
      run_post_warp(p, s, shared, share, &planned);
    } else {
      run_data_warps<W, T>(p, sizes, s, shared, share, early, &planned);
    }
  }
  s.leave(s.receives() ? nullptr : p.ticket, [&] {
    if (s.receives()) poison_dispatch(p);
  });
}

template <Wire W, typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_dispatch_kernel(const __grid_constant__ SlotDispatchParams p,
                         const __grid_constant__ PlanSizes sizes) {
  dispatch_body<W, T>(p, sizes);
}

template <Wire W, typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_dispatch_all_ranks(const SlotDispatchParams* p, const __grid_constant__ PlanSizes sizes) {
  dispatch_body<W, T>(p[blockIdx.y], sizes);
}

template <Wire W, typename T>
cudaError_t launch(const SlotDispatchParams* params, const Exchange& e, const Launch& how) {
  const int blocks = min_int(how.num_sms, e.num_ranks * e.num_tokens);
  const PlanSizes sizes(e, blocks);
  const size_t shared = SlotShared::bytes(e);
  if (how.all_ranks == 0) {
    slot_dispatch_kernel<W, T><<<blocks, kSlotThreads, shared, how.stream>>>(*params, sizes);
  } else if constexpr (kAllRanks) {
    slot_dispatch_all_ranks<W, T>
        <<<dim3(blocks, how.all_ranks), kSlotThreads, shared, how.stream>>>(params, sizes);
  } else {
    return cudaErrorNotSupported;
  }
  return cudaGetLastError();
}

template <Wire W, typename T>
cudaError_t load() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes,
                               reinterpret_cast<const void*>(&slot_dispatch_kernel<W, T>));
}

// Every compiled variant: rows as bytes, and two FP8 deliveries of three types.
template <typename Visit>
cudaError_t for_variant(Element x, Wire wire, Visit&& visit) {
  using Quantized = std::integral_constant<Wire, Wire::kQuantized>;
  using Dequantized = std::integral_constant<Wire, Wire::kDequantized>;
  if (wire == Wire::kCopy) return visit(std::integral_constant<Wire, Wire::kCopy>{}, float{});
  auto by_type = [&](auto type) {
    return wire == Wire::kQuantized ? visit(Quantized{}, type) : visit(Dequantized{}, type);
  };
  switch (x) {
    case Element::kBf16:
      return by_type(__nv_bfloat16{});
    case Element::kF16:
      return by_type(__half{});
    case Element::kF32:
      return by_type(float{});
    case Element::kFp8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_slot_dispatch(const SlotDispatchParams* params, const Exchange& e, Element x,
                                 Wire wire, const Launch& how) {
  return for_variant(x, wire, [&](auto w, auto type) {
    return launch<decltype(w)::value, decltype(type)>(params, e, how);
  });
}

cudaError_t load_slot_dispatch() {
  for (Wire wire : {Wire::kCopy, Wire::kQuantized, Wire::kDequantized}) {
    for (Element x : {Element::kBf16, Element::kF16, Element::kF32}) {
      const cudaError_t error = for_variant(
          x, wire, [](auto w, auto type) { return load<decltype(w)::value, decltype(type)>(); });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace jax_ep
