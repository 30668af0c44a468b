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
constexpr int kWirePercent = 70;       // of blocks, where there is more than one item for each warp
constexpr int kSmallWirePercent = 50;  // where there is not
constexpr int kItemsPerWarp = 16;
enum Output { kPartials = 0, kScalars = 1 };

struct Body {
  const CombineParams& p;
  const Op& op;
  Roles roles;
  int chunk;  // tokens
  int chunks;
};

// Rows are added up in pieces, several rows in flight: 4 KiB a warp, in registers.
constexpr int kBatch = 2;  // Vecs of a lane
constexpr int kPieceVecs = 32 * kBatch;
constexpr int kRowsInFlight = 4;
static_assert(kSegmentVecs % kPieceVecs == 0, "a segment is cut into pieces");

// kBatch Vecs of each lane; Vec j is at `base + 32 * j + lane` of a row, absent from `last` on.
struct Piece {
  Vec v[kBatch];
};

__device__ __forceinline__ void store_piece(char* row, int base, int last, const Piece& piece) {
#pragma unroll
  for (int j = 0; j < kBatch; ++j) {
    const int at = base + 32 * j + lane_id();
    if (at < last) store_row(reinterpret_cast<Vec*>(row) + at, piece.v[j]);
  }
}

// Rows, or partials of rows: lane i holds the i-th and its weight.
struct Rows {
  const char* row = nullptr;
  float weight = 1.0f;
  int count = 0;  // the same in all lanes
};

// A float32 sum of pieces of type T.
template <typename T>
struct Sum {
  float value[kBatch][Pack<T>::kCount] = {};

