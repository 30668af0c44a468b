// SPDX-License-Identifier: Apache-2.0
// What _rdma.py calls. Calls that are collective let other threads of Python run.
#include "rdma_module.h"

#include <cuda_runtime_api.h>
#include <nanobind/stl/string.h>

#include "../csrc/runtime/group.h"
#include "rdma_library.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::tuple numbers(const rdma::Version& v) { return nb::make_tuple(v.major, v.minor, v.patch); }

nb::object as_tuple(const Nvshmem& n) {
  if (n.path.empty()) return nb::none();
  return nb::make_tuple(n.path, numbers(n.version), n.status);
}

nb::dict facts() {
  rdma::Facts f;
  rdma_library().facts(&f);
  nb::dict all;
  all["built"] = numbers(f.built);
  all["found"] = numbers(f.found);
  all["cuda"] = f.cuda;
  all["status"] = rdma_library().status();
  return all;
}

nb::bytes unique_id() {
  unsigned char id[rdma::kUniqueIdBytes];
  require_rdma(rdma_library().make_unique_id(id));
  return nb::bytes(reinterpret_cast<const char*>(id), sizeof id);
}

void start(nb::bytes id, int rank, int num_ranks, int device) {
  if (id.size() != rdma::kUniqueIdBytes) {
    throw std::runtime_error("unique id: expected " + std::to_string(rdma::kUniqueIdBytes) +
                             " bytes, got " + std::to_string(id.size()));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(id.c_str());
  const nb::gil_scoped_release release;
  require_rdma(rdma_library().start(bytes, rank, num_ranks, device));
}

uint64_t allocate(uint64_t bytes) {
  void* arena = nullptr;
  require_rdma(rdma_library().allocate(bytes, &arena));
  return reinterpret_cast<uint64_t>(arena);
}

uint64_t peer(uint64_t mine, int rank) {
  return reinterpret_cast<uint64_t>(rdma_library().peer(reinterpret_cast<void*>(mine), rank));
}

void smoke(uint64_t words, int rank, int num_ranks, uint64_t value, double timeout_s) {
  require_rdma(
      rdma_library().smoke(reinterpret_cast<uint64_t*>(words), rank, num_ranks, value, timeout_s));
}

void quiet(double timeout_s) { require_rdma(rdma_library().quiet(timeout_s)); }

nb::tuple free_memory(int device) {
  size_t free = 0, total = 0;
  int before = 0;
  require(cudaGetDevice(&before), "cudaGetDevice");
  require(cudaSetDevice(device), "cudaSetDevice");
  const cudaError_t error = cudaMemGetInfo(&free, &total);
  require(cudaSetDevice(before), "cudaSetDevice");
  require(error, "cudaMemGetInfo");
  return nb::make_tuple(free, total);
}

bool can_access_peer(int device, int peer) {
  int can = 0;
  require(cudaDeviceCanAccessPeer(&can, device, peer), "cudaDeviceCanAccessPeer");
  return can != 0;
}

int driver_cuda() {
  int version = 0;
  require(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

}  // namespace

void define_rdma(nb::module_& m) {
  const auto no_gil = nb::call_guard<nb::gil_scoped_release>();
  m.def(
      "loaded_nvshmem", [] { return as_tuple(loaded_nvshmem()); },
      "Path, version and status of the NVSHMEM in this process, or None.");
  m.def(
      "load_nvshmem", [](const std::string& path) { return as_tuple(load_nvshmem(path)); },
      "The same, after loading `path` if there was none.");
  m.def("rdma_open", &open_rdma, "Open libjax_ep_rdma.so.");
  m.def("rdma_facts", &facts, "Versions of NVSHMEM, of CUDA inside, and NVSHMEM's status.");
  m.def("rdma_unique_id", &unique_id, "What one rank makes and all start with.");
  m.def("rdma_start", &start, "Collective: start NVSHMEM.");
  m.def(
      "rdma_stop", [] { require_rdma(rdma_library().stop()); }, no_gil,
      "Collective: stop NVSHMEM.");
  m.def("rdma_allocate", &allocate, no_gil, "Collective: the address of so many zeroed bytes.");
  m.def(
      "rdma_release",
      [](uint64_t arena) { require_rdma(rdma_library().release(reinterpret_cast<void*>(arena))); },
      no_gil, "Collective: free them.");
  m.def("rdma_peer", &peer, "Where an address of the arena lies on a rank; 0: out of reach.");
  m.def("rdma_smoke", &smoke, no_gil, "Collective: pass a word to the next rank.");
  m.def("rdma_quiet", &quiet, no_gil, "Wait until this rank's puts and signals have arrived.");
  m.def("free_memory", &free_memory, "Free and total bytes of a CUDA device.");
  m.def("can_access_peer", &can_access_peer, "Whether a CUDA device addresses another's memory.");
  m.def("driver_cuda", &driver_cuda, "CUDA version of the driver, 1000 major + 10 minor.");
  m.attr("rdma_smoke_words") = rdma::kSmokeWords;
}

}  // namespace jax_ep
