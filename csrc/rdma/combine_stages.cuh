// SPDX-License-Identifier: Apache-2.0
// The three stages of a combine between nodes. Each does its items in one order: chunk after chunk,
// in a chunk source node after source node.
#pragma once
#include "combine_sums.cuh"
#include "put_messages.cuh"

namespace jax_ep {

// What another rank or node has sent: of which tokens, and where; in shared memory.
struct Source {
  TokenSet tokens;
  const char* rows;
};

template <typename T, typename Transport>
class Stages {
 public:
  __device__ Stages(const WithTransport<NodeCombine, Transport>& q, const Op& op,
                    const Rings& rings, OwnRows& own)
      : q_(q),
        p_(q.combine),
        op_(op),
        rings_(rings),
        own_(own),
        row_bytes_(p_.y == nullptr ? 0 : p_.hidden * int(sizeof(T))),
        vecs_(row_bytes_ / int(sizeof(Vec))),
        chunks_(ceil_div(p_.exchange.num_tokens, q.shape.chunk)) {}

  __device__ int chunks() const { return chunks_; }

  // What my rows add to the tokens of the other ranks of my node, and of those with their indices
  // in other nodes: to them. False: give up.
  __device__ bool make_partials(int block, int blocks) const {
    const int others = rings_.L - 1, per_chunk = rings_.N * others;
    for (int i = block; i < chunks_ * per_chunk; i += blocks) {
      const int node = i % per_chunk / others, to = rings_.index + 1 + i % others;
      if (!make_partial(i / per_chunk, node, to < rings_.L ? to : to - rings_.L)) return false;
    }
    return true;
  }
  // What my node's rows add to the tokens of the ranks with my index in other nodes: to them.
  // False: give up.
  __device__ bool sum_node(int block, int blocks) const {
    const int others = rings_.N - 1;
    BlockTickets tickets(&op_.header().wire_ticket, block, blocks);
    for (int i; (i = tickets.take()) < chunks_ * others;) {
      if (!sum_node_chunk(i / others, rings_.other(i % others), tickets)) return false;
    }
    return true;
  }
  // What all nodes' rows add to my tokens.
  __device__ void sum_nodes(int block, int blocks) const {
    BlockTickets tickets(&op_.header().local_ticket, block, blocks);
    for (int i; (i = tickets.take()) < chunks_;) {
      if (!sum_nodes_chunk(i, tickets)) return;
    }
  }

 private:
  __device__ int tokens_of(int chunk) const {
    return min_int(q_.shape.chunk, p_.exchange.num_tokens - chunk * q_.shape.chunk);
  }
  __device__ size_t first_token(int chunk, int source) const {
    return size_t(source) * p_.exchange.num_tokens + chunk * q_.shape.chunk;
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
  // The place of the thread among those that wait, from the last on: the first ones look up rows.
  __device__ static int waiter() { return kStageThreads - 1 - threadIdx.x; }

  // Whether the head of message or partial `stamp` of `rank` is what it should be, and what it
  // says. By one warp.
  __device__ bool check_head(const char* slot, uint64_t stamp, int rank, int tokens,
                             Source* source) const {
    if (lane_id() == 0) source->rows = slot + q_.shape.rows_at();
    if (read_head(slot, stamp, tokens, &source->tokens)) return true;
    if (lane_id() == 0) op_.fail(Fault::kMismatch, Phase::kMessage, rank, 0, stamp);
    return false;
  }

  // f(token, piece) for each piece of the tokens of a chunk, by one warp each.
  template <typename F>
  __device__ __forceinline__ void for_pieces(int tokens, F&& f) const {
    const int pieces = ceil_div(vecs_, kPieceVecs);
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < tokens * pieces; i += kStageWarps) {
      f(i / pieces, RowPiece(i % pieces * kPieceVecs, vecs_));
    }
  }

