// SPDX-License-Identifier: Apache-2.0
// dispatch: every row to its final place in the receiver's own output buffer, no staging.
//
//   wire blocks                                  local blocks
//     await ready[d], take d's lease               own tokens: load a row once, store it to each of
//     per token (or a segment of its row):           its rows here
//       load it once (quantise it),                padding (and tail): store zeros
//       push it to its first row on each           per token of each source s:
//       other destination rank                       await done[s][chunk]
//       last of its chunk: signal                    copy its first row to its others
//         done[me][chunk] on every peer
//
// One copy of a token crosses the link per destination rank. Rows are written by exactly one party:
// a first row by its source, the others by the receiver, padding by the receiver. Wire blocks never
// wait for local blocks, of any rank, before they have pushed; then they join them. They come first
// in the grid, so they are resident first, and all of them must be, sooner or later.
// A launch ends when every chunk of every source has been awaited: then nobody else writes here.
#include "../device/lend.cuh"
#include "../device/rows.cuh"
#include "../device/warp.cuh"
#include "launch.h"

namespace jax_ep {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kWirePercent = 50;  // of blocks
constexpr int kFp8WirePercent = 36;
constexpr int kLead = 8;  // chunks
enum Output { kRows = 0, kScales = 1, kScalars = 2 };

// Up to 32 places that one row goes to: lane i holds the i-th.
struct Targets {
  char* row = nullptr;
  float* scales = nullptr;
  int count = 0;  // the same in all lanes
};

constexpr int kBatch = 4;  // Vecs of a lane in flight

// Vecs [first, last) of the row at `from` to the same place in every target.
template <bool kArrived>
__device__ void copy_row(const char* from, const Targets& to, int first, int last) {
  const auto* source = reinterpret_cast<const Vec*>(from);
  for (int base = first; base < last; base += 32 * kBatch) {
    Vec v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      if (at < last) v[j] = kArrived ? load_arrived(source + at) : load_input(source + at);
    }
    for (int i = 0; i < to.count; ++i) {
      auto* target = reinterpret_cast<Vec*>(of_lane(to.row, i));
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = base + j * 32 + lane_id();
        if (at < last) store_row(target + at, v[j]);
      }
    }
  }
}

// `count` scales at `from` to every target.
__device__ void copy_scales(const float* from, const Targets& to, int count) {
  for (int j = 0; j < count; j += 32) {
    const int at = j + lane_id();
    const float scale = at < count ? *reinterpret_cast<const volatile float*>(from + at) : 0.0f;
    for (int i = 0; i < to.count; ++i) {
      float* target = of_lane(to.scales, i);
      if (at < count) target[at] = scale;
    }
  }
}

// Vecs [first, last) of the row at `x`, quantised: to e4m3 and scales in every target, or (kBack)
// back to T. `first` is a multiple of a scale's block.
template <typename T, bool kBack>
__device__ void quantize_row(const DispatchParams& p, const T* x, const Targets& to, int first,
                             int last) {
  constexpr int kCount = Pack<T>::kCount, kLanes = kScaleBlock / kCount;
  using Word = typename Fp8<T>::Word;
  const auto* source = reinterpret_cast<const Vec*>(x);
  for (int base = first; base < last; base += 32 * kBatch) {
    Pack<T> v[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      v[j].vec = at < last ? load_input(source + at) : Vec{};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      float scale;
      const Fp8<T> q = quantize(v[j], p.power_of_two_scales, &scale);
      const Vec back = kBack ? dequantize(q, scale).vec : Vec{};
      for (int i = 0; i < to.count; ++i) {
        char* row = of_lane(to.row, i);
        float* scales = of_lane(to.scales, i);
        if (at >= last) continue;
        if constexpr (kBack) {
          store_row(reinterpret_cast<Vec*>(row) + at, back);
        } else {
          reinterpret_cast<Word*>(row)[at] = q.word;
          if (at % kLanes == 0) scales[at / kLanes] = scale;
        }
      }
    }
  }
}

