// SPDX-License-Identifier: Apache-2.0
// combine of a small batch: one launch, one flight, no lease.
//
//           data warps                                   post warp (of each block)
//   start   per token of a peer with rows here (a
//           block has one, or few):
//             partial = its rows here, each times its
//               weight, added in row order -> the token's
//               slot on its source (quantised on the way,
//               if asked)
//                                  partials are pushed ->  the token's flag there
//   done    per token of mine:                             every peer's hello
//             own = the partial of its rows here
//             await the flag of each other rank that has
//               rows of it
//             over these ranks in order, add -> out[t]
//
// `start` and `done` are one launch or two. Products are rounded to float32 before they are added,
// partials to y's type, the own one too: the large path's bits. Slots, and who may overwrite them
// when: device/slots.cuh.
#include "../device/rows.cuh"
#include "../device/slots.cuh"
#include "launch.h"

namespace jax_ep {
namespace {

constexpr int kGroup = 8;     // tokens that a block takes at a time
constexpr int kInFlight = 4;  // rows whose loads a thread has issued

// What a block works on: tokens of peers, whose partials it pushes, and tokens of its own rank,
// which it adds up; the i-th of each.
struct Share {
  int peers, own;  // how many
  int me, R, T;

  __device__ Share(int me, int R, int T)
      : peers(count(last(), (R - 1) * T)), own(count(blockIdx.x, T)), me(me), R(R), T(T) {}
  __device__ int source(int i) const { return (me + 1 + (last() + i * gridDim.x) / T) % R; }
  __device__ int peer_token(int i) const { return (last() + i * gridDim.x) % T; }
  __device__ int own_token(int i) const { return blockIdx.x + i * gridDim.x; }

 private:
  // Peers' tokens are dealt out from the last block on, which has fewer of its own.
  __device__ static int last() { return gridDim.x - 1 - blockIdx.x; }
  __device__ static int count(int first, int n) {
    return first < n ? ceil_div(n - first, gridDim.x) : 0;
  }
};

// The rows here of up to kGroup tokens, in row order, and their weights.
struct Rows {
  int row[kGroup][kMaxTopK];
  float weight[kGroup][kMaxTopK];
  int count[kGroup];
};

// Which ranks hold rows of up to kGroup tokens of mine.
struct Holders {
  unsigned low[kGroup], high[kGroup];
  __device__ bool has(int n, int rank) const {
    return (rank < 32 ? low[n] : high[n]) >> (rank % 32) & 1;
  }
};

// A block's shared memory.
struct Found {
  Rows peers, own;
  Holders holders;
};

// By one warp: of token `token` of the group, the n-th at hand.
__device__ void find_rows(const SlotCombineParams& p, int token, int n, Rows& rows) {
  const int K = p.exchange.top_k, k = lane_id();
  const int row = k < K ? p.token_rows[size_t(token) * K + k] : -1;
  const unsigned kept = __ballot_sync(kAllLanes, row >= 0);  // the first ones
  if (row >= 0) {
    rows.row[n][k] = row;
    rows.weight[n][k] = p.weights != nullptr ? p.weights[row] : 1.0f;
  }
  if (k == 0) rows.count[n] = __popc(kept);
}

// By one warp: of my token t, the n-th at hand.
__device__ void find_holders(const SlotCombineParams& p, int t, int n, Holders& holders) {
  const int K = p.exchange.top_k, k = lane_id(), pair = t * K + k;
  const int rank = k < K && p.pair_row[pair] >= 0 ? p.pair_rank[pair] : -1;
  const RankSet set = RankSet::of_lanes(rank);
  if (k != 0) return;
  holders.low[n] = set.low;
  holders.high[n] = set.high;
}

// By three times kGroup data warps: all that, of the tokens from the first-th on of both kinds.
__device__ void find(const SlotCombineParams& p, const Share& share, int first, Found& found) {
  const int n = threadIdx.x / 32 % kGroup, i = first + n;
  switch (threadIdx.x / 32 / kGroup) {
    case 0:
      if (i < share.peers)
        find_rows(p, share.source(i) * share.T + share.peer_token(i), n, found.peers);
      break;
    case 1:
      if (i < share.own) find_rows(p, share.me * share.T + share.own_token(i), n, found.own);
      break;
    case 2:
      if (i < share.own) find_holders(p, share.own_token(i), n, found.holders);
      break;
  }
}

// Float32 sums of one Vec of a row.
template <typename T>
struct Sum {
  static constexpr int kCount = Pack<T>::kCount;
  float value[kCount] = {};

  __device__ void add(const Vec& v, bool weighted, float weight) {
    const Pack<T> x(v);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float f = to_float(x.element[i]);
      value[i] = __fadd_rn(value[i], weighted ? __fmul_rn(weight, f) : f);
    }
  }
  __device__ void add(const Fp8<T>& q, float scale) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      value[i] = __fadd_rn(value[i], __fmul_rn(to_float(q, i), scale));
    }
  }
  __device__ Pack<T> rounded() const {
    Pack<T> x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.element[i] = from_float<T>(value[i]);
    return x;
  }
};

