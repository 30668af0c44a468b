// SPDX-License-Identifier: Apache-2.0
// The three stages of a combine between nodes. Each block has one, and does its items in one order:
// chunk after chunk, in a chunk source node after source node.
#pragma once
#include "../device/rows.cuh"
#include "launch.h"
#include "rings.cuh"

namespace jax_ep {

constexpr int kStageThreads = kFullBlock;
constexpr int kStageWarps = kStageThreads / 32;

// What a lane adds up: Vecs of a row, in float32.
template <typename T>
struct LaneSum {
  static constexpr int kVecs = 2;
  float value[kVecs][Pack<T>::kCount] = {};

  __device__ void add(int j, const Vec& row, float weight) {
    const Pack<T> pack(row);
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount; ++i) {
      value[j][i] = __fadd_rn(value[j][i], __fmul_rn(weight, to_float(pack.element[i])));
    }
  }
  __device__ Vec rounded(int j) const {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < Pack<T>::kCount; ++i) pack.element[i] = from_float<T>(value[j][i]);
    return pack.vec;
  }
};

// Vecs [first, last) of a sum of rows to `to`, by one warp. `row_of(i)` is the i-th row and its
// weight, the same in all lanes; they are added in order.
struct Addend {
  const char* row;  // null: nothing
  float weight;
};
template <typename T, bool kArrived, typename RowOf>
__device__ void sum_rows(int rows, char* to, int first, int last, RowOf&& row_of) {
  constexpr int kVecs = LaneSum<T>::kVecs;
  for (int base = first; base < last; base += 32 * kVecs) {
    LaneSum<T> sum;
    for (int i = 0; i < rows; ++i) {
      const Addend a = row_of(i);
      if (a.row == nullptr) continue;
      const auto* row = reinterpret_cast<const Vec*>(a.row);
#pragma unroll
      for (int j = 0; j < kVecs; ++j) {
        const int at = base + j * 32 + lane_id();
        if (at < last)
          sum.add(j, kArrived ? load_arrived(row + at) : load_input(row + at), a.weight);
      }
    }
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      const int at = base + j * 32 + lane_id();
      if (at < last) store_row(reinterpret_cast<Vec*>(to) + at, sum.rounded(j));
    }
  }
}

template <typename T, typename Transport>
class Stages {
 public:
  __device__ Stages(const WithTransport<NodeCombine, Transport>& q, const Op& op,
                    const Rings& rings)
      : q_(q),
        p_(q.combine),
        op_(op),
        rings_(rings),
        row_bytes_(p_.y == nullptr ? 0 : p_.hidden * int(sizeof(T))),
        vecs_(row_bytes_ / int(sizeof(Vec))),
        chunks_(ceil_div(p_.exchange.num_tokens, q.shape.chunk)) {}

  __device__ int chunks() const { return chunks_; }

  // What my rows add to the tokens of all ranks: to the rank of my node with the source's index.
  __device__ void make_partials(int block, int blocks) const {
    const int per_chunk = op_.R;
    for (int i = block; i < chunks_ * per_chunk; i += blocks) {
      if (!make_partial(i / per_chunk, i % per_chunk)) return;
    }
  }
  // What my node's rows add to the tokens of the ranks with my index.
  __device__ void sum_node(int block, int blocks) const {
    for (int i = block; i < chunks_ * rings_.N; i += blocks) {
      if (!sum_node_chunk(i / rings_.N, i % rings_.N)) return;
    }
  }
  // What all nodes' rows add to my tokens.
  __device__ void sum_nodes(int block, int blocks) const {
    for (int i = block; i < chunks_; i += blocks) {
      if (!sum_nodes_chunk(i)) return;
    }
  }

