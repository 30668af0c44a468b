// SPDX-License-Identifier: Apache-2.0
// What libjax_ep_rdma.so offers: one function, which returns a table of functions. The extension
// opens the library with dlopen, and only when a group spans nodes, as it needs NVSHMEM beside it.
// Functions that can fail return null, or in words what went wrong, valid until the thread's next
// call. One thread calls at a time.
#pragma once
#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace jax_ep::rdma {

// Grows with every change of `Table` and of what its functions take; the extension refuses another
// number.
constexpr int kTableVersion = 6;

constexpr size_t kUniqueIdBytes = 128;

// NVSHMEM's own numbers: from kStarted on it can be used, above it several ranks share a GPU.
enum Status : int { kNotStarted = 0, kBootstrapped = 1, kStarted = 2 };

struct Version {
  int major, minor, patch;
};

struct Facts {
  Version built;  // NVSHMEM whose headers and device code the library holds
  Version found;  // NVSHMEM that was loaded with it
  int cuda;       // the CUDA runtime inside the library, as CUDART_VERSION has it
};

struct Table {
  int version;  // kTableVersion; first in every version

  void (*facts)(Facts* out);
  int (*status)();

  // `id`: kUniqueIdBytes, made by one rank and brought to all by the caller.
  const char* (*make_unique_id)(unsigned char* id);
  // Collective: every rank with the same id, its own GPU, and after what can be known to fail has
  // been ruled out, since NVSHMEM ends the process on many failures.
  const char* (*start)(const unsigned char* id, int rank, int num_ranks, int device);
  // Collective; never after a rank has died.
  const char* (*stop)();

  // Collective, the same `bytes` on every rank: zeroed device memory that every rank's kernels can
  // name. `*arena` is null if there is no room.
  const char* (*allocate)(size_t bytes, void** arena);
  const char* (*release)(void* arena);
  // Where `mine`, an address in the arena, lies on `rank` as this GPU's kernels address it; null if
  // they reach it by puts only.
  void* (*peer)(void* mine, int rank);

  // Collective: passes `value` (not 0) on to the next rank by put with signal, and waits for that
  // of the rank before. `words`: kSmokeWords in the arena, which no earlier call was given. An
  // error if none, or a wrong one, came within `timeout_s`.
  const char* (*smoke)(uint64_t* words, int rank, int num_ranks, uint64_t value, double timeout_s);

  // Waits until every put and signal of kernels that have ended here is over at its destination. An
  // error if that takes longer than `timeout_s`: a kernel then goes on waiting on the GPU, and so
  // would whoever synchronises it.
  const char* (*quiet)(double timeout_s);

  // The kernels between nodes, of launch.h. Errors as CUDA has them.
  cudaError_t (*load_kernels)();
  cudaError_t (*launch_routing)(const NodeRouting& p, const RankElements& e, const Launch& how);
  cudaError_t (*launch_dispatch)(const NodeDispatch& p, const RankElements& e, Element x, Wire wire,
                                 const Launch& how);
  cudaError_t (*launch_combine)(const NodeCombine& p, const RankElements& e, Element y,
                                const Launch& how);
  // Of small batches.
  cudaError_t (*launch_slot_dispatch)(const SlotDispatchParams& p, const RankElements& e, Element x,
                                      Wire wire, const Launch& how);
  cudaError_t (*launch_slot_combine)(const SlotCombineParams& p, const RankElements& e, Element y,
                                     const Launch& how);
};

// Of one smoke test: the word to send, the word that arrives, its signal, and what was found.
constexpr int kSmokeWords = 4;

}  // namespace jax_ep::rdma

// The library's only exported name, and its type.
extern "C" const jax_ep::rdma::Table* jax_ep_rdma_table();
using JaxEpRdmaTable = const jax_ep::rdma::Table*();