// Vec `vec` of the partial of the rows of token `n`.
template <typename T>
__device__ Pack<T> partial_of(const SlotCombineParams& p, const Rows& rows, int n, int vec,
                              int row_bytes) {
  Sum<T> sum;
  const int count = rows.count[n];
#pragma unroll 1
  for (int base = 0; base < count; base += kInFlight) {
    Vec v[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (base + j >= count) break;
      const char* row = p.y + size_t(rows.row[n][base + j]) * row_bytes;
      v[j] = load_input(reinterpret_cast<const Vec*>(row) + vec);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (base + j < count) sum.add(v[j], p.weights != nullptr, rows.weight[n][base + j]);
    }
  }
  return sum.rounded();
}

template <typename T>
__device__ SlotRow slot_row(const SlotCombineParams& p) {
  if (p.quantized) return {p.hidden, p.hidden / kScaleBlock};
  return {p.hidden * int(sizeof(T)), 0};
}

// By the data warps: partials of the block's peers' tokens from the first-th on, `count` of them.
template <typename T>
__device__ void push_group(const SlotCombineParams& p, const SlotOp& s, const Share& share,
                           int first, int count, const Rows& rows) {
  using Word = typename Fp8<T>::Word;
  constexpr int kLanes = kScaleBlock / Pack<T>::kCount;
  const int row_bytes = p.hidden * int(sizeof(T)), vecs = row_bytes / int(sizeof(Vec));
  const SlotRow lie = slot_row<T>(p);
  const int padded = (vecs + 31) / 32 * 32;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * padded; i += kDataThreads) {
    const int n = i / padded, vec = i - n * padded;
    if (rows.count[n] == 0) continue;
    char* slot = s.outbox(share.source(first + n)).slot(share.peer_token(first + n));
    const Pack<T> partial = vec < vecs ? partial_of<T>(p, rows, n, vec, row_bytes) : Pack<T>(Vec{});
    if (p.quantized) {
      float scale;
      const Fp8<T> q = quantize(partial, p.power_of_two_scales, &scale);
      if (vec < vecs) {
        reinterpret_cast<Word*>(slot)[vec] = q.word;
        if (vec % kLanes == 0) lie.scales_of(slot)[vec / kLanes] = scale;
      }
    } else if (vec < vecs) {
      store_row(reinterpret_cast<Vec*>(slot) + vec, partial.vec);
    }
  }
}

// By the data warps. The first group has been found.
template <typename T>
__device__ void push_partials(const SlotCombineParams& p, const SlotOp& s, const Share& share,
                              Found& found) {
#pragma unroll 1
  for (int first = 0; first < share.peers; first += kGroup) {
    if (first > 0) {
      find(p, share, first, found);
      data_sync();
    }
    push_group<T>(p, s, share, first, min_int(kGroup, share.peers - first), found.peers);
    rows_pushed(first + kGroup >= share.peers);
  }
}

// By the post warp: flags of the partials, once they are pushed.
__device__ void post_partials(const SlotCombineParams& p, const SlotOp& s, const Share& share) {
  if (blockIdx.x == 0) s.greet();
#pragma unroll 1
  for (int first = 0; first < share.peers; first += kGroup) {
    const int i = first + lane_id();
    const bool mine = lane_id() < kGroup && i < share.peers;
    const int source = share.source(i), t = share.peer_token(i);
    const bool any = mine && p.token_rows[(size_t(source) * share.T + t) * p.exchange.top_k] >= 0;
    rows_pushed(first + kGroup >= share.peers);
    if (any) store_release_sys(s.outbox(source).flag(t), s.tag);  // publishes the partial
  }
}

// By the data warps: wait for the partials of the block's own tokens from the first-th on. False,
// for this thread: give up.
__device__ bool await_group(const SlotOp& s, const Share& share, int first, int count,
                            const Holders& holders) {
  bool there = true;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * share.R; i += kDataThreads) {
    const int n = i / share.R, r = i % share.R;
    if (r != share.me && holders.has(n, r)) {
      there &= s.await(s.inbox(r).flag(share.own_token(first + n)), r, Phase::kRows);  // acquires
    }
  }
  return there;
}

// Vec `vec` of the sum over ranks of token `t`, the n-th of the block.
template <typename T>
__device__ Pack<T> sum_ranks(const SlotCombineParams& p, const SlotOp& s, const Holders& holders,
                             const SlotRow& lie, int n, int t, int vec, const Pack<T>& own) {
  using Word = typename Fp8<T>::Word;
  constexpr int kLanes = kScaleBlock / Pack<T>::kCount;
  Sum<T> sum;
#pragma unroll 1
  for (int r = 0; r < s.op.R; ++r) {
    if (!holders.has(n, r)) continue;
    if (r == s.op.me) {
      sum.add(own.vec, false, 1.0f);
      continue;
    }
    const char* slot = s.inbox(r).slot(t);
    if (p.quantized) {
      const auto* scale = reinterpret_cast<const uint32_t*>(lie.scales_of(slot)) + vec / kLanes;
      const Fp8<T> q(load_arrived(reinterpret_cast<const Word*>(slot) + vec));
      sum.add(q, __uint_as_float(load_arrived(scale)));
    } else {
      sum.add(load_arrived(reinterpret_cast<const Vec*>(slot) + vec), false, 1.0f);
    }
  }
  return sum.rounded();
}