 private:
  __device__ int tokens_of(int chunk) const {
    return min_int(q_.shape.chunk, p_.exchange.num_tokens - chunk * q_.shape.chunk);
  }
  __device__ Turn partial_turn(int j, int chunk, int node) const {
    return rings_.partial(j, chunk * rings_.N + node);
  }
  __device__ char* row_at(char* slot, int row) const {
    return slot + q_.shape.rows_at() + size_t(row) * row_bytes_;
  }
  __device__ float* scalars(char* slot) const {
    return reinterpret_cast<float*>(slot + sizeof(MessageHead));
  }
  // Whether the heads of `count` messages are what they should be; their tokens. `slot_of(i)` and
  // `stamp_of(i)` say where and which, `rank_of(i)` whose. By all threads of a block, with one
  // answer.
  template <typename SlotOf, typename StampOf, typename RankOf>
  __device__ bool read_heads(int count, int tokens, TokenSet* sets, SlotOf&& slot_of,
                             StampOf&& stamp_of, RankOf&& rank_of) const {
    bool good = true;
    for (int i = threadIdx.x / 32; i < count; i += kStageWarps) {
      if (read_head(slot_of(i), stamp_of(i), tokens, &sets[i])) continue;
      if (lane_id() == 0) {
        op_.fail(Fault::kMismatch, Phase::kMessage, rank_of(i), 0, stamp_of(i));
      }
      good = false;
    }
    return __syncthreads_and(good);
  }

  // My part of the tokens of `source` in a chunk. False: give up.
  __device__ bool make_partial(int chunk, int source) const {
    __shared__ TokenSet tokens;
    const int node = source / rings_.L, gateway = op_.node_first() + source % rings_.L;
    const Turn here = partial_turn(source % rings_.L, chunk, node);  // to the gateway
    const Turn there = partial_turn(rings_.index, chunk, node);      // from me
    bool room = true;
    if (threadIdx.x == 0) room = rings_.await_room(here, rings_.emptied(here), gateway);
    tokens.clear();
    if (!__syncthreads_and(room)) return false;
    char* slot = rings_.of(gateway, rings_.partials(there));
    auto* scalars = reinterpret_cast<float*>(rings_.of(gateway, rings_.scalars(there)));
    add_own_rows(slot, scalars, &tokens, source, chunk);
    __syncthreads();
    if (threadIdx.x < 32) write_head(slot, rings_.stamp(there), tokens.count(), tokens);
    __syncthreads();  // the block's writes before the flag
    if (threadIdx.x == 0) {
      auto* flag = reinterpret_cast<uint64_t*>(rings_.of(gateway, rings_.filled(there)));
      store_release_sys(flag, rings_.stamp(there));  // publishes the partial
    }
    return true;
  }

  __device__ void add_own_rows(char* slot, float* scalars, TokenSet* tokens, int source,
                               int chunk) const {
    const int K = p_.exchange.top_k, count = tokens_of(chunk), lane = lane_id();
    const size_t first = size_t(source) * p_.exchange.num_tokens + chunk * q_.shape.chunk;
    const Cut cut = cut_rows(vecs_, count, kStageWarps);
    for (int i = threadIdx.x / 32; i < count * cut.segments; i += kStageWarps) {
      const int at = i / cut.segments, segment = i % cut.segments;
      const int row = lane < K ? p_.token_rows[(first + at) * K + lane] : -1;
      const int rows = __popc(__ballot_sync(kAllLanes, row >= 0));
      if (rows == 0) continue;
      const float weight = row >= 0 && p_.weights != nullptr ? p_.weights[row] : 1.0f;
      if (segment == 0) {
        if (lane == 0) tokens->insert(at);
        if (row >= 0 && p_.row_scalars != nullptr) {
          scalars[p_.row_pair[row] - first * K] = p_.row_scalars[row];
        }
      }
      const int begin = segment * cut.segment_vecs;
      sum_rows<T, false>(
          rows, row_at(slot, at), begin, min_int(begin + cut.segment_vecs, vecs_), [&](int k) {
            const int r = __shfl_sync(kAllLanes, row, k);
            return Addend{p_.y + size_t(r) * row_bytes_, __shfl_sync(kAllLanes, weight, k)};
          });
    }
  }