// A row that arrived as {e4m3 [H], scales [H/128]} at the start of its place: to T in every target,
// its own place included. The values of Vec v lie at byte v * kCount and go to byte v * 16, so
// going down from the last never overwrites what is still to be read; the scales are held in shared
// memory.
template <typename T>
__device__ void dequantize_row(const DispatchParams& p, const char* from, const Targets& to,
                               float* held) {
  constexpr int kCount = Pack<T>::kCount, kLanes = kScaleBlock / kCount, kStep = 32 * kBatch;
  using Word = typename Fp8<T>::Word;
  for (int j = lane_id(); j < p.hidden / kScaleBlock; j += 32) {
    held[j] = *reinterpret_cast<const volatile float*>(from + p.hidden + j * sizeof(float));
  }
  __syncwarp();
  const int vecs = p.hidden / kCount;
  for (int base = (vecs - 1) / kStep * kStep; base >= 0; base -= kStep) {
    Fp8<T> q[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      if (at < vecs) q[j].word = load_arrived(reinterpret_cast<const Word*>(from) + at);
    }
    __syncwarp();  // every lane has read before any lane writes
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = base + j * 32 + lane_id();
      const Vec back = at < vecs ? dequantize(q[j], held[at / kLanes]).vec : Vec{};
      for (int i = 0; i < to.count; ++i) {
        auto* target = reinterpret_cast<Vec*>(of_lane(to.row, i));
        if (at < vecs) store_row(target + at, back);
      }
    }
  }
  __syncwarp();
}

struct Body {
  const DispatchParams& p;
  const Op& op;
  Roles roles;
  int chunk;  // tokens
  int chunks;
};

// Where token t's row goes on other ranks: one target per rank, its first kept row there. Scalars
// of its pairs go to their rows on the way.
__device__ Targets remote_targets(const Body& b, const Borrowed& peers, int t, bool with_scalars) {
  const DispatchParams& p = b.p;
  const int K = p.exchange.top_k, lane = lane_id();
  int rank = -1, row = -1;
  if (lane < K) {
    rank = p.pair_rank[size_t(t) * K + lane];
    row = p.pair_row[size_t(t) * K + lane];
  }
  bool remote = row >= 0 && rank != b.op.me;
  if (remote && uint64_t(row + 1) * p.row_bytes > peers.bytes[rank][kRows]) {
    b.op.fail(Fault::kBounds, Phase::kRows, rank, row, peers.bytes[rank][kRows]);
    remote = false;
  }
  if (remote && with_scalars && p.scalars != nullptr) {
    reinterpret_cast<float*>(peers.output[rank][kScalars])[row] = p.scalars[size_t(t) * K + lane];
  }
  Targets to;
  const int scale_count = p.hidden / kScaleBlock;
  for (unsigned todo = __ballot_sync(kAllLanes, remote); todo != 0; ++to.count) {
    const int d = __shfl_sync(kAllLanes, rank, __ffs(todo) - 1);
    const bool same = remote && rank == d;
    const int first = __reduce_min_sync(kAllLanes, same ? row : INT_MAX);
    if (lane == to.count) {
      to.row = peers.output[d][kRows] + size_t(first) * p.row_bytes;
      to.scales = reinterpret_cast<float*>(peers.output[d][kScales]) + size_t(first) * scale_count;
    }
    todo &= ~__ballot_sync(kAllLanes, same);
  }
  return to;
}

// The rows of source token `token` (source * T + t) here.
__device__ Targets local_targets(const DispatchParams& p, size_t token) {
  const int K = p.exchange.top_k, lane = lane_id();
  const int row = lane < K ? p.token_rows[token * K + lane] : -1;
  Targets to;
  to.count = __popc(__ballot_sync(kAllLanes, row >= 0));
  if (row >= 0) {
    to.row = p.rows + size_t(row) * p.row_bytes;
    to.scales = p.row_scales + size_t(row) * (p.hidden / kScaleBlock);
  }
  return to;
}

__device__ Targets without_first(Targets all) {
  all.row = of_lane(all.row, lane_id() + 1);
  all.scales = of_lane(all.scales, lane_id() + 1);
  --all.count;
  return all;
}