  // What my rows add to a piece of a token, rounded.
  __device__ __forceinline__ LaneVecs own_sum(int at, const RowPiece& piece) const {
    LaneSum<T> sum;
    const int begin = at * p_.exchange.top_k;
    add_rows<T, false>(sum, own_.count[at], piece, [&](int k) {
      return Addend{p_.y + size_t(own_.row[begin + k]) * row_bytes_, own_.weight[begin + k]};
    });
    return sum.rounded();
  }

  // The row of a token that another node has sent, or another rank of mine, whose rows are not
  // packed.
  __device__ Addend of_message(const Source& source, int at) const {
    const bool has = source.tokens.has(at);
    return {has ? source.rows + size_t(source.tokens.before(at)) * row_bytes_ : nullptr, 1.0f};
  }
  __device__ Addend of_partial(const Source& source, int at) const {
    return {source.tokens.has(at) ? source.rows + size_t(at) * row_bytes_ : nullptr, 1.0f};
  }

  // What my node's rows add: each rank's partial, in rank order, rounded. Mine is not in memory.
  __device__ __forceinline__ LaneVecs node_sum(const Source* of_rank, int at,
                                               const RowPiece& piece) const {
    const int mine = rings_.index;
    const LaneVecs own = own_sum(at, piece);
    LaneSum<T> sum;
    add_rows<T, true>(sum, mine, piece, [&](int j) { return of_partial(of_rank[j], at); });
    if (own_.count[at] > 0) add_rounded<T>(sum, own);
    add_rows<T, true>(sum, rings_.L - 1 - mine, piece,
                      [&](int i) { return of_partial(of_rank[mine + 1 + i], at); });
    return sum.rounded();
  }

  // My part of the tokens of a chunk of rank `to` of `node`: to the rank of my node with that
  // index. False: give up.
  __device__ bool make_partial(int chunk, int node, int to) const {
    const int source = node * rings_.L + to, gateway = op_.node_first() + to;
    const Turn here = partial_turn(to, chunk, node);             // to the gateway
    const Turn there = partial_turn(rings_.index, chunk, node);  // from me
    const int count = tokens_of(chunk);
    bool room = true;
    if (waiter() == 0) room = rings_.await_room(here, rings_.emptied(here), gateway);
    own_.look_up(p_, first_token(chunk, source), count);
    if (!__syncthreads_and(room)) return false;
    own_.count_rows(count, p_.exchange.top_k);
    __syncthreads();
    char* slot = rings_.of(gateway, rings_.partials(there, to));
    if (threadIdx.x < 32) write_head(slot, rings_.stamp(there), own_.tokens.count(), own_.tokens);
    store_own_scalars(reinterpret_cast<float*>(rings_.of(gateway, rings_.scalars(there))), chunk,
                      source);
    for_pieces(count, [&](int at, const RowPiece& piece) {
      if (own_.count[at] > 0) piece.store(row_at(slot, at), own_sum(at, piece));
    });
    __syncthreads();  // the block's writes before the flag
    if (threadIdx.x == 0) {
      auto* flag = reinterpret_cast<uint64_t*>(rings_.of(gateway, rings_.filled(there)));
      store_release_sys(flag, rings_.stamp(there));  // publishes the partial
    }
    return true;
  }

  // Scalars of my rows of a chunk of `source`, at their pairs' places in the chunk.
  __device__ void store_own_scalars(float* to, int chunk, int source) const {
    if (p_.row_scalars == nullptr) return;
    const int K = p_.exchange.top_k;
    const int first = static_cast<int>(first_token(chunk, source)) * K;  // pair of the group
    for (int i = threadIdx.x; i < tokens_of(chunk) * K; i += blockDim.x) {
      const int row = own_.row[i];
      if (row >= 0) to[p_.row_pair[row] - first] = p_.row_scalars[row];
    }
  }

  // By all threads, which look up my own rows of a chunk of the rank of `node` with my index at
  // the same time: await the node's partials. By one of them, `more` waits. False: give up.
  template <typename More>
  __device__ bool await_partials(int chunk, int node, More&& more) const {
    bool good = true;
    for (int j = waiter(); j < rings_.L; j += kStageThreads) {
      const Turn partial = partial_turn(j, chunk, node);
      if (j == rings_.index) continue;
      good &= rings_.await_message(partial, rings_.filled(partial), op_.node_first() + j);
    }
    if (good) good = more();
    own_.look_up(p_, first_token(chunk, rings_.rank_of(node)), tokens_of(chunk));
    return __syncthreads_and(good);
  }