  // False: give up.
  __device__ bool sum_node_chunk(int chunk, int node) const {
    __shared__ TokenSet of_rank[kMaxRanks], tokens;
    const Turn turn = rings_.message(node, chunk);
    const bool own = node == rings_.node;
    const int L = rings_.L, first = op_.node_first();
    auto partial = [&](int j) { return partial_turn(j, chunk, node); };
    auto slot_of = [&](int j) { return rings_.here(rings_.partials(partial(j))); };
    bool good = true;
    for (int j = threadIdx.x; j < L; j += blockDim.x) {
      good &= rings_.await_message(partial(j), rings_.filled(partial(j)), first + j);
    }
    if (threadIdx.x == 0) {
      good = good && rings_.await_room(turn, rings_.credited(turn), rings_.rank_of(node));
    }
    tokens.clear();
    if (!__syncthreads_and(good)) return false;
    if (!read_heads(
            L, tokens_of(chunk), of_rank, slot_of, [&](int j) { return rings_.stamp(partial(j)); },
            [&](int j) { return first + j; })) {
      return false;
    }
    if (threadIdx.x < kMostChunkTokens / 32) {
      for (int j = 0; j < L; ++j) tokens.words[threadIdx.x] |= of_rank[j].words[threadIdx.x];
    }
    __syncthreads();
    const int rows = tokens.count();
    char* slot = rings_.here(own ? rings_.received(turn) : rings_.to_send(turn));
    add_partials(slot, of_rank, tokens, chunk, node);
    if (threadIdx.x < 32) write_head(slot, rings_.stamp(turn), rows, tokens);
    __syncthreads();  // the block's writes before the message, its reads before the credits
    for (int j = threadIdx.x; j < L; j += blockDim.x) {
      const Turn there = {rings_.index, partial(j).number};
      auto* credit = reinterpret_cast<uint64_t*>(rings_.of(first + j, rings_.emptied(there)));
      store_release_sys(credit, rings_.credit(there));  // publishes that the partial has been read
    }
    hand_over(turn, slot, rows);
    return true;
  }

  // The message of my node for `turn`'s: to the rank that sums the nodes', which for the own node
  // is this one.
  __device__ void hand_over(const Turn& turn, const char* slot, int rows) const {
    if (turn.ring == rings_.node) {
      if (threadIdx.x == 0) {
        // Publishes the own node's message, for `sum_nodes_chunk`.
        store_release_sys(rings_.word(rings_.arrived(turn)), rings_.stamp(turn));
      }
      return;
    }
    const Turn there = {rings_.node, turn.number};
    q_.transport.put_signal(rings_.rank_of(turn.ring), rings_.received(there), slot,
                            q_.shape.bytes(rows), rings_.arrived(there), rings_.stamp(turn));
  }

  // Sums over the ranks of my node, in rank order, each rounded, packed; and all scalars.
  __device__ void add_partials(char* slot, const TokenSet* of_rank, const TokenSet& tokens,
                               int chunk, int node) const {
    const int count = tokens_of(chunk), L = rings_.L;
    const Turn any = partial_turn(0, chunk, node);
    const Cut cut = cut_rows(vecs_, count, kStageWarps);
    for (int i = threadIdx.x / 32; i < count * cut.segments; i += kStageWarps) {
      const int at = i / cut.segments, begin = i % cut.segments * cut.segment_vecs;
      if (!tokens.has(at)) continue;
      sum_rows<T, true>(L, row_at(slot, tokens.before(at)), begin,
                        min_int(begin + cut.segment_vecs, vecs_), [&](int j) {
                          char* from = rings_.here(rings_.partials({j, any.number}));
                          return Addend{of_rank[j].has(at) ? row_at(from, at) : nullptr, 1.0f};
                        });
    }
    if (p_.row_scalars == nullptr) return;
    const auto* from = reinterpret_cast<const uint32_t*>(rings_.here(rings_.scalars(any)));
    for (int i = threadIdx.x; i < count * p_.exchange.top_k; i += blockDim.x) {
      scalars(slot)[i] = __uint_as_float(load_arrived(from + i));
    }
  }

