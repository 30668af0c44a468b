// SPDX-License-Identifier: Apache-2.0
// The one file that calls NVSHMEM on the host. Of its headers it includes those of point-to-point
// operations only: all of them take twice as long to compile.
#include <nvshmem_host.h>
// After it:
#include <device/nvshmem_defines.h>
#include <device/nvshmemx_defines.h>
#include <host/nvshmemx_api.h>

#include <chrono>
#include <cstring>
#include <string>
#include <thread>

#include "../device/ptx.cuh"
#include "library.h"

namespace jax_ep::rdma {
namespace {

constexpr Version kBuilt = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
                            NVSHMEM_VENDOR_PATCH_VERSION};

const char* failed(const std::string& what) {
  static thread_local std::string words;
  words = what;
  return words.c_str();
}

const char* failed(const char* call, int status) {
  return failed(std::string(call) + " returned " + std::to_string(status));
}

const char* failed(const char* call, cudaError_t error) {
  return failed(std::string(call) + ": " + cudaGetErrorString(error));
}

int device = -1;  // of this process

// NVSHMEM's calls want the device current, in whichever thread.
const char* select_device() {
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? nullptr : failed("cudaSetDevice", error);
}

void facts(Facts* out) {
  out->built = kBuilt;
  nvshmemx_vendor_get_version_info(&out->found.major, &out->found.minor, &out->found.patch);
  out->cuda = CUDART_VERSION;
}

int status() { return nvshmemx_init_status(); }

const char* make_unique_id(unsigned char* id) {
  nvshmemx_uniqueid_t unique = NVSHMEMX_UNIQUEID_INITIALIZER;
  static_assert(sizeof unique == kUniqueIdBytes, "the unique id travels whole");
  const int bad = nvshmemx_get_uniqueid(&unique);
  if (bad) return failed("nvshmemx_get_uniqueid", bad);
  std::memcpy(id, &unique, sizeof unique);
  return nullptr;
}

const char* start(const unsigned char* id, int rank, int num_ranks, int on_device) {
  device = on_device;
  if (const char* failure = select_device()) return failure;
  const cudaError_t error = cudaFree(nullptr);  // makes the context, which NVSHMEM demands
  if (error != cudaSuccess) return failed("cudaFree", error);
  static nvshmemx_uniqueid_t unique;  // NVSHMEM keeps its address
  std::memcpy(&unique, id, sizeof unique);
  nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
  int bad = nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &unique, &attributes);
  if (bad) return failed("nvshmemx_set_attr_uniqueid_args", bad);
  // What nvshmemx_init_attr wraps: that ends the process where this returns a status.
  int provided = 0;
  bad = nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID,
                             &attributes, {kBuilt.major, kBuilt.minor, kBuilt.patch});
  if (bad) return failed("nvshmemi_init_thread", bad);
  // It swallows failures after the bootstrap; they show here.
  if (status() < kStarted) return failed("nvshmemx_init_status", status());
  if (nvshmem_my_pe() != rank || nvshmem_n_pes() != num_ranks) {
    return failed("NVSHMEM was started as rank " + std::to_string(nvshmem_my_pe()) + " of " +
                  std::to_string(nvshmem_n_pes()));
  }
  return nullptr;
}

const char* stop() {
  if (const char* failure = select_device()) return failure;
  nvshmem_finalize();
  return status() >= kStarted ? failed("NVSHMEM is still in use by another library") : nullptr;
}

const char* allocate(size_t bytes, void** arena) {
  *arena = nullptr;
  if (const char* failure = select_device()) return failure;
  *arena = nvshmem_calloc(1, bytes);
  return *arena == nullptr ? failed("nvshmem_calloc found no room for " + std::to_string(bytes) +
                                    " bytes in its symmetric heap")
                           : nullptr;
}

const char* release(void* arena) {
  if (const char* failure = select_device()) return failure;
  nvshmem_free(arena);
  return nullptr;
}