  __device__ __forceinline__ void add(const Piece& piece, float weight) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const Pack<T> pack(piece.v[j]);
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) {
        value[j][i] = __fadd_rn(value[j][i], __fmul_rn(weight, to_float(pack.element[i])));
      }
    }
  }

  // The pieces at `base` of rows [first, end), in order.
  template <bool kArrived>
  __device__ __forceinline__ void add_rows(const Rows& rows, int first, int end, int base,
                                           int last) {
    for (int k = first; k < end; k += kRowsInFlight) {
      Piece piece[kRowsInFlight];
      float weight[kRowsInFlight];
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        const auto* from = reinterpret_cast<const Vec*>(of_lane(rows.row, k + r)) + lane_id();
        weight[r] = __shfl_sync(kAllLanes, rows.weight, k + r);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int at = base + 32 * j;
          if (k + r >= end || at + lane_id() >= last) continue;
          piece[r].v[j] = kArrived ? load_arrived(from + at) : load_input(from + at);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        if (k + r < end) add(piece[r], weight[r]);
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

// My rows of one token, in row order.
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

// My partial of the piece at `base`, rounded to T.
template <typename T>
__device__ __forceinline__ Piece partial_of(const Rows& rows, int base, int last) {
  Sum<T> sum;
  sum.template add_rows<false>(rows, 0, rows.count, base, last);
  return sum.rounded();
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

// Segments of other ranks' tokens: a ticket is for the same segment of the same token of every
// rank.
template <typename T>
__device__ void push_partials(const Body& b) {
  __shared__ Borrowed peers;
  const CombineParams& p = b.p;
  const int T_ = p.exchange.num_tokens, others = b.op.R - 1, warps = b.roles.wire * kWarps;
  const int row_bytes = p.hidden * int(sizeof(T)), vecs = row_bytes / int(sizeof(Vec));
  const int slots = partial_slots(p.exchange);
  const Cut cut = cut_rows(vecs, T_ * others, kItemsPerWarp * warps / 2);
  if (!borrow_outputs(b.op, peers)) return;
  Tickets tickets(&b.op.header().wire_ticket, blockIdx.x + b.roles.wire * (threadIdx.x / 32),
                  warps);
  auto finish = [&](int chunk, int source) {
    const int tokens = min_int(b.chunk, T_ - chunk * b.chunk);
    finish_item(b.op, chunk, tokens * cut.segments, source, source + 1);
  };
  // An item is finished when the next one is summed up: its pushes have arrived meanwhile, and
  // nobody waits for them.
  int pushed_chunk = 0, pushed_to = -1;
  for (int i; (i = tickets.take(T_ * cut.segments)) >= 0;) {
    const int t = i / cut.segments, segment = i % cut.segments, chunk = t / b.chunk;
    const int first = segment * cut.segment_vecs, last = min_int(first + cut.segment_vecs, vecs);
    for (int other = 1; other <= others; ++other) {
      const int source = (b.op.me + other) % b.op.R;
      const size_t token = size_t(source) * T_ + t;
      const uint64_t broken = b.op.broken_word();
      const Rows rows = rows_of(p, token, row_bytes);
      const size_t slot = size_t(t) * slots + p.token_slot[token];
      if (segment == 0 && p.row_scalars != nullptr) push_scalars(p, peers, source, token);
      const bool fits = (slot + 1) * row_bytes <= peers.bytes[source][kPartials];
      if (rows.count > 0 && !fits) {
        b.op.fail(Fault::kBounds, Phase::kRows, source, slot, peers.bytes[source][kPartials]);
      }
      char* to = peers.output[source][kPartials] + slot * row_bytes;
      for (int base = first; base < last; base += kPieceVecs) {
        const Piece partial = partial_of<T>(rows, base, last);
        if (base == first && pushed_to >= 0) finish(pushed_chunk, pushed_to);
        if (rows.count > 0 && fits) store_piece(to, base, last, partial);
      }
      pushed_chunk = chunk;
      pushed_to = source;
      if (__any_sync(kAllLanes, broken != 0)) return;
    }
  }
  if (pushed_to >= 0) finish(pushed_chunk, pushed_to);
}

// The partials of token t from other ranks, in the order of ranks; `below`: of ranks below mine.
__device__ Rows partials_of(const Body& b, int t, int row_bytes, int* below) {
  const CombineParams& p = b.p;
  const int K = p.exchange.top_k, lane = lane_id(), slots = partial_slots(p.exchange);
  const int rank = lane < K ? p.pair_rank[size_t(t) * K + lane] : -1;
  const bool kept = lane < K && p.pair_row[size_t(t) * K + lane] >= 0;
  Rows all;
  int slot = 0;
  *below = 0;
  for (unsigned todo = __ballot_sync(kAllLanes, rank >= 0 && rank != b.op.me); todo != 0; ++slot) {
    const int r = __reduce_min_sync(kAllLanes, (todo >> lane) & 1 ? rank : INT_MAX);
    if (__any_sync(kAllLanes, rank == r && kept)) {
      if (lane == all.count) all.row = p.partials + (size_t(t) * slots + slot) * row_bytes;
      ++all.count;
      *below += r < b.op.me;
    }
    todo &= ~__ballot_sync(kAllLanes, rank == r);
  }
  return all;
}

// Vecs [first, last) of the sum of token t. The first own partial is formed before the peers' are
// awaited. False: give up.
template <typename T>
__device__ bool sum_segment(const Body& b, int t, int first, int last) {
  const CombineParams& p = b.p;
  const int row_bytes = p.hidden * int(sizeof(T));
  int below;
  const Rows partials = partials_of(b, t, row_bytes, &below);
  const Rows rows = rows_of(p, size_t(b.op.me) * p.exchange.num_tokens + t, row_bytes);
  for (int base = first; base < last; base += kPieceVecs) {
    const Piece own = partial_of<T>(rows, base, last);
    if (base == first && !await_chunk(b.op, t / b.chunk, 0, b.op.R)) return false;
    Sum<T> sum;
    sum.template add_rows<true>(partials, 0, below, base, last);
    if (rows.count > 0) sum.add(own, 1.0f);
    sum.template add_rows<true>(partials, below, partials.count, base, last);
    store_piece(p.out + size_t(t) * row_bytes, base, last, sum.rounded());
  }
  return true;
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
    // Every chunk is awaited, whatever is in it: then nobody writes here any more.
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
  const int segments = ceil_div(p.hidden * int(sizeof(T)), kSegmentVecs * int(sizeof(Vec)));
  const bool small = tokens * segments <= int(gridDim.x) * kWarps;
  int percent = small ? kSmallWirePercent : kWirePercent;
  if (p.wire_percent > 0) percent = p.wire_percent;
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
