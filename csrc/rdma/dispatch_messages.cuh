// SPDX-License-Identifier: Apache-2.0
// Messages of a dispatch between nodes: made on the source rank, forwarded where they arrive.
#pragma once
#include "../kernels/dispatch_push.cuh"
#include "launch.h"
#include "put_messages.cuh"
#include "rings.cuh"

namespace jax_ep {

// A row as it travels: values, then scales.
template <Wire W>
__device__ int travelling_values(const DispatchParams& p) {
  return W == Wire::kCopy ? p.row_bytes : p.hidden;
}
template <Wire W>
__device__ bool has_scales(const DispatchParams& p) {
  return W != Wire::kCopy || p.scales != nullptr;
}

template <Wire W, typename T, typename Transport>
class Messages {
 public:
  __device__ Messages(const WithTransport<NodeDispatch, Transport>& q, const Body& b,
                      const Rings& rings)
      : q_(q), b_(b), p_(q.dispatch), rings_(rings) {}

  // Send block `block` of `blocks`: chunk after chunk, to one node after the other.
  __device__ void send(int block, int blocks) const {
    const int others = rings_.N - 1;
    for (int i = block; i < b_.chunks * others; i += blocks) {
      if (!send_chunk(i / others, node_of(i % others))) return;
    }
  }

  // Put block `block` of `blocks`.
  __device__ void put(int block, int blocks) const {
    put_messages(b_.op, rings_, q_.transport, q_.shape, b_.chunks, block, blocks,
                 [&](int i) { return node_of(i); });
  }

  // Forward block `block` of `blocks`: chunk after chunk, of one node after the other.
  __device__ void forward(int block, int blocks) const {
    __shared__ Borrowed peers;
    if (!borrow_outputs(b_.op, peers)) return;
    const int others = rings_.N - 1;
    for (int i = block; i < b_.chunks * others; i += blocks) {
      if (!forward_chunk(peers, i / others, node_of(i % others))) return;
    }
  }

 private:
  // The i-th node after mine.
  __device__ int node_of(int i) const {
    const int node = rings_.node + 1 + i;
    return node < rings_.N ? node : node - rings_.N;
  }
  __device__ int tokens_of(int chunk) const {
    return min_int(b_.chunk, p_.exchange.num_tokens - chunk * b_.chunk);
  }

  // Token t's pair of this lane, as far as `node` is concerned.
  __device__ Place place_of(int t, int node) const {
    const int K = p_.exchange.top_k, lane = lane_id();
    if (lane >= K) return {-1, -1};
    const int rank = p_.pair_rank[size_t(t) * K + lane], row = p_.pair_row[size_t(t) * K + lane];
    return row >= 0 && rank / rings_.L == node ? Place{rank, row} : Place{-1, -1};
  }

  // False: give up.
  __device__ bool send_chunk(int chunk, int node) const {
    __shared__ TokenSet tokens;
    const Turn turn = rings_.message(node, chunk);
    const int first = chunk * b_.chunk, count = tokens_of(chunk), warp = threadIdx.x / 32;
    bool room = true;
    if (threadIdx.x == 0) {
      room = rings_.await_room(turn, rings_.credited(turn), rings_.rank_of(node));
    }
    tokens.clear();
    if (!__syncthreads_and(room)) return false;
    for (int i = warp; i < count; i += kWarps) {
      if (__any_sync(kAllLanes, place_of(first + i, node).row >= 0) && lane_id() == 0) {
        tokens.insert(i);
      }
    }
    __syncthreads();
    char* slot = rings_.here(rings_.to_send(turn));
    pack_rows(slot, tokens, first, count, node);
    const int rows = tokens.count();
    if (warp == 0) write_head(slot, rings_.stamp(turn), rows, tokens);
    __syncthreads();  // the block's writes before the message is handed on
    hand_to_put(rings_, turn);
    return true;
  }

  // Each row that goes to `node`, and where its pairs go there, by pieces of rows.
  __device__ void pack_rows(char* slot, const TokenSet& tokens, int first, int count,
                            int node) const {
    const int K = p_.exchange.top_k, vecs = row_vecs<W, T>(p_), rows = tokens.count();
    const Cut cut = cut_rows(vecs, rows, kWarps);
    for (int i = threadIdx.x / 32; i < count * cut.segments; i += kWarps) {
      const int at = i / cut.segments, segment = i % cut.segments;
      if (!tokens.has(at)) continue;
      const int row = tokens.before(at), t = first + at;
      if (segment == 0 && lane_id() < K) {
        places(slot)[row * K + lane_id()] = place_of(t, node);
        scalars(slot)[row * K + lane_id()] =
            p_.scalars == nullptr ? 0.0f : p_.scalars[size_t(t) * K + lane_id()];
      }
      Targets to;
      to.count = 1;
      to.row = slot + q_.shape.rows_at() + size_t(row) * q_.shape.row_bytes;
      to.scales = reinterpret_cast<float*>(to.row + travelling_values<W>(p_));
      const int begin = segment * cut.segment_vecs;
      send_row<W, T, false>(p_, t, to, begin, min_int(begin + cut.segment_vecs, vecs));
    }
  }

