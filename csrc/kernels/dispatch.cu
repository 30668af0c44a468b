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
#include "../device/kernel.cuh"
#include "dispatch_local.cuh"

namespace jax_ep {
namespace {

// Blocks that push, of all. Where rows go as they are, few keep the link busy, and more only make
// its queue longer, in which flags wait; quantising takes more.
constexpr int kWirePercent = 50, kMostWireBlocks = 19;
constexpr int kQuantizedWirePercent = 36, kDequantizedWirePercent = 25;

template <Wire W>
__device__ Roles roles_of(const DispatchParams& p, int num_ranks) {
  const int percent = W == Wire::kCopy        ? kWirePercent
                      : W == Wire::kQuantized ? kQuantizedWirePercent
                                              : kDequantizedWirePercent;
  Roles r = split_roles(gridDim.x, num_ranks, p.wire_percent > 0 ? p.wire_percent : percent);
  if (W == Wire::kCopy && p.wire_percent == 0 && r.wire > kMostWireBlocks) {
    r = {kMostWireBlocks, int(gridDim.x) - kMostWireBlocks};
  }
  return r;
}

template <Wire W, typename T>
__device__ void dispatch_body(const DispatchParams& p) {
  const Op op(p.call);
  const int tokens = p.exchange.num_tokens, chunk = chunk_tokens(tokens, kMaxChunks);
  const Body b{p, op, roles_of<W>(p, op.R), chunk, ceil_div(tokens, chunk)};
  if (!op.began_broken()) {
    if (blockIdx.x == 0) lend_outputs(op);
    if (int(blockIdx.x) < b.roles.wire) push_tokens<W, T>(b);
    if (int(blockIdx.x) >= int(gridDim.x) - b.roles.local) zero_unowned(b);
    auto* held_scales = reinterpret_cast<float*>(dynamic_shared());
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
  if (how.all_ranks == 0) {
    const cudaError_t error = allow_dynamic_shared(dispatch_kernel<W, T>, shared);
    if (error != cudaSuccess) return error;
    return launch_kernel(dispatch_kernel<W, T>, how.num_sms, kThreads, shared, how.stream, *params);
  }
  if constexpr (kAllRanks) {
    const cudaError_t error = allow_dynamic_shared(dispatch_all_ranks<W, T>, shared);
    if (error != cudaSuccess) return error;
    return launch_kernel(dispatch_all_ranks<W, T>, dim3(how.num_sms, how.all_ranks), kThreads,
                         shared, how.stream, params);
  }
  return cudaErrorNotSupported;
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