  // By all threads, then: the tokens that each other rank of my node has rows of, and all of them
  // together, mine too. `read_more(warp)` checks other heads. False: give up.
  template <typename ReadMore>
  __device__ bool read_heads(int chunk, int node, Source* of_rank, TokenSet& of_node,
                             ReadMore&& read_more) const {
    const int count = tokens_of(chunk), warp = threadIdx.x / 32;
    own_.count_rows(count, p_.exchange.top_k);
    bool good = true;
    for (int j = warp; j < rings_.L; j += kStageWarps) {
      if (j == rings_.index) continue;
      const Turn partial = partial_turn(j, chunk, node);
      good &= check_head(rings_.here(rings_.partials(partial, rings_.index)), rings_.stamp(partial),
                         op_.node_first() + j, count, &of_rank[j]);
    }
    good &= read_more(warp);
    if (!__syncthreads_and(good)) return false;
    if (threadIdx.x < kMostChunkTokens / 32) {
      uint32_t word = own_.tokens.words[threadIdx.x];
      for (int j = 0; j < rings_.L; ++j) {
        if (j != rings_.index) word |= of_rank[j].tokens.words[threadIdx.x];
      }
      of_node.words[threadIdx.x] = word;
    }
    __syncthreads();
    return true;
  }

  // By all threads, after a block barrier: the node's partials have been read.
  __device__ void give_back_partials(int chunk, int node) const {
    for (int j = threadIdx.x; j < rings_.L; j += blockDim.x) {
      if (j == rings_.index) continue;
      const Turn there = partial_turn(rings_.index, chunk, node);
      auto* credit =
          reinterpret_cast<uint64_t*>(rings_.of(op_.node_first() + j, rings_.emptied(there)));
      store_release_sys(credit, rings_.credit(there));  // publishes that the partial has been read
    }
  }

  // False: give up.
  __device__ bool sum_node_chunk(int chunk, int node, BlockTickets& tickets) const {
    __shared__ Source of_rank[kMaxRanks];
    __shared__ TokenSet of_node;
    const Turn turn = rings_.message(node, chunk);
    const int count = tokens_of(chunk);
    auto await_room = [&] {
      return waiter() != 0 || rings_.await_room(turn, rings_.credited(turn), rings_.rank_of(node));
    };
    if (!await_partials(chunk, node, await_room)) return false;
    if (!read_heads(chunk, node, of_rank, of_node, [](int) { return true; })) return false;
    char* slot = rings_.here(rings_.to_send(turn));
    const int rows = of_node.count();
    if (threadIdx.x < 32) write_head(slot, rings_.stamp(turn), rows, of_node);
    copy_scalars(slot, chunk, node);
    for_pieces(count, [&](int at, const RowPiece& piece) {
      if (!of_node.has(at)) return;
      piece.store(row_at(slot, of_node.before(at)), node_sum(of_rank, at, piece));
    });
    tickets.draw_next();
    __syncthreads();  // the block's writes before the message, its reads before the credits
    give_back_partials(chunk, node);
    hand_to_put(rings_, turn);
    return true;
  }

  // Scalars of all my node's rows of a chunk: those of other ranks have come, mine are here.
  __device__ void copy_scalars(char* slot, int chunk, int node) const {
    if (p_.row_scalars == nullptr) return;
    if (rings_.L > 1) {
      const Turn any = partial_turn(0, chunk, node);
      const auto* from = reinterpret_cast<const uint32_t*>(rings_.here(rings_.scalars(any)));
      for (int i = threadIdx.x; i < tokens_of(chunk) * p_.exchange.top_k; i += blockDim.x) {
        scalars(slot)[i] = __uint_as_float(load_arrived(from + i));
      }
      __syncthreads();  // mine come after what lies at their places
    }
    store_own_scalars(scalars(slot), chunk, rings_.rank_of(node));
  }