// Row `t` of x, Vecs [first, last) as they come, to every target.
template <Wire W, typename T, bool kBack>
__device__ void send_row(const DispatchParams& p, int t, const Targets& to, int first, int last) {
  if constexpr (W == Wire::kCopy) {
    copy_row<false>(p.x + size_t(t) * p.row_bytes, to, first, last);
    if (first == 0 && p.scales != nullptr) {
      const int count = p.hidden / kScaleBlock;
      copy_scales(p.scales + size_t(t) * count, to, count);
    }
  } else {
    quantize_row<T, kBack>(p, reinterpret_cast<const T*>(p.x) + size_t(t) * p.hidden, to, first,
                           last);
  }
}

// Vecs of a row of x.
template <Wire W, typename T>
__device__ int row_vecs(const DispatchParams& p) {
  return (W == Wire::kCopy ? p.row_bytes : p.hidden * int(sizeof(T))) / int(sizeof(Vec));
}

template <Wire W, typename T>
__device__ void push_tokens(const Body& b) {
  __shared__ Borrowed peers;
  const DispatchParams& p = b.p;
  const int tokens = p.exchange.num_tokens, warps = b.roles.wire * kWarps;
  const int vecs = row_vecs<W, T>(p);
  const Cut cut = cut_rows(vecs, tokens, warps);
  if (!borrow_outputs(b.op, peers)) return;
  // Blocks first: the early items, so the early chunks, are spread over all of them.
  Tickets tickets(&b.op.header().wire_ticket, blockIdx.x + b.roles.wire * (threadIdx.x / 32),
                  warps);
  for (int i; (i = tickets.take(tokens * cut.segments)) >= 0;) {
    const int t = i / cut.segments, segment = i % cut.segments, chunk = t / b.chunk;
    const uint64_t broken = b.op.broken_word();
    Targets to = remote_targets(b, peers, t, segment == 0);
    // Delivered as T: the scales travel behind the values, inside the row's place.
    if (W == Wire::kDequantized) to.scales = reinterpret_cast<float*>(to.row + p.hidden);
    const int first = segment * cut.segment_vecs;
    if (to.count > 0) {
      send_row<W, T, false>(p, t, to, first, min_int(first + cut.segment_vecs, vecs));
    }
    const int in_chunk = min_int(b.chunk, tokens - chunk * b.chunk) * cut.segments;
    finish_item(b.op, chunk, in_chunk, 0, b.op.R);
    if (__any_sync(kAllLanes, broken != 0)) return;
  }
}

// One segment of one of this rank's own tokens.
template <Wire W, typename T>
__device__ void place_own(const Body& b, const Cut& cut, int item) {
  const DispatchParams& p = b.p;
  const int K = p.exchange.top_k, vecs = row_vecs<W, T>(p);
  const int t = item / cut.segments, segment = item % cut.segments;
  const Targets to = local_targets(p, size_t(b.op.me) * p.exchange.num_tokens + t);
  if (segment == 0 && p.scalars != nullptr && lane_id() < K) {
    const size_t pair = size_t(t) * K + lane_id();
    if (p.pair_rank[pair] == b.op.me && p.pair_row[pair] >= 0) {
      p.row_scalars[p.pair_row[pair]] = p.scalars[pair];
    }
  }
  if (to.count == 0) return;
  const int first = segment * cut.segment_vecs;
  send_row<W, T, W == Wire::kDequantized>(p, t, to, first, min_int(first + cut.segment_vecs, vecs));
}

// Zeros where no pair is: padding inside segments always, the tail if asked; scalars everywhere.
// By the blocks that do not push.
__device__ void zero_unowned(const Body& b) {
  const DispatchParams& p = b.p;
  const int blocks = b.roles.local, warps = blocks * kWarps;
  const int warp = blockIdx.x - (gridDim.x - blocks) + blocks * (threadIdx.x / 32);
  const int rows = p.exchange.num_rows, scale_count = p.hidden / kScaleBlock;
  for (int base = warp * 32; base < rows; base += warps * 32) {
    const int row = base + lane_id();
    const int pair = row < rows ? p.row_pair[row] : 0;
    if (pair < 0 && p.row_scalars != nullptr) p.row_scalars[row] = 0.0f;
    const bool zero = pair == kRowPadding || (pair == kRowTail && p.zero_tail);
    for (unsigned todo = __ballot_sync(kAllLanes, zero); todo != 0; todo &= todo - 1) {
      const size_t r = base + __ffs(todo) - 1;
      auto* to = reinterpret_cast<Vec*>(p.rows + r * p.row_bytes);
      for (int v = lane_id(); v < p.row_bytes / int(sizeof(Vec)); v += 32) store_row(to + v, Vec{});
      if (p.row_scales == nullptr) continue;
      for (int j = lane_id(); j < scale_count; j += 32) p.row_scales[r * scale_count + j] = 0.0f;
    }
  }
}

