// SPDX-License-Identifier: Apache-2.0
// Arguments and launchers of the kernels. The FFI handlers, the tests and the benchmarks fill
// these.
#pragma once
#include <cuda_runtime.h>

#include "../layout/control.h"
#include "../layout/stats.h"
#include "../plan/geometry.h"

namespace jax_ep {

enum class Operation : uint32_t {
  kPlan = 1,
  kDispatch = 2,
  kCombine = 3,
  kDispatchStart = 4,
  kDispatchDone = 5,
  kCombineStart = 6,
  kCombineDone = 7,
  kRouting = 8,  // between nodes, before a plan
};
enum class Element : uint32_t { kBf16 = 0, kF16 = 1, kF32 = 2, kFp8 = 3 };

JAX_EP_HD int element_bytes(Element e) {
  return e == Element::kF32 ? 4 : e == Element::kFp8 ? 1 : 2;
}

// What happens to a row on its way.
enum class Wire : uint32_t {
  kCopy = 0,         // bytes as they are
  kQuantized = 1,    // quantised by the sender, delivered as e4m3 and scales
  kDequantized = 2,  // quantised by the sender, delivered as x's type
};

constexpr int kScaleBlock = 128;  // channels that share one FP8 scale

// The output buffers of one call that peers may write.
struct Lent {
  Location output[kMaxOutputs];
  uint64_t bytes[kMaxOutputs];
};

// Who calls: the group, and how to tell this call from others.
struct Call {
  Peers peers;
  Lent lent;
  Operation operation;
  uint32_t signature;         // 24 bits over operation, shapes and types: equal on all ranks
  unsigned long long* stats;  // the ring of this rank's timings; null: none are recorded
};

// What a plan says.
struct PlanArrays {
  int32_t* pair_rank;    // [T, K]
  int32_t* pair_row;     // [T, K]
  int32_t* row_pair;     // [rows]
  int32_t* token_rows;   // [R*T, K]
  int32_t* token_slot;   // [R*T]
  int32_t* expert_ids;   // [rows]
  int32_t* counts;       // [E/R]
  int32_t* group_sizes;  // [E/R]
  int32_t* num_dropped;  // [1]
};

struct PlanParams {
  Call call;
  Exchange exchange;
  const int32_t* topk_idx;  // [T, K]
  PlanArrays out;
  int32_t* scratch;  // [plan_scratch_words(exchange)], 16-byte aligned
};

struct DispatchParams {
  Call call;
  Exchange exchange;
  int hidden;     // H
  int row_bytes;  // of a delivered row
  int zero_tail;
  const char* x;              // [T, H]
  const float* scales;        // [T, H/128] with x already quantised, or null
  const float* scalars;       // [T*K] or null
  const int32_t* pair_rank;   // [T, K]
  const int32_t* pair_row;    // [T, K]
  const int32_t* row_pair;    // [rows]
  const int32_t* token_rows;  // [R*T, K]
  char* rows;                 // [rows, row_bytes]
  float* row_scales;          // [rows, H/128] or null
  float* row_scalars;         // [rows] or null
  int power_of_two_scales;    // scale_format "e8m0"
  int wire_percent;           // blocks that push, 0 for the default
};

struct CombineParams {
  Call call;
  Exchange exchange;
  int hidden;                 // H
  const char* y;              // [rows, H] or null
  const float* weights;       // [rows] or null
  const float* row_scalars;   // [rows] or null
  const int32_t* pair_rank;   // [T, K]
  const int32_t* pair_row;    // [T, K]
  const int32_t* row_pair;    // [rows]
  const int32_t* token_rows;  // [R*T, K]
  const int32_t* token_slot;  // [R*T]
  char* out;                  // [T, H]
  float* scalars;             // [T*K]
  char* partials;             // [T, partial_slots(exchange), bytes of a partial]: peers push here
  int power_of_two_scales;    // scale_format "e8m0"
  int wire_percent;           // blocks that push, 0 for the default
};

// Which half of a small batch's operation runs: `start` pushes, `done` waits and expands or adds.
enum class Half : uint32_t { kBoth = 0, kStart = 1, kDone = 2 };

// A dispatch with its plan, through slots.
struct SlotDispatchParams {
  Call call;
  Exchange exchange;
  Half half;
  int hidden;     // H
  int row_bytes;  // of a delivered row
  int zero_tail;
  int power_of_two_scales;  // scale_format "e8m0"
  const char* x;            // [T, H]
  const float* scales;      // [T, H/128] with x already quantised, or null
  const float* scalars;     // [T*K] or null
  const int32_t* topk_idx;  // [T, K]
  const int32_t* started;   // [1] the ticket of `start`, for `done`
  int32_t* ticket;          // [1] from `start`
  PlanArrays plan;          // from here on: not from `start`
  char* rows;               // [rows, row_bytes]
  float* row_scales;        // [rows, H/128] or null
  float* row_scalars;       // [rows] or null
};

// A combine through slots.
struct SlotCombineParams {
  Call call;
  Exchange exchange;
  Half half;
  int hidden;                 // H
  int quantized;              // partials of other ranks travel as e4m3 and scales
  int power_of_two_scales;    // scale_format "e8m0"
  const char* y;              // [rows, H]
  const float* weights;       // [rows] or null
  const int32_t* pair_rank;   // [T, K]
  const int32_t* pair_row;    // [T, K]
  const int32_t* token_rows;  // [R*T, K]
  const int32_t* started;     // [1] the ticket of `start`, for `done`
  int32_t* ticket;            // [1] from `start`
  char* out;                  // [T, H], not from `start`
};

// 32-bit words of PlanParams::scratch.
size_t plan_scratch_words(const Exchange& e);

// Partials of one token that may come from peers.
JAX_EP_HD int partial_slots(const Exchange& e) { return min_int(e.num_ranks - 1, e.top_k); }

// Bytes of a partial that travels as FP8: e4m3 values, then a float32 scale for every 128 channels,
// then nothing up to a multiple of 128, so that values lie in whole lines.
JAX_EP_HD int fp8_partial_bytes(int hidden) { return hidden + ceil_div(hidden, 32 * 128) * 128; }

// Launch on `num_sms` blocks, one per SM. `all_ranks`: `params` is a device array with one entry
// per rank and one launch plays all of them, rank = blockIdx.y (for tests and sanitizers).
struct Launch {
  int num_sms;
  cudaStream_t stream;
  int all_ranks;  // 0, or the number of ranks
};

// Whether variants for `all_ranks` are compiled: they double the code.
#ifdef JAX_EP_ALL_RANKS
constexpr bool kAllRanks = true;
#else
constexpr bool kAllRanks = false;
#endif

// Load every variant on the current device: lazily, the first launch would wait for running
// kernels.
cudaError_t load_plan();
cudaError_t load_dispatch();
cudaError_t load_combine();
cudaError_t load_slot_dispatch();
cudaError_t load_slot_combine();

cudaError_t launch_plan(const PlanParams* params, const Exchange& e, const Launch& how);
cudaError_t launch_dispatch(const DispatchParams* params, Element x, Wire wire, int hidden,
                            const Launch& how);
cudaError_t launch_combine(const CombineParams* params, Element y, Wire wire, const Launch& how);
cudaError_t launch_slot_dispatch(const SlotDispatchParams* params, const Exchange& e, Element x,
                                 Wire wire, int hidden, const Launch& how);
cudaError_t launch_slot_combine(const SlotCombineParams* params, const Exchange& e, Element y,
                                int hidden, const Launch& how);

}  // namespace jax_ep
