// SPDX-License-Identifier: Apache-2.0
// What the stages of a combine between nodes add up: rows by lanes, and which rows of this rank are
// a chunk's.
#pragma once
#include "../device/rows.cuh"
#include "launch.h"
#include "rings.cuh"

namespace jax_ep {

// Not as many threads as a block may have, so that each has registers for the rows in flight.
constexpr int kStageThreads = kFullBlock < 768 ? kFullBlock : 768;
constexpr int kStageWarps = kStageThreads / 32;
constexpr int kLaneVecs = 2;      // of a row, that a lane adds up
constexpr int kRowsInFlight = 4;  // of a lane

// Of a row, that a warp adds up: `kLaneVecs` of each lane, 32 apart.
constexpr int kPieceVecs = 32 * kLaneVecs;
using LaneVecs = Columns<kLaneVecs>;
template <typename T>
using LaneSum = RowSum<T, kLaneVecs>;

// Adds what has been rounded.
template <typename T>
__device__ __forceinline__ void add_rounded(LaneSum<T>& sum, const LaneVecs& row) {
#pragma unroll
  for (int j = 0; j < kLaneVecs; ++j) sum.add(j, row.v[j]);
}

struct Addend {
  const char* row;  // null: nothing
  float weight;
};

// A piece of rows, as a lane sees it: its Vecs' places, the last one's where it has none.
struct RowPiece {
  int at[kLaneVecs];
  bool here[kLaneVecs];

  __device__ RowPiece(int first, int vecs) {
#pragma unroll
    for (int j = 0; j < kLaneVecs; ++j) {
      const int mine = first + j * 32 + lane_id();
      here[j] = mine < vecs;
      at[j] = min_int(mine, vecs - 1);
    }
  }
  __device__ __forceinline__ void store(char* row, const LaneVecs& sum) const {
#pragma unroll
    for (int j = 0; j < kLaneVecs; ++j) {
      if (here[j]) store_row(reinterpret_cast<Vec*>(row) + at[j], sum.v[j]);
    }
  }
};

// Adds, by one warp, a piece of some rows, in order. `row_of(i)` is the i-th row and its weight,
// the same in all lanes. kArrived: others have written them during this launch.
template <typename T, bool kArrived, typename RowOf>
__device__ __forceinline__ void add_rows(LaneSum<T>& sum, int rows, const RowPiece& piece,
                                         RowOf&& row_of) {
#pragma unroll 1
  for (int i = 0; i < rows; i += kRowsInFlight) {
    Vec v[kRowsInFlight][kLaneVecs];
    Addend addend[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      addend[r] = i + r < rows ? row_of(i + r) : Addend{nullptr, 0.0f};
      if (addend[r].row == nullptr) continue;
      const auto* row = reinterpret_cast<const Vec*>(addend[r].row);
#pragma unroll
      for (int j = 0; j < kLaneVecs; ++j) {
        v[r][j] = kArrived ? load_arrived(row + piece.at[j]) : load_input(row + piece.at[j]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      if (addend[r].row == nullptr) continue;
#pragma unroll
      for (int j = 0; j < kLaneVecs; ++j) sum.add(j, v[r][j], addend[r].weight);
    }
  }
}

// The rows that this rank has of the tokens of a chunk; in shared memory.
struct OwnRows {
  int row[kMostChunkPairs];  // [token][K], the token's first, then -1
  float weight[kMostChunkPairs];
  int count[kMostChunkTokens];
  TokenSet tokens;  // that have some

  // By all threads of a block, before a block barrier: of `tokens` tokens from `first` on.
  __device__ void look_up(const CombineParams& p, size_t first, int tokens) {
    const int K = p.exchange.top_k;
    for (int i = threadIdx.x; i < tokens * K; i += blockDim.x) {
      const int r = p.token_rows[first * K + i];
      row[i] = r;
      weight[i] = r >= 0 && p.weights != nullptr ? p.weights[r] : 1.0f;
    }
  }
  // By all threads, between block barriers.
  __device__ void count_rows(int tokens, int K) {
    for (int first = threadIdx.x - lane_id(); first < kMostChunkTokens; first += blockDim.x) {
      const int at = first + lane_id();
      int n = 0;
      while (at < tokens && n < K && row[at * K + n] >= 0) ++n;
      count[at] = n;
      const unsigned some = __ballot_sync(kAllLanes, n > 0);
      if (lane_id() == 0) this->tokens.words[first / 32] = some;
    }
  }
};

// Items of a role: a block takes the next one when it is free, as SMs and links are not equally
// fast. The first `given` blocks begin with their own.
class BlockTickets {
 public:
  // By all threads of a block.
  __device__ BlockTickets(uint32_t* counter, int block, int given)
      : counter_(counter), given_(given), drawn_(block) {
    if (block >= given) draw();
    __syncthreads();  // nobody reads an earlier one's any more
    draw_next();
    __syncthreads();
  }
  // By all threads, after a block barrier and before the next `draw_next`.
  __device__ int take() const { return next(); }
  // Before a block barrier: the next item is known after it, the one after that on its way.
  __device__ void draw_next() {
    if (threadIdx.x == 0) next() = drawn_;
    draw();
  }

 private:
  __device__ static int& next() {
    __shared__ int item;
    return item;
  }
  __device__ void draw() {
    if (threadIdx.x == 0) drawn_ = given_ + static_cast<int>(add_relaxed_gpu(counter_, 1));
  }
  uint32_t* counter_;
  int given_;
  int drawn_;  // of the first thread
};

}  // namespace jax_ep
