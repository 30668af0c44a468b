// SPDX-License-Identifier: Apache-2.0
// dispatch: every row to its final place in the receiver's own output buffer, no staging.
//
//   wire blocks                                  local blocks
//     await ready[d], take d's lease               own tokens: load a row once, store it to each of
//     per chunk of tokens:                           its rows here
//       load a row once (quantise it),             padding (and tail): store zeros
//       push it to its first row on each           per chunk, per source s:
//       other destination rank                       await done[s][chunk]
//     signal done[me][chunk] on every peer           copy each token's first row to its others
//
// One copy of a token crosses the link per destination rank. Rows are written by exactly one party:
// a first row by its source, the others by the receiver, padding by the receiver. Wire blocks never
// wait for local blocks, of any rank; they come first in the grid, so they are resident first.
// A launch ends when every chunk of every source has been awaited: then nobody else writes here.
#include "../device/lend.cuh"
#include "../device/rows.cuh"
#include "../device/warp.cuh"
#include "launch.h"

namespace jax_ep {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kSegmentBytes = 4096;  // of a row that one warp copies at a time
constexpr int kWirePercent = 16;
enum Output { kRows = 0, kScales = 1, kScalars = 2 };

// Up to 32 places that one row goes to: lane i holds the i-th.
struct Targets {
  char* row = nullptr;
  float* scales = nullptr;
  int count = 0;  // the same in all lanes
};

// Bytes [first, last) of the row at `from` to the same bytes of every target.
template <bool kArrived>
__device__ void copy_row(const char* from, const Targets& to, int first, int last) {
  constexpr int kUnroll = 4;
  const int end = last / int(sizeof(Vec));
  const auto* source = reinterpret_cast<const Vec*>(from);
  for (int base = first / int(sizeof(Vec)); base < end; base += 32 * kUnroll) {
    Vec v[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int at = base + j * 32 + lane_id();
      if (at < end) v[j] = kArrived ? load_arrived(source + at) : load_input(source + at);
    }
    for (int i = 0; i < to.count; ++i) {
      auto* target = reinterpret_cast<Vec*>(of_lane(to.row, i));
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        const int at = base + j * 32 + lane_id();
        if (at < end) store_row(target + at, v[j]);
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

// Quantise the row at `x`: to e4m3 and scales in every target, or (kBack) back to T.
template <typename T, bool kBack>
__device__ void quantize_row(const DispatchParams& p, const T* x, const Targets& to) {
  for (int base = 0; base < p.hidden; base += 32 * kLaneChannels) {
    const int channel = base + lane_id() * kLaneChannels;
    const bool active = channel < p.hidden;
    float values[kLaneChannels] = {};
    if (active) load_lane(x, channel, values);
    const Quantized q = quantize_lane(values, p.power_of_two_scales);
    for (int i = 0; i < to.count; ++i) {
      char* row = of_lane(to.row, i);
      float* scales = of_lane(to.scales, i);
      if (!active) continue;
      if constexpr (kBack) {
        const Dequantized<T> back(q.q, q.scale);
        auto* target = reinterpret_cast<Vec*>(row + channel * sizeof(T));
#pragma unroll
        for (int v = 0; v < Dequantized<T>::kVecs; ++v) store_row(target + v, back.vec[v]);
      } else {
        store_row(reinterpret_cast<Vec*>(row + channel), q.q);
        if (lane_id() % kScaleLanes == 0) scales[channel / kScaleBlock] = q.scale;
      }
    }
  }
}

// A row that arrived as {e4m3 [H], scales [H/128]} at the start of its place: to T in every target,
// its own place last. Values lie at byte c and go to byte c * sizeof(T), so going down from the
// last channel never overwrites what is still to be read; the scales are held in shared memory.
template <typename T>
__device__ void dequantize_row(const DispatchParams& p, const char* from, const Targets& to,
                               float* held) {
  const int blocks = p.hidden / kScaleBlock;
  for (int j = lane_id(); j < blocks; j += 32) {
    held[j] = *reinterpret_cast<const volatile float*>(from + p.hidden + j * sizeof(float));
  }
  __syncwarp();
  const int step = 32 * kLaneChannels;
  for (int base = (p.hidden - 1) / step * step; base >= 0; base -= step) {
    const int channel = base + lane_id() * kLaneChannels;
    const bool active = channel < p.hidden;
    Vec q = {};
    if (active) q = load_arrived(reinterpret_cast<const Vec*>(from + channel));
    __syncwarp();  // every lane has read before any lane writes
    const Dequantized<T> back(q, active ? held[channel / kScaleBlock] : 0.0f);
    for (int i = 0; i < to.count; ++i) {
      auto* target = reinterpret_cast<Vec*>(of_lane(to.row, i) + channel * sizeof(T));
#pragma unroll
      for (int v = 0; v < Dequantized<T>::kVecs; ++v) {
        if (active) store_row(target + v, back.vec[v]);
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
__device__ Targets remote_targets(const Body& b, const Borrowed& peers, int t) {
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
  if (remote && p.scalars != nullptr) {
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

// The rows of source token `token` (source * T + t) here, from the `skip`-th on.
__device__ Targets local_targets(const DispatchParams& p, size_t token, int skip) {
  const int K = p.exchange.top_k, lane = lane_id();
  const int row = lane + skip < K ? p.token_rows[token * K + lane + skip] : -1;
  Targets to;
  to.count = __popc(__ballot_sync(kAllLanes, row >= 0));
  if (row >= 0) {
    to.row = p.rows + size_t(row) * p.row_bytes;
    to.scales = p.row_scales + size_t(row) * (p.hidden / kScaleBlock);
  }
  return to;
}

template <Wire W, typename T>
__device__ void push_tokens(const Body& b) {
  __shared__ Borrowed peers;
  const DispatchParams& p = b.p;
  if (!borrow_outputs(b.op, peers)) return;
  for (int c = blockIdx.x; c < b.chunks; c += b.roles.wire) {
    const int end = min_int((c + 1) * b.chunk, p.exchange.num_tokens);
    for (int t = c * b.chunk + threadIdx.x / 32; t < end; t += kWarps) {
      Targets to = remote_targets(b, peers, t);
      if constexpr (W == Wire::kCopy) {
        copy_row<false>(p.x + size_t(t) * p.row_bytes, to, 0, p.row_bytes);
        if (p.scales != nullptr) {
          const int count = p.hidden / kScaleBlock;
          copy_scales(p.scales + size_t(t) * count, to, count);
        }
      } else {
        // Delivered as T: the scales travel behind the values, inside the row's place.
        if (W == Wire::kDequantized) to.scales = reinterpret_cast<float*>(to.row + p.hidden);
        quantize_row<T, false>(p, reinterpret_cast<const T*>(p.x) + size_t(t) * p.hidden, to);
      }
    }
    signal_chunk(b.op, c, 0, b.op.R);
    if (b.op.broken()) return;
  }
}

// This rank's own tokens, one segment of a row at a time.
template <Wire W, typename T>
__device__ void place_own(const Body& b, int warp, int warps) {
  const DispatchParams& p = b.p;
  const int T_ = p.exchange.num_tokens, K = p.exchange.top_k;
  const int segments = W == Wire::kCopy ? ceil_div(p.row_bytes, kSegmentBytes) : 1;
  for (int i = warp; i < T_ * segments; i += warps) {
    const int t = i / segments, segment = i % segments;
    const Targets to = local_targets(p, size_t(b.op.me) * T_ + t, 0);
    if (segment == 0 && p.scalars != nullptr && lane_id() < K) {
      const size_t pair = size_t(t) * K + lane_id();
      if (p.pair_rank[pair] == b.op.me && p.pair_row[pair] >= 0)
        p.row_scalars[p.pair_row[pair]] = p.scalars[pair];
    }
    if (to.count == 0) continue;
    if constexpr (W == Wire::kCopy) {
      const int first = segment * kSegmentBytes;
      copy_row<false>(p.x + size_t(t) * p.row_bytes, to, first,
                      min_int(first + kSegmentBytes, p.row_bytes));
      if (segment == 0 && p.scales != nullptr) {
        const int count = p.hidden / kScaleBlock;
        copy_scales(p.scales + size_t(t) * count, to, count);
      }
    } else {
      quantize_row<T, W == Wire::kDequantized>(
          p, reinterpret_cast<const T*>(p.x) + size_t(t) * p.hidden, to);
    }
  }
}

// Zeros where no pair is: padding inside segments always, the tail if asked; scalars everywhere.
__device__ void zero_unowned(const Body& b, int warp, int warps) {
  const DispatchParams& p = b.p;
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

// Tokens of other ranks: from the row that arrived to the token's other rows here.
template <Wire W, typename T>
__device__ void expand_arrived(const Body& b, int warp, int warps, float* held) {
  const DispatchParams& p = b.p;
  const int T_ = p.exchange.num_tokens, others = b.op.R - 1;
  const int segments = W == Wire::kDequantized ? 1 : ceil_div(p.row_bytes, kSegmentBytes);
  const int scale_count = p.hidden / kScaleBlock;
  for (int c = 0; c < b.chunks; ++c) {
    const int first = c * b.chunk, tokens = min_int(b.chunk, T_ - first);
    const int items = others * tokens * segments;
    // Start where the last chunk ended, so that all warps get their share.
    const int start = int((size_t(c) * others * b.chunk * segments) % warps);
    for (int i = (warp - start + warps) % warps; i < items; i += warps) {
      const int segment = i % segments, rest = i / segments;
      const int source = (b.op.me + 1 + rest % others) % b.op.R, t = first + rest / others;
      if (!await_chunk(b.op, c, source, source + 1)) return;
      const size_t token = size_t(source) * T_ + t;
      const Targets all = local_targets(p, token, 0);
      if (all.count == 0) continue;
      const char* arrived = of_lane(all.row, 0);
      if constexpr (W == Wire::kDequantized) {
        Targets own_last = local_targets(p, token, 1);
        if (lane_id() == own_last.count) own_last.row = const_cast<char*>(arrived);
        ++own_last.count;
        dequantize_row<T>(p, arrived, own_last, held);
      } else if (all.count > 1) {
        const Targets to = local_targets(p, token, 1);
        const int from = segment * kSegmentBytes;
        copy_row<true>(arrived, to, from, min_int(from + kSegmentBytes, p.row_bytes));
        if (segment == 0 && p.row_scales != nullptr)
          copy_scales(of_lane(all.scales, 0), to, scale_count);
      }
    }
  }
}

template <Wire W, typename T>
__device__ void work_locally(const Body& b, float* held) {
  const int blocks = b.roles.local, first = gridDim.x - blocks;
  const int warp = (blockIdx.x - first) + blocks * (threadIdx.x / 32), warps = blocks * kWarps;
  place_own<W, T>(b, warp, warps);
  zero_unowned(b, warp, warps);
  if (b.op.R > 1) expand_arrived<W, T>(b, warp, warps, held);
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
  const Body b{p, op, split_roles(gridDim.x, op.R, kWirePercent), chunk, ceil_div(tokens, chunk)};
  if (!op.broken()) {
    if (blockIdx.x == 0) lend_outputs(op);
    if (int(blockIdx.x) < b.roles.wire) push_tokens<W, T>(b);
    float* held = held_scales + threadIdx.x / 32 * (p.hidden / kScaleBlock);
    if (int(blockIdx.x) >= int(gridDim.x) - b.roles.local) work_locally<W, T>(b, held);
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
  const void* kernel = how.all_ranks ? reinterpret_cast<const void*>(&dispatch_all_ranks<W, T>)
                                     : reinterpret_cast<const void*>(&dispatch_kernel<W, T>);
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  if (how.all_ranks) {
    dispatch_all_ranks<W, T>
        <<<dim3(how.num_sms, how.all_ranks), kThreads, shared, how.stream>>>(params);
  } else {
    dispatch_kernel<W, T><<<how.num_sms, kThreads, shared, how.stream>>>(*params);
  }
  return cudaPeekAtLastError();
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

}  // namespace jax_ep