  // False: give up.
  __device__ bool forward_chunk(const Borrowed& peers, int chunk, int node) const {
    __shared__ TokenSet tokens;
    const Turn turn = rings_.message(node, chunk);
    const int source = rings_.rank_of(node);
    bool good = true;
    if (threadIdx.x == 0) {
      good = rings_.await_message(turn, rings_.arrived(turn), source);
      if (good) q_.transport.receive(rings_.word(rings_.arrived(turn)));
    }
    if (!__syncthreads_and(good)) return false;
    const char* slot = rings_.here(rings_.received(turn, rings_.node));
    if (threadIdx.x < 32) {
      good = read_head(slot, rings_.stamp(turn), tokens_of(chunk), &tokens);
      if (!good && threadIdx.x == 0) {
        b_.op.fail(Fault::kMismatch, Phase::kMessage, source, 0, rings_.stamp(turn));
      }
    }
    if (!__syncthreads_and(good)) return false;
    push_rows(peers, slot, tokens.count());
    __syncthreads();  // the block's pushes before the flags, its reads before the credit
    for (int p = b_.op.node_first() + threadIdx.x; p < b_.op.node_last(); p += blockDim.x) {
      if (p == b_.op.me) continue;
      store_release_sys(b_.op.block(p).done(source, chunk), b_.op.tag);  // publishes the chunk
    }
    if (threadIdx.x == 0) {
      const Turn there = turn.of(rings_.node);
      q_.transport.signal(source, rings_.credited(there), rings_.credit(turn));
    }
    return true;
  }

  // Each row that has arrived to all its rows here, and to its first row on every other rank of my
  // node that has one, by pieces.
  __device__ void push_rows(const Borrowed& peers, const char* slot, int rows) const {
    const int K = p_.exchange.top_k, values = travelling_values<W>(p_);
    const int vecs = values / int(sizeof(Vec)), lane = lane_id();
    const Cut cut = cut_rows(vecs, rows, kWarps);
    for (int i = threadIdx.x / 32; i < rows * cut.segments; i += kWarps) {
      const int row = i / cut.segments, segment = i % cut.segments;
      Place place{-1, -1};
      float scalar = 0.0f;
      if (lane < K) {
        const uint2 word =
            load_arrived(reinterpret_cast<const uint2*>(places(slot)) + row * K + lane);
        place = {int(word.x), int(word.y)};
        scalar = __uint_as_float(
            load_arrived(reinterpret_cast<const uint32_t*>(scalars(slot)) + row * K + lane));
      }
      const bool wanted = place.row >= 0 && b_.op.reaches(place.rank);
      const float* given = segment == 0 && p_.scalars != nullptr ? &scalar : nullptr;
      const char* from = slot + q_.shape.rows_at() + size_t(row) * q_.shape.row_bytes;
      const int begin = segment * cut.segment_vecs, end = min_int(begin + cut.segment_vecs, vecs);
      const bool mine = wanted && place.rank == b_.op.me;
      Targets to = targets_of(b_, peers, wanted && !mine, place.rank, place.row, given);
      // Delivered as T, mine are written as such, and others' travel on as they have come, with
      // the scales behind the values, inside the row's place.
      if (W == Wire::kDequantized) {
        to.scales = reinterpret_cast<float*>(to.row + p_.hidden);
      } else {
        add_mine(to, mine, place.row, given);
      }
      copy_row<true>(from, to, begin, end);
      if (segment == 0 && has_scales<W>(p_)) {
        copy_scales(reinterpret_cast<const float*>(from + values), to, p_.hidden / kScaleBlock);
      }
      if constexpr (W == Wire::kDequantized) {
        Targets here;
        add_mine(here, mine, place.row, given);
        dequantize_piece(from, here, begin, end);
      }
    }
  }

  // A target for each row of mine, and its scalar to the row: each lane has one, if it is `mine`.
  __device__ void add_mine(Targets& to, bool mine, int row, const float* scalar) const {
    if (mine && row >= p_.exchange.num_rows) {
      b_.op.fail(Fault::kBounds, Phase::kRows, b_.op.me, row, p_.exchange.num_rows);
      mine = false;
    }
    if (mine && scalar != nullptr) p_.row_scalars[row] = *scalar;
    for (unsigned todo = __ballot_sync(kAllLanes, mine); todo != 0; todo &= todo - 1) {
      const int r = __shfl_sync(kAllLanes, row, __ffs(todo) - 1);
      if (lane_id() == to.count) {
        to.row = p_.rows + size_t(r) * p_.row_bytes;
        to.scales = p_.row_scales + size_t(r) * (p_.hidden / kScaleBlock);
      }
      ++to.count;
    }
  }

  // Vecs [first, last) of a row as it travels, back to T in every target.
  __device__ void dequantize_piece(const char* from, const Targets& to, int first, int last) const {
    constexpr int kCount = Pack<T>::kCount, kLanes = kScaleBlock / kCount;
    constexpr int kWords = sizeof(Vec) / kCount;  // of a Vec
    using Word = typename Fp8<T>::Word;
    const auto* words = reinterpret_cast<const Word*>(from);
    const auto* scales = reinterpret_cast<const uint32_t*>(from + p_.hidden);
    const int end = last * kWords;
    for (int base = first * kWords; base < end; base += 32 * kBatch) {
      Fp8<T> q[kBatch];
      float scale[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = base + j * 32 + lane_id();
        if (at >= end) continue;
        q[j].word = load_arrived(words + at);
        scale[j] = __uint_as_float(load_arrived(scales + at / kLanes));
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = base + j * 32 + lane_id();
        const Vec back = at < end ? dequantize(q[j], scale[j]).vec : Vec{};
        for (int i = 0; i < to.count; ++i) {
          auto* target = reinterpret_cast<Vec*>(of_lane(to.row, i));
          if (at < end) store_row(target + at, back);
        }
      }
    }
  }

  __device__ Place* places(const char* slot) const {
    return reinterpret_cast<Place*>(const_cast<char*>(slot) + sizeof(MessageHead));
  }
  __device__ float* scalars(const char* slot) const {
    return reinterpret_cast<float*>(places(slot) + b_.chunk * p_.exchange.top_k);
  }

  const WithTransport<NodeDispatch, Transport>& q_;
  const Body& b_;
  const DispatchParams& p_;
  const Rings& rings_;
};

}  // namespace jax_ep