  // False: give up.
  __device__ bool sum_nodes_chunk(int chunk) const {
    __shared__ TokenSet of_node[kMaxRanks];
    const int N = rings_.N;
    auto turn = [&](int n) { return rings_.message(n, chunk); };
    auto slot_of = [&](int n) { return rings_.here(rings_.received(turn(n))); };
    bool good = true;
    for (int n = threadIdx.x; n < N; n += blockDim.x) {
      const uint64_t flag = rings_.arrived(turn(n));
      good &= rings_.await_message(turn(n), flag, rings_.rank_of(n));
      if (good && n != rings_.node) {
        q_.transport.receive(rings_.word(flag), rings_.stamp(turn(n)));
      }
    }
    if (!__syncthreads_and(good)) return false;
    if (!read_heads(
            N, tokens_of(chunk), of_node, slot_of, [&](int n) { return rings_.stamp(turn(n)); },
            [&](int n) { return rings_.rank_of(n); })) {
      return false;
    }
    store_tokens(of_node, chunk, slot_of);
    store_scalars(chunk, slot_of);
    __syncthreads();  // the block's reads before the credits
    for (int n = threadIdx.x; n < N; n += blockDim.x) {
      const Turn there = {rings_.node, turn(n).number};
      if (n == rings_.node) {
        // Publishes that it has been read, for `sum_node_chunk`.
        store_release_sys(rings_.word(rings_.credited(there)), rings_.credit(there));
      } else {
        q_.transport.signal(rings_.rank_of(n), rings_.credited(there), rings_.credit(there));
      }
    }
    return true;
  }

  // Sums over the nodes, in order, rounded once.
  template <typename SlotOf>
  __device__ void store_tokens(const TokenSet* of_node, int chunk, SlotOf&& slot_of) const {
    const int count = tokens_of(chunk), first = chunk * q_.shape.chunk;
    const Cut cut = cut_rows(vecs_, count, kStageWarps);
    for (int i = threadIdx.x / 32; i < count * cut.segments; i += kStageWarps) {
      const int at = i / cut.segments, begin = i % cut.segments * cut.segment_vecs;
      sum_rows<T, true>(rings_.N, p_.out + size_t(first + at) * row_bytes_, begin,
                        min_int(begin + cut.segment_vecs, vecs_), [&](int n) {
                          const TokenSet& tokens = of_node[n];
                          const bool has = tokens.has(at);
                          return Addend{has ? row_at(slot_of(n), tokens.before(at)) : nullptr,
                                        1.0f};
                        });
    }
  }

  // Each of my pairs' scalar, from the message of the node where its row is.
  template <typename SlotOf>
  __device__ void store_scalars(int chunk, SlotOf&& slot_of) const {
    if (p_.row_scalars == nullptr) return;
    const int K = p_.exchange.top_k;
    const size_t first = size_t(chunk) * q_.shape.chunk * K;
    for (int i = threadIdx.x; i < tokens_of(chunk) * K; i += blockDim.x) {
      float scalar = 0.0f;
      if (p_.pair_row[first + i] >= 0) {
        char* slot = slot_of(p_.pair_rank[first + i] / rings_.L);
        scalar =
            __uint_as_float(load_arrived(reinterpret_cast<const uint32_t*>(scalars(slot)) + i));
      }
      p_.scalars[first + i] = scalar;
    }
  }

  const WithTransport<NodeCombine, Transport>& q_;
  const CombineParams& p_;
  const Op& op_;
  const Rings& rings_;
  const int row_bytes_, vecs_, chunks_;
};

}  // namespace jax_ep