void* peer(void* mine, int rank) { return nvshmem_ptr(mine, rank); }

struct Smoke {
  uint64_t* words;  // in the arena
  int next;         // rank
  uint64_t value;
  uint64_t timeout_ns;
};

// words[0] and its signal go to the next rank's words[1] and words[2], both written by the rank
// before, once; words[3], for this rank's host: what arrived, 0 if nothing did.
__global__ void pass_a_word(const __grid_constant__ Smoke s) {
  if (threadIdx.x == 0) s.words[0] = s.value;
  __syncthreads();
  nvshmemx_putmem_signal_nbi_block(s.words + 1, s.words, sizeof(uint64_t), s.words + 2, 1,
                                   NVSHMEM_SIGNAL_SET, s.next);
  if (threadIdx.x != 0) return;
  const uint64_t start = now_ns();
  while (load_acquire_sys(s.words + 2) != 1) {
    if (now_ns() - start > s.timeout_ns) return;
  }
  s.words[3] = load_relaxed(s.words + 1);
}

const char* smoke(uint64_t* words, int rank, int num_ranks, uint64_t value, double timeout_s) {
  const Smoke s{words, (rank + 1) % num_ranks, value, static_cast<uint64_t>(timeout_s * 1e9)};
  if (const char* failure = select_device()) return failure;
  uint64_t arrived = 0;
  cudaStream_t stream;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return failed("cudaStreamCreateWithFlags", error);
  pass_a_word<<<1, 32, 0, stream>>>(s);
  error = cudaGetLastError();
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(&arrived, words + 3, sizeof arrived, cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  if (error != cudaSuccess) return failed("the smoke test", error);
  if (arrived == value) return nullptr;
  return failed("rank " + std::to_string(rank) + " expected the word " + std::to_string(value) +
                " of the rank before it" +
                (arrived ? ", got " + std::to_string(arrived)
                         : " within " + std::to_string(timeout_s) + " s, got nothing"));
}

// Not nvshmemx_quiet_on_stream, which says nothing of a launch that fails, and whose kernel, of the
// NVSHMEM that was loaded, may look for what is under way elsewhere than this device code notes it.
__global__ void await_puts() { nvshmem_quiet(); }

cudaError_t query(cudaStream_t stream) {
  const cudaError_t error = cudaStreamQuery(stream);
  if (error == cudaErrorNotReady) cudaGetLastError();  // no failure, but kept as one
  return error;
}

const char* quiet(double timeout_s) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  if (const char* failure = select_device()) return failure;
  cudaStream_t stream;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error != cudaSuccess) return failed("cudaStreamCreateWithFlags", error);
  await_puts<<<1, 1, 0, stream>>>();
  error = cudaGetLastError();
  if (error == cudaSuccess) error = query(stream);
  while (error == cudaErrorNotReady) {
    if (Clock::now() - start > std::chrono::duration<double>(timeout_s)) {
      // The stream stays with its kernel, which may never end.
      return failed("expected all puts and signals of this rank to be over within " +
                    std::to_string(timeout_s) + " s, got some that are not");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    error = query(stream);
  }
  cudaStreamDestroy(stream);
  return error == cudaSuccess ? nullptr : failed("waiting for puts and signals", error);
}

cudaError_t load_kernels() {
  for (auto* load : {load_node_kernels, load_node_slot_dispatch, load_node_slot_combine}) {
    const cudaError_t error = load();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

constexpr Table kTable = {
    kTableVersion,
    facts,
    status,
    make_unique_id,
    start,
    stop,
    allocate,
    release,
    peer,
    smoke,
    quiet,
    load_kernels,
    launch_node_routing,
    launch_node_dispatch,
    launch_node_combine,
    launch_node_slot_dispatch,
    launch_node_slot_combine,
};

}  // namespace
}  // namespace jax_ep::rdma

extern "C" __attribute__((visibility("default"))) const jax_ep::rdma::Table* jax_ep_rdma_table() {
  return &jax_ep::rdma::kTable;
}
