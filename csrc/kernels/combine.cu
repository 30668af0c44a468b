// SPDX-License-Identifier: Apache-2.0
// combine: rows back to their tokens, added up in a fixed order.
//
//   wire blocks                                     local blocks
//     await ready[s], take s's lease                  per segment of my tokens' rows:
//     per segment of a token of each source s:          own = the partial of my own rows
//       partial = my rows of the token, each times      await done[r][chunk] of every other rank r
//         its weight, added in row order                over ranks r in order, add
//       push it to partials[t][slot] on s                 r = me: own
//       (scalars: to their pair on s)                     else: partials[t][slot of r]
//       last of its chunk: signal done[me][chunk] on s  out[t] = the sum
//
// Products are rounded to float32 before they are added, partials to y's type, the own one too: the
// same bits whatever the number of blocks. A token's slot for rank r is the number of ranks below
// r, its source excepted, that its pairs name: both sides know it from the routing alone.
#include "../device/lend.cuh"
#include "../device/rows.cuh"
#include "../device/warp.cuh"
#include "launch.h"

namespace jax_ep {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kWirePercent = 50;  // of blocks
enum Output { kPartials = 0, kScalars = 1 };

struct Body {
  const CombineParams& p;
  const Op& op;
  Roles roles;
  int chunk;  // tokens
  int chunks;
};

// My rows of one token: lane i holds the i-th, in row order, and its weight.
struct Rows {
  const char* row = nullptr;
  float weight = 1.0f;
  int count = 0;  // the same in all lanes
};

__device__ Rows rows_of(const CombineParams& p, size_t token, int row_bytes) {
  const int K = p.exchange.top_k, lane = lane_id();
  const int row = lane < K ? p.token_rows[token * K + lane] : -1;
  Rows r;
  r.count = __popc(__ballot_sync(kAllLanes, row >= 0));
  if (row >= 0) {
    r.row = p.y + size_t(row) * row_bytes;
    if (p.weights != nullptr) r.weight = p.weights[row];
  }
  return r;
}

constexpr int kItemsPerWarp = 16;
constexpr int kBatch = 4;  // Vecs of a lane: one piece of a row is 32 * kBatch Vecs

// kBatch Vecs of a row, of each lane; Vec j is at `base + 32 * j + lane`, absent from `last` on.
struct Piece {
  Vec v[kBatch];
};

template <bool kArrived>
__device__ __forceinline__ Piece load_piece(const char* row, int base, int last) {
  Piece piece;
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int at = base + 32 * j + lane_id();
    const auto* from = reinterpret_cast<const Vec*>(row) + at;
    if (at < last) piece.v[j] = kArrived ? load_arrived(from) : load_input(from);
  }
  return piece;
}

__device__ __forceinline__ void store_piece(char* row, int base, int last, const Piece& piece) {
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int at = base + 32 * j + lane_id();
    if (at < last) store_row(reinterpret_cast<Vec*>(row) + at, piece.v[j]);
  }
}

// A float32 sum of pieces of type T.
template <typename T>
struct Sum {
  float value[kBatch][Pack<T>::kCount] = {};

  __device__ __forceinline__ void add(const Piece& piece, bool weighted, float weight) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const Pack<T> pack(piece.v[j]);
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) {
        const float x = to_float(pack.element[i]);
        value[j][i] = __fadd_rn(value[j][i], weighted ? __fmul_rn(weight, x) : x);
      }
    }
  }

  __device__ __forceinline__ Piece rounded() const {
    Piece piece;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) pack.element[i] = from_float<T>(value[j][i]);
      piece.v[j] = pack.vec;
    }
    return piece;
  }
};

// The partials of the pieces in [first, last) of a token's row, rounded to T: `emit(base, partial)`
// for each. Two rows are in flight while one is added, across the borders of pieces too. All lanes
// of the warp take part.
template <typename T, typename Emit>
__device__ __forceinline__ void for_partials(const Rows& rows, bool weighted, int first, int last,
                                             Emit&& emit) {
  int next_row = 0, next_base = first;
  auto fetch = [&] {
    Piece piece;
    if (next_base < last) {
      piece = load_piece<false>(of_lane(rows.row, next_row), next_base, last);
      if (++next_row == rows.count) {
        next_row = 0;
        next_base += kSegmentVecs;
      }
    }
    return piece;
  };
  Piece next = fetch();
  for (int base = first; base < last; base += kSegmentVecs) {
    Sum<T> sum;
    for (int k = 0; k < rows.count; ++k) {
      const Piece piece = next;
      next = fetch();
      sum.add(piece, weighted, __shfl_sync(kAllLanes, rows.weight, k));
    }
    emit(base, sum.rounded());
  }
}