  // False: give up.
  __device__ bool sum_nodes_chunk(int chunk, BlockTickets& tickets) const {
    __shared__ Source of_rank[kMaxRanks], of_other[kMaxRanks];
    __shared__ TokenSet of_node;
    const int N = rings_.N, count = tokens_of(chunk);
    auto slot_of = [&](int n) {
      return rings_.here(rings_.received(rings_.message(n, chunk), rings_.node));
    };
    if (!await_partials(chunk, rings_.node, [&] { return await_messages(chunk); })) return false;
    auto read_messages = [&](int warp) {
      bool good = true;
      for (int n = warp; n < N; n += kStageWarps) {
        if (n == rings_.node) continue;
        good &= check_head(slot_of(n), rings_.stamp(rings_.message(n, chunk)), rings_.rank_of(n),
                           count, &of_other[n]);
      }
      return good;
    };
    if (!read_heads(chunk, rings_.node, of_rank, of_node, read_messages)) return false;
    char* out = p_.out + chunk * size_t(q_.shape.chunk) * row_bytes_;
    for_pieces(count, [&](int at, const RowPiece& piece) {
      auto message = [&](int n) { return of_message(of_other[n], at); };
      const LaneVecs own = node_sum(of_rank, at, piece);
      LaneSum<T> sum;
      add_rows<T, true>(sum, rings_.node, piece, message);
      if (of_node.has(at)) add_rounded<T>(sum, own);
      add_rows<T, true>(sum, N - 1 - rings_.node, piece,
                        [&](int i) { return message(rings_.node + 1 + i); });
      piece.store(out + size_t(at) * row_bytes_, sum.rounded());
    });
    collect_scalars(chunk, slot_of);
    tickets.draw_next();
    __syncthreads();  // the block's reads before the credits
    give_back_partials(chunk, rings_.node);
    for (int n = threadIdx.x; n < N; n += blockDim.x) {
      if (n == rings_.node) continue;
      const Turn there = rings_.message(rings_.node, chunk);
      q_.transport.signal(rings_.rank_of(n), rings_.credited(there), rings_.credit(there));
    }
    return true;
  }

  __device__ bool await_messages(int chunk) const {
    bool good = true;
    for (int n = waiter(); n < rings_.N && good; n += kStageThreads) {
      if (n == rings_.node) continue;
      const Turn turn = rings_.message(n, chunk);
      const uint64_t flag = rings_.arrived(turn);
      good = rings_.await_message(turn, flag, rings_.rank_of(n));
      if (good) q_.transport.receive(rings_.word(flag));
    }
    return good;
  }

  // Each of my pairs' scalar: from its row, from a rank of my node, or from another node's message.
  template <typename SlotOf>
  __device__ void collect_scalars(int chunk, SlotOf&& slot_of) const {
    if (p_.row_scalars == nullptr) return;
    const int K = p_.exchange.top_k;
    const size_t first = size_t(chunk) * q_.shape.chunk * K;
    const char* of_partials = rings_.here(rings_.scalars(partial_turn(0, chunk, rings_.node)));
    for (int i = threadIdx.x; i < tokens_of(chunk) * K; i += blockDim.x) {
      const int row = p_.pair_row[first + i], rank = p_.pair_rank[first + i];
      float scalar = 0.0f;
      if (row >= 0 && rank == op_.me) {
        scalar = p_.row_scalars[row];
      } else if (row >= 0) {
        const int node = rank / rings_.L;
        const auto* from = node == rings_.node ? reinterpret_cast<const float*>(of_partials)
                                               : scalars(slot_of(node));
        scalar = __uint_as_float(load_arrived(reinterpret_cast<const uint32_t*>(from) + i));
      }
      p_.scalars[first + i] = scalar;
    }
  }

  const WithTransport<NodeCombine, Transport>& q_;
  const CombineParams& p_;
  const Op& op_;
  const Rings& rings_;
  OwnRows& own_;
  const int row_bytes_, vecs_, chunks_;
};

}  // namespace jax_ep