// One segment of a token of another rank: from the row that arrived to the token's other rows here.
// Items go chunk by chunk over all sources, as they arrive. False: give up.
template <Wire W, typename T>
__device__ bool expand_arrived(const Body& b, const Cut& cut, int item, float* held) {
  const DispatchParams& p = b.p;
  const int others = b.op.R - 1, per_token = others * cut.segments;
  const int t = item / per_token, rest = item % per_token, segment = rest % cut.segments;
  const int source = (b.op.me + 1 + rest / cut.segments) % b.op.R;
  const Targets all = local_targets(p, size_t(source) * p.exchange.num_tokens + t);
  if (!await_chunk(b.op, t / b.chunk, source, source + 1)) return false;
  if (all.count == 0) return true;
  const char* arrived = of_lane(all.row, 0);
  if constexpr (W == Wire::kDequantized) {
    dequantize_row<T>(p, arrived, all, held);
  } else if (all.count > 1) {
    const Targets to = without_first(all);
    const int first = segment * cut.segment_vecs, vecs = p.row_bytes / int(sizeof(Vec));
    copy_row<true>(arrived, to, first, min_int(first + cut.segment_vecs, vecs));
    if (segment == 0 && p.row_scales != nullptr) {
      copy_scales(of_lane(all.scales, 0), to, p.hidden / kScaleBlock);
    }
  }
  return true;
}

// Local work, by all blocks: those that push come when they have pushed. First own tokens, to be
// busy until the peers' arrive. Rows that expand in place are read where they are written: they
// take turns with own tokens after `kLead` chunks of those, while they are still in cache. Others
// do not gain by it.
template <Wire W, typename T>
__device__ void work_locally(const Body& b, float* held) {
  const DispatchParams& p = b.p;
  const int tokens = p.exchange.num_tokens, others = b.op.R - 1, warps = gridDim.x * kWarps;
  const Cut own = cut_rows(row_vecs<W, T>(p), tokens, 4 * warps);
  // A row that expands in place is one item.
  const int arrived_vecs = W == Wire::kDequantized ? 1 : p.row_bytes / int(sizeof(Vec));
  const Cut arrived = cut_rows(arrived_vecs, tokens * max_int(others, 1), 4 * warps);
  const int own_items = b.chunk * own.segments, arrived_items = b.chunk * others * arrived.segments;
  const int lead = W == Wire::kDequantized ? min_int(kLead, b.chunks) : b.chunks;
  const int first_turn = lead * own_items, own_in_turn = lead < b.chunks ? own_items : 0;
  const int turn = max_int(own_in_turn + arrived_items, 1);  // 1: a group of one rank
  const int end = first_turn + b.chunks * (own_in_turn + arrived_items);
  const int warp = local_warp(b.roles, blockIdx.x, gridDim.x, threadIdx.x / 32, kWarps);
  Tickets tickets(&b.op.header().local_ticket, warp, b.roles.local * kWarps);
  for (int i; (i = tickets.take(end)) >= 0;) {
    const int after = i - first_turn, chunk = after / turn, item = after % turn;
    if (after < 0 || item < own_in_turn) {
      const int at = after < 0 ? i : first_turn + chunk * own_items + item;
      if (at < tokens * own.segments) place_own<W, T>(b, own, at);
    } else {
      const int at = chunk * arrived_items + item - own_in_turn;
      if (at >= tokens * others * arrived.segments) continue;
      if (!expand_arrived<W, T>(b, arrived, at, held)) return;
    }
  }
}

__device__ void poison_dispatch(const DispatchParams& p) {
  const size_t rows = p.exchange.num_rows;
  poison_bytes(p.rows, rows * p.row_bytes);
  poison_bytes(p.row_scales, rows * (p.hidden / kScaleBlock) * sizeof(float));
  poison_bytes(p.row_scalars, rows * sizeof(float));
}