// Scalars of my rows of one of `source`'s tokens, to their pairs there.
__device__ void push_scalars(const CombineParams& p, const Borrowed& peers, int source,
                             size_t token) {
  const int T_ = p.exchange.num_tokens, K = p.exchange.top_k;
  if (lane_id() >= K) return;
  const int row = p.token_rows[token * K + lane_id()];
  if (row < 0) return;
  const size_t pair = p.row_pair[row] - size_t(source) * T_ * K;
  reinterpret_cast<float*>(peers.output[source][kScalars])[pair] = p.row_scalars[row];
}

template <typename T>
__device__ void push_partials(const Body& b) {
  __shared__ Borrowed peers;
  const CombineParams& p = b.p;
  const int T_ = p.exchange.num_tokens, others = b.op.R - 1, warps = b.roles.wire * kWarps;
  const int row_bytes = p.hidden * int(sizeof(T)), vecs = row_bytes / int(sizeof(Vec));
  const int slots = partial_slots(p.exchange);
  const Cut cut = cut_rows(vecs, T_ * others, kItemsPerWarp * warps / 2);
  const int per_token = others * cut.segments;
  if (!borrow_outputs(b.op, peers)) return;
  Tickets tickets(&b.op.header().wire_ticket, blockIdx.x + b.roles.wire * (threadIdx.x / 32),
                  warps);
  for (int i; (i = tickets.take(T_ * per_token)) >= 0;) {
    const int t = i / per_token, rest = i % per_token, segment = rest % cut.segments;
    const int source = (b.op.me + 1 + rest / cut.segments) % b.op.R, chunk = t / b.chunk;
    const size_t token = size_t(source) * T_ + t;
    const uint64_t broken = b.op.broken_word();
    if (segment == 0 && p.row_scalars != nullptr) push_scalars(p, peers, source, token);
    const Rows rows = rows_of(p, token, row_bytes);
    const size_t slot = size_t(t) * slots + p.token_slot[token];
    if (rows.count > 0 && (slot + 1) * row_bytes > peers.bytes[source][kPartials]) {
      b.op.fail(Fault::kBounds, Phase::kRows, source, slot, peers.bytes[source][kPartials]);
    } else if (rows.count > 0) {
      const int first = segment * cut.segment_vecs;
      char* to = peers.output[source][kPartials] + slot * row_bytes;
      for_partials<T>(
          rows, p.weights != nullptr, first, min_int(first + cut.segment_vecs, vecs),
          [&](int base, const Piece& partial) { store_piece(to, base, vecs, partial); });
    }
    const int in_chunk = min_int(b.chunk, T_ - chunk * b.chunk) * cut.segments;
    finish_item(b.op, chunk, in_chunk, source, source + 1);
    if (__any_sync(kAllLanes, broken != 0)) return;
  }
}

// The ranks that hold rows of one of my tokens, in order: lane i holds the i-th's partial, null for
// my own.
struct Partials {
  const char* partial = nullptr;
  int count = 0;  // the same in all lanes
};

__device__ Partials partials_of(const Body& b, int t, int row_bytes) {
  const CombineParams& p = b.p;
  const int K = p.exchange.top_k, lane = lane_id(), slots = partial_slots(p.exchange);
  const int rank = lane < K ? p.pair_rank[size_t(t) * K + lane] : -1;
  const bool kept = lane < K && p.pair_row[size_t(t) * K + lane] >= 0;
  Partials all;
  int slot = 0;
  for (unsigned todo = __ballot_sync(kAllLanes, rank >= 0); todo != 0;) {
    const bool waiting = (todo >> lane) & 1;
    const int r = __reduce_min_sync(kAllLanes, waiting ? rank : INT_MAX);
    const unsigned same = __ballot_sync(kAllLanes, rank == r);
    if (__any_sync(kAllLanes, rank == r && kept)) {
      if (lane == all.count && r != b.op.me) {
        all.partial = p.partials + (size_t(t) * slots + slot) * row_bytes;
      }
      ++all.count;
    }
    if (r != b.op.me) ++slot;
    todo &= ~same;
  }
  return all;
}