// By the data warps: sums of the block's own tokens from the first-th on. The first own partials
// are in registers before the peers' are awaited. False, for all of them: give up.
template <typename T>
__device__ bool sum_group(const SlotCombineParams& p, const SlotOp& s, const Share& share,
                          int first, int count, const Found& found) {
  const int row_bytes = p.hidden * int(sizeof(T)), vecs = row_bytes / int(sizeof(Vec));
  const int all = count * vecs;
  const SlotRow lie = slot_row<T>(p);
#pragma unroll 1
  for (int base = 0; base < all; base += kDataThreads) {  // the same for all threads
    const int i = base + threadIdx.x, n = i / vecs, vec = i - n * vecs;
    const Pack<T> own = i < all ? partial_of<T>(p, found.own, n, vec, row_bytes) : Pack<T>(Vec{});
    // What one thread has acquired, all threads may read.
    if (base == 0 && !data_and(await_group(s, share, first, count, found.holders))) return false;
    if (i >= all) break;
    const int t = share.own_token(first + n);
    const Pack<T> sum = sum_ranks(p, s, found.holders, lie, n, t, vec, own);
    store_row(reinterpret_cast<Vec*>(p.out + size_t(t) * row_bytes) + vec, sum.vec);
  }
  return true;
}

// By the data warps. The first group has been found, unless pushing has taken its place.
template <typename T>
__device__ void sum_tokens(const SlotCombineParams& p, const SlotOp& s, const Share& share,
                           Found& found) {
  const bool replaced = s.pushes() && share.peers > kGroup;
#pragma unroll 1
  for (int first = 0; first < share.own; first += kGroup) {
    if (first > 0 || replaced) {
      data_sync();  // the last group's is in use until then
      find(p, share, first, found);
      data_sync();
    }
    if (!sum_group<T>(p, s, share, first, min_int(kGroup, share.own - first), found)) return;
  }
}

template <typename T>
__device__ void combine_body(const SlotCombineParams& p) {
  __shared__ Found found;
  const Share share(p.call.peers.rank, p.call.peers.num_ranks, p.exchange.num_tokens);
  if (!is_post_warp()) find(p, share, 0, found);
  const SlotOp s(p.call, SlotKind::kCombine, p.half, p.started);  // its barrier publishes `found`
  const bool broken = s.began_broken();
  if (!broken && is_post_warp()) {
    if (s.pushes()) post_partials(p, s, share);
    if (s.receives() && blockIdx.x == 0) s.await_hellos();
  } else if (!broken) {
    if (s.pushes()) push_partials<T>(p, s, share, found);
    if (s.receives()) sum_tokens<T>(p, s, share, found);
  }
  s.leave(s.receives() ? nullptr : p.ticket, [&] {
    if (s.receives()) {
      poison_bytes(p.out, size_t(p.exchange.num_tokens) * p.hidden * sizeof(T));
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_combine_kernel(const __grid_constant__ SlotCombineParams p) {
  combine_body<T>(p);
}

template <typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_combine_all_ranks(const SlotCombineParams* p) {
  combine_body<T>(p[blockIdx.y]);
}

template <typename T>
cudaError_t launch(const SlotCombineParams* params, const Exchange& e, const Launch& how) {
  const int blocks = min_int(how.num_sms, max_int(e.num_ranks - 1, 1) * e.num_tokens);
  if (how.all_ranks == 0) {
    slot_combine_kernel<T><<<blocks, kSlotThreads, 0, how.stream>>>(*params);
  } else if constexpr (kAllRanks) {
    slot_combine_all_ranks<T><<<dim3(blocks, how.all_ranks), kSlotThreads, 0, how.stream>>>(params);
  } else {
    return cudaErrorNotSupported;
  }
  return cudaGetLastError();
}

}  // namespace

// Every compiled variant: one for each type of y.
cudaError_t launch_slot_combine(const SlotCombineParams* params, const Exchange& e, Element y,
                                const Launch& how) {
  switch (y) {
    case Element::kBf16:
      return launch<__nv_bfloat16>(params, e, how);
    case Element::kF16:
      return launch<__half>(params, e, how);
    case Element::kF32:
      return launch<float>(params, e, how);
    case Element::kFp8:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t load_slot_combine() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(&slot_combine_kernel<__nv_bfloat16>),
                             reinterpret_cast<const void*>(&slot_combine_kernel<__half>),
                             reinterpret_cast<const void*>(&slot_combine_kernel<float>)}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_ep