template <Wire W, typename T>
__device__ void dispatch_body(const DispatchParams& p) {
  extern __shared__ float held_scales[];
  const Op op(p.call);
  const int tokens = p.exchange.num_tokens, chunk = chunk_tokens(tokens, kMaxChunks);
  const int percent = W == Wire::kCopy ? kWirePercent : kFp8WirePercent;
  const Body b{p, op, split_roles(gridDim.x, op.R, p.wire_percent > 0 ? p.wire_percent : percent),
               chunk, ceil_div(tokens, chunk)};
  if (!op.began_broken()) {
    if (blockIdx.x == 0) lend_outputs(op);
    if (int(blockIdx.x) < b.roles.wire) push_tokens<W, T>(b);
    if (int(blockIdx.x) >= int(gridDim.x) - b.roles.local) zero_unowned(b);
    work_locally<W, T>(b, held_scales + threadIdx.x / 32 * (p.hidden / kScaleBlock));
  }
  op.leave([&] { poison_dispatch(p); });
}

template <Wire W, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ DispatchParams p) {
  dispatch_body<W, T>(p);
}

template <Wire W, typename T>
__global__ void __launch_bounds__(kThreads, 1) dispatch_all_ranks(const DispatchParams* p) {
  dispatch_body<W, T>(p[blockIdx.y]);
}

template <Wire W, typename T>
cudaError_t launch(const DispatchParams* params, int hidden, const Launch& how) {
  const size_t shared =
      W == Wire::kDequantized ? kWarps * (hidden / kScaleBlock) * sizeof(float) : 0;
  const void* kernel = reinterpret_cast<const void*>(&dispatch_kernel<W, T>);
  if constexpr (kAllRanks) {
    if (how.all_ranks) kernel = reinterpret_cast<const void*>(&dispatch_all_ranks<W, T>);
  }
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return cudaGetLastError();
  }
  if (how.all_ranks == 0) {
    dispatch_kernel<W, T><<<how.num_sms, kThreads, shared, how.stream>>>(*params);
  } else if constexpr (kAllRanks) {
    dispatch_all_ranks<W, T>
        <<<dim3(how.num_sms, how.all_ranks), kThreads, shared, how.stream>>>(params);
  } else {
    return cudaErrorNotSupported;
  }
  return cudaGetLastError();
}

}  // namespace

// Every compiled variant: rows as bytes, and two FP8 deliveries of three types.
cudaError_t launch_dispatch(const DispatchParams* params, Element x, Wire wire, int hidden,
                            const Launch& how) {
  if (wire == Wire::kCopy) return launch<Wire::kCopy, float>(params, hidden, how);
  const bool quantized = wire == Wire::kQuantized;
  switch (x) {
    case Element::kBf16:
      return quantized ? launch<Wire::kQuantized, __nv_bfloat16>(params, hidden, how)
                       : launch<Wire::kDequantized, __nv_bfloat16>(params, hidden, how);
    case Element::kF16:
      return quantized ? launch<Wire::kQuantized, __half>(params, hidden, how)
                       : launch<Wire::kDequantized, __half>(params, hidden, how);
    case Element::kF32:
      return quantized ? launch<Wire::kQuantized, float>(params, hidden, how)
                       : launch<Wire::kDequantized, float>(params, hidden, how);
    case Element::kFp8:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t load_dispatch() {
  cudaFuncAttributes attributes;
  for (const void* kernel :
       {reinterpret_cast<const void*>(&dispatch_kernel<Wire::kCopy, float>),
        reinterpret_cast<const void*>(&dispatch_kernel<Wire::kQuantized, __nv_bfloat16>),
        reinterpret_cast<const void*>(&dispatch_kernel<Wire::kQuantized, __half>),
        reinterpret_cast<const void*>(&dispatch_kernel<Wire::kQuantized, float>),
        reinterpret_cast<const void*>(&dispatch_kernel<Wire::kDequantized, __nv_bfloat16>),
        reinterpret_cast<const void*>(&dispatch_kernel<Wire::kDequantized, __half>),
        reinterpret_cast<const void*>(&dispatch_kernel<Wire::kDequantized, float>)}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_ep
