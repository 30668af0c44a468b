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
// In a block (combine_parts.cuh), everything that is added comes through a ring of rows in shared
// memory, wherever it lies:
//
//   finder --> filler -- y, partials by bulk copies --> ring --> consumers --> partials on s, out
//                                                                    '--> signaller --> done on s
//
// Products are rounded to float32 before they are added, partials to y's type, the own one too: the
// same bits whatever the number of blocks. A token's slot for rank r is the number of ranks below
// r, its source excepted, that its pairs name: both sides know it from the routing alone.
//
// A partial lies in its slot like a row of y; if asked, as FP8, of which a ring's slot takes values
// and scales of a segment, one behind the other:
//
//   e4m3 [H]   float32 scales [H/128]   nothing, up to a multiple of 128 bytes
#include "../device/kernel.cuh"
#include "combine_consumer.cuh"
#include "combine_finder.cuh"
#include "combine_signaller.cuh"

namespace jax_ep {
namespace {

constexpr int kWirePercent = 50;         // of blocks
constexpr int kItemsPerBlock = 2;        // of local work, at least, if rows can be cut
constexpr int kOtherShared = 12 * 1024;  // bytes of shared memory beside the rows of the ring
static_assert(sizeof(RingState) + sizeof(Orders) + sizeof(Pushes) + sizeof(Borrowed) + 512 <=
                  kOtherShared,
              "all of it, and what Op keeps");

// How rows are cut, into pieces that fit a slot of the ring.
__device__ Cut cut_for(int vecs, int tokens, int blocks) {
  const Cut cut = cut_rows(vecs, tokens, ceil_div(kItemsPerBlock * blocks, 2));
  if (cut.segment_vecs <= kMostSegmentVecs) return cut;
  return cut_rows(vecs, 2, ceil_div(vecs, kMostSegmentVecs));
}

template <typename T, bool kFp8>
__device__ Body make_body(const CombineParams& p, const Op& op) {
  const int tokens = p.exchange.num_tokens, chunk = chunk_tokens(tokens, kMaxChunks);
  const int percent = p.wire_percent > 0 ? p.wire_percent : kWirePercent;
  const int row_bytes = p.y == nullptr ? 0 : p.hidden * int(sizeof(T));
  const int vecs = row_bytes / int(sizeof(Vec));
  return {p,
          op,
          split_roles(gridDim.x, op.R, percent),
          chunk,
          ceil_div(tokens, chunk),
          row_bytes,
          vecs,
          kFp8 ? Pack<T>::kCount : int(sizeof(Vec)),
          cut_for(vecs, tokens, gridDim.x)};
}

// Each warp's role, once the ring is there and the peers have lent their memory.
template <typename T, bool kFp8>
__device__ void play_roles(const Body& b) {
  __shared__ RingState state;
  __shared__ Orders orders;
  __shared__ Pushes pushes;
  __shared__ Borrowed peers;
  const int warp = threadIdx.x / 32;
  const bool wire = int(blockIdx.x) < b.roles.wire;
  Ring ring(state, dynamic_shared(), b.slot_bytes(), dynamic_shared_bytes());
  if (blockIdx.x == 0) lend_outputs(b.op);
  if (warp == kFirstConsumer) {
    ring.init(kConsumerWarps);
    orders.init();
    pushes.init();
  }
  __syncthreads();
  if (wire && !borrow_outputs(b.op, peers)) return;
  if (warp == kFinderWarp) {
    Finder finder(b, orders, peers, pushes);
    if (!wire || finder.push_partials()) finder.sum_tokens();
    finder.stop();
  } else if (warp == kFillerWarp) {
    fill_ring(ring, OrderQueue(orders));
  } else if (warp == kSignallerWarp) {
    if (wire) signal_pushes(b, pushes);
  } else {
    consume<T, kFp8>(b.cut.segment_vecs, b.p.power_of_two_scales, ring, &pushes);
  }
}

__device__ void poison_combine(const CombineParams& p, int row_bytes) {
  const size_t tokens = p.exchange.num_tokens;
  if (p.y != nullptr) poison_bytes(p.out, tokens * row_bytes);
  if (p.row_scalars != nullptr) poison_bytes(p.scalars, tokens * p.exchange.top_k * sizeof(float));
}

template <typename T, bool kFp8>
__device__ void combine_body(const CombineParams& p) {
  const Op op(p.call);
  if (!op.began_broken()) play_roles<T, kFp8>(make_body<T, kFp8>(p, op));
  op.leave([&] { poison_combine(p, p.hidden * sizeof(T)); });
}

template <typename T, bool kFp8>
__global__ void __launch_bounds__(kCombineThreads, 1)
    combine_kernel(const __grid_constant__ CombineParams p) {
  combine_body<T, kFp8>(p);
}

template <typename T, bool kFp8>
__global__ void __launch_bounds__(kCombineThreads, 1) combine_all_ranks(const CombineParams* p) {
  combine_body<T, kFp8>(p[blockIdx.y]);
}

// Shared memory for the rows of the ring on the current device: all there is.
cudaError_t ring_bytes(int* bytes) {
  int most = 0;
  const cudaError_t error = most_dynamic_shared(&most);
  *bytes = most - kOtherShared;
  return error;
}

template <typename T, bool kFp8>
cudaError_t launch(const CombineParams* params, const Launch& how) {
  int bytes;
  const cudaError_t error = ring_bytes(&bytes);
  if (error != cudaSuccess) return error;
  if (how.all_ranks == 0) {
    return launch_kernel(combine_kernel<T, kFp8>, how.num_sms, kCombineThreads, bytes, how.stream,
                         *params);
  }
  if constexpr (kAllRanks) {
    return launch_kernel(combine_all_ranks<T, kFp8>, dim3(how.num_sms, how.all_ranks),
                         kCombineThreads, bytes, how.stream, params);
  }
  return cudaErrorNotSupported;
}

template <typename T, bool kFp8>
cudaError_t load() {
  int bytes;
  cudaError_t error = ring_bytes(&bytes);
  if (error == cudaSuccess) error = allow_dynamic_shared(combine_kernel<T, kFp8>, bytes);
  if constexpr (kAllRanks) {
    if (error == cudaSuccess) error = allow_dynamic_shared(combine_all_ranks<T, kFp8>, bytes);
  }
  return error;
}

// Every compiled variant: three types of y, whose partials travel as they are or as FP8.
template <typename Visit>
cudaError_t for_variant(Element y, Wire wire, Visit&& visit) {
  if (wire == Wire::kDequantized) return cudaErrorInvalidValue;
  auto by_wire = [&](auto type) {
    return wire == Wire::kCopy ? visit(type, std::false_type{}) : visit(type, std::true_type{});
  };
  switch (y) {
    case Element::kBf16:
      return by_wire(__nv_bfloat16{});
    case Element::kF16:
      return by_wire(__half{});
    case Element::kF32:
      return by_wire(float{});
    case Element::kFp8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_combine(const CombineParams* params, Element y, Wire wire, const Launch& how) {
  return for_variant(y, wire, [&](auto type, auto fp8) {
    return launch<decltype(type), decltype(fp8)::value>(params, how);
  });
}

cudaError_t load_combine() {
  for (Wire wire : {Wire::kCopy, Wire::kQuantized}) {
    for (Element y : {Element::kBf16, Element::kF16, Element::kF32}) {
      const cudaError_t error = for_variant(y, wire, [](auto type, auto fp8) {
        return load<decltype(type), decltype(fp8)::value>();
      });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace jax_ep