// Vecs [first, last) of the sum of token t. The first own partial is in registers before the peers'
// are awaited. False: give up.
template <typename T>
__device__ bool sum_segment(const Body& b, int t, int first, int last) {
  const CombineParams& p = b.p;
  const int row_bytes = p.hidden * int(sizeof(T));
  const Partials all = partials_of(b, t, row_bytes);
  const Rows rows = rows_of(p, size_t(b.op.me) * p.exchange.num_tokens + t, row_bytes);
  bool awaited = false, arrived = true;
  auto finish = [&](int base, const Piece& own) {
    if (!awaited) arrived = await_chunk(b.op, t / b.chunk, 0, b.op.R);
    awaited = true;
    if (!arrived) return;
    Sum<T> sum;
    for (int i = 0; i < all.count; ++i) {
      const char* partial = of_lane(all.partial, i);
      sum.add(partial == nullptr ? own : load_piece<true>(partial, base, last), false, 1.0f);
    }
    store_piece(p.out + size_t(t) * row_bytes, base, last, sum.rounded());
  };
  if (rows.count > 0) {
    for_partials<T>(rows, p.weights != nullptr, first, last, finish);
  } else {
    for (int base = first; base < last; base += kSegmentVecs) finish(base, Piece{});
  }
  return arrived;
}

// Scalars of my pairs whose rows are here, and zero for pairs without a row.
__device__ void return_own_scalars(const CombineParams& p, int me, int t) {
  const int K = p.exchange.top_k, lane = lane_id();
  if (lane >= K) return;
  const size_t pair = size_t(t) * K + lane;
  const int row = p.pair_row[pair];
  if (row < 0) {
    p.scalars[pair] = 0.0f;
  } else if (p.pair_rank[pair] == me) {
    p.scalars[pair] = p.row_scalars[row];
  }
}

// Local work, by all blocks: those that push come when they have pushed.
template <typename T>
__device__ void sum_tokens(const Body& b) {
  const CombineParams& p = b.p;
  const int tokens = p.exchange.num_tokens, vecs = p.hidden * int(sizeof(T)) / int(sizeof(Vec));
  const Cut cut = cut_rows(vecs, tokens, kItemsPerWarp * int(gridDim.x) * kWarps / 2);
  const int warp = local_warp(b.roles, blockIdx.x, gridDim.x, threadIdx.x / 32, kWarps);
  Tickets tickets(&b.op.header().local_ticket, warp, b.roles.local * kWarps);
  for (int i; (i = tickets.take(tokens * cut.segments)) >= 0;) {
    const int t = i / cut.segments, segment = i % cut.segments, first = segment * cut.segment_vecs;
    if (segment == 0 && p.row_scalars != nullptr) return_own_scalars(p, b.op.me, t);
    const bool arrived = p.y != nullptr
                             ? sum_segment<T>(b, t, first, min_int(first + cut.segment_vecs, vecs))
                             : await_chunk(b.op, t / b.chunk, 0, b.op.R);
    if (!arrived) return;
  }
}

__device__ void poison_combine(const CombineParams& p, int row_bytes) {
  const size_t tokens = p.exchange.num_tokens;
  if (p.y != nullptr) poison_bytes(p.out, tokens * row_bytes);
  if (p.row_scalars != nullptr) poison_bytes(p.scalars, tokens * p.exchange.top_k * sizeof(float));
}

template <typename T>
__device__ void combine_body(const CombineParams& p) {
  const Op op(p.call);
  const int tokens = p.exchange.num_tokens, chunk = chunk_tokens(tokens, kMaxChunks);
  const int percent = p.wire_percent > 0 ? p.wire_percent : kWirePercent;
  const Body b{p, op, split_roles(gridDim.x, op.R, percent), chunk, ceil_div(tokens, chunk)};
  if (!op.began_broken()) {
    if (blockIdx.x == 0) lend_outputs(op);
    if (int(blockIdx.x) < b.roles.wire) push_partials<T>(b);
    sum_tokens<T>(b);
  }
  op.leave([&] { poison_combine(p, p.hidden * sizeof(T)); });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(const __grid_constant__ CombineParams p) {
  combine_body<T>(p);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) combine_all_ranks(const CombineParams* p) {
  combine_body<T>(p[blockIdx.y]);
}

template <typename T>
cudaError_t launch(const CombineParams* params, const Launch& how) {
  if (how.all_ranks) {
    combine_all_ranks<T><<<dim3(how.num_sms, how.all_ranks), kThreads, 0, how.stream>>>(params);
  } else {
    combine_kernel<T><<<how.num_sms, kThreads, 0, how.stream>>>(*params);
  }
  return cudaPeekAtLastError();
}

}  // namespace

// Every compiled variant: one for each type of y.
cudaError_t launch_combine(const CombineParams* params, Element y, const Launch& how) {
  switch (y) {
    case Element::kBf16:
      return launch<__nv_bfloat16>(params, how);
    case Element::kF16:
      return launch<__half>(params, how);
    case Element::kF32:
      return launch<float>(params, how);
    case Element::kFp8:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t load_combine() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(&combine_kernel<__nv_bfloat16>),
                             reinterpret_cast<const void*>(&combine_kernel<__half>),
                             reinterpret_cast<const void*>(&combine_kernel<float>)}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_ep
