// SPDX-License-Identifier: Apache-2.0
// combine: rows back to their tokens, added up in a fixed order.
//
//   wire blocks                                     local blocks
//     await ready[s], take s's lease                  per chunk of my tokens:
//     per chunk of tokens of each other source s:       await done[r][chunk] of every other rank r
//       partial = my rows of the token, each times      per token, over ranks r in order:
//         its weight, added in row order                  r = me: the partial of my own rows
//       push it to partials[t][slot] on s                 else: partials[t][slot of r]
//       (scalars: to their pair on s)                   out[t] = their sum
//     signal done[me][chunk] on s
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

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kWirePercent = 50;
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

// The partial of one Vec of a token's row, rounded to T. All lanes of the warp take part.
template <typename T>
__device__ __forceinline__ Vec partial_of(const Rows& rows, bool weighted, int at, bool active) {
  constexpr int kBatch = 4;  // rows in flight
  float sum[Pack<T>::kCount] = {};
  for (int first = 0; first < rows.count; first += kBatch) {
    Vec v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j >= rows.count) break;
      const auto* row = reinterpret_cast<const Vec*>(of_lane(rows.row, first + j));
      if (active) v[j] = load_input(row + at);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j >= rows.count) break;
      const float weight = __shfl_sync(kAllLanes, rows.weight, first + j);
      const Pack<T> pack(v[j]);
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) {
        const float value = to_float(pack.element[i]);
        sum[i] = __fadd_rn(sum[i], weighted ? __fmul_rn(weight, value) : value);
      }
    }
  }
  Pack<T> out;
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) out.element[i] = from_float<T>(sum[i]);
  return out.vec;
}

template <typename T>
__device__ void push_partials(const Body& b) {
  __shared__ Borrowed peers;
  const CombineParams& p = b.p;
  if (!borrow_outputs(b.op, peers)) return;
  const int T_ = p.exchange.num_tokens, K = p.exchange.top_k, others = b.op.R - 1, lane = lane_id();
  const int row_bytes = p.hidden * int(sizeof(T)), vecs = row_bytes / int(sizeof(Vec));
  const int slots = partial_slots(p.exchange);
  for (int u = blockIdx.x; u < b.chunks * others; u += b.roles.wire) {
    const int c = u / others, source = (b.op.me + 1 + u % others) % b.op.R;
    const int end = min_int((c + 1) * b.chunk, T_);
    for (int t = c * b.chunk + threadIdx.x / 32; t < end; t += kWarps) {
      const size_t token = size_t(source) * T_ + t;
      if (p.row_scalars != nullptr && lane < K) {
        const int row = p.token_rows[token * K + lane];
        if (row >= 0) {  // the pair is one of `source`'s
          const size_t pair = p.row_pair[row] - size_t(source) * T_ * K;
          reinterpret_cast<float*>(peers.output[source][kScalars])[pair] = p.row_scalars[row];
        }
      }
      if (p.y == nullptr) continue;
      const Rows rows = rows_of(p, token, row_bytes);
      if (rows.count == 0) continue;
      const size_t at_slot = size_t(t) * slots + p.token_slot[token];
      if ((at_slot + 1) * row_bytes > peers.bytes[source][kPartials]) {
        b.op.fail(Fault::kBounds, Phase::kRows, source, at_slot, peers.bytes[source][kPartials]);
        return;
      }
      auto* to = reinterpret_cast<Vec*>(peers.output[source][kPartials] + at_slot * row_bytes);
      for (int base = 0; base < vecs; base += 32) {
        const int at = base + lane;
        const Vec partial = partial_of<T>(rows, p.weights != nullptr, at, at < vecs);
        if (at < vecs) store_row(to + at, partial);
      }
    }
    signal_chunk(b.op, c, source, source + 1);
    if (b.op.broken()) return;
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

template <typename T>
__device__ void sum_token(const Body& b, int t) {
  const CombineParams& p = b.p;
  const int row_bytes = p.hidden * int(sizeof(T)), vecs = row_bytes / int(sizeof(Vec));
  const Partials all = partials_of(b, t, row_bytes);
  const Rows own = rows_of(p, size_t(b.op.me) * p.exchange.num_tokens + t, row_bytes);
  auto* out = reinterpret_cast<Vec*>(p.out + size_t(t) * row_bytes);
  for (int base = 0; base < vecs; base += 32) {
    const int at = base + lane_id();
    float sum[Pack<T>::kCount] = {};
    for (int i = 0; i < all.count; ++i) {
      const auto* partial = reinterpret_cast<const Vec*>(of_lane(all.partial, i));
      Vec v = {};
      if (partial == nullptr) {
        v = partial_of<T>(own, p.weights != nullptr, at, at < vecs);
      } else if (at < vecs) {
        v = load_arrived(partial + at);
      }
      const Pack<T> pack(v);
#pragma unroll
      for (int j = 0; j < Pack<T>::kCount; ++j)
        sum[j] = __fadd_rn(sum[j], to_float(pack.element[j]));
    }
    Pack<T> total;
#pragma unroll
    for (int j = 0; j < Pack<T>::kCount; ++j) total.element[j] = from_float<T>(sum[j]);
    if (at < vecs) store_row(out + at, total.vec);
  }
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

template <typename T>
__device__ void sum_tokens(const Body& b) {
  const CombineParams& p = b.p;
  const int blocks = b.roles.local, first = gridDim.x - blocks;
  const int warp = (blockIdx.x - first) + blocks * (threadIdx.x / 32), warps = blocks * kWarps;
  for (int t = warp; t < p.exchange.num_tokens; t += warps) {
    if (p.row_scalars != nullptr) return_own_scalars(p, b.op.me, t);
    if (!await_chunk(b.op, t / b.chunk, 0, b.op.R)) return;
    if (p.y != nullptr) sum_token<T>(b, t);
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
  const Body b{p, op, split_roles(gridDim.x, op.R, kWirePercent), chunk, ceil_div(tokens, chunk)};
  if (!op.broken()) {
    if (blockIdx.x == 0) lend_outputs(op);
    if (int(blockIdx.x) < b.roles.wire) push_partials<T>(b);
    if (int(blockIdx.x) >= int(gridDim.x) - b.roles.local) sum_tokens<T>(b);
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

}  // namespace jax_ep
