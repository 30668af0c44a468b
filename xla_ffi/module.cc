// SPDX-License-Identifier: Apache-2.0
// The extension jax_ep._ext: facts about how it was built, and, in a build with CUDA, the groups of
// this process and the FFI handlers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "../csrc/runtime/sms.h"

#ifdef JAX_EP_CUDA
#include "handlers.h"
#include "rdma_module.h"
#include "registry.h"
#endif

namespace nb = nanobind;

namespace {

nb::dict build_facts() {
  nb::dict facts;
  facts["version"] = JAX_EP_VERSION;
  facts["compiler"] = __VERSION__;
  facts["cxx_standard"] = static_cast<long>(__cplusplus);
#ifdef JAX_EP_CUDA
  facts["cuda"] = JAX_EP_CUDA;
  facts["cuda_architectures"] = JAX_EP_CUDA_ARCHITECTURES;
#else
  facts["cuda"] = nb::none();  // no CUDA kernels in this build
#endif
  return facts;
}

nb::dict default_sms(int sms, double memory_gbs, double link_gbs, int num_ranks, int top_k,
                     double row_bytes) {
  const jax_ep::Speeds gpu{sms, memory_gbs, link_gbs};
  nb::dict of;
  of["dispatch"] = jax_ep::default_sms(gpu, jax_ep::dispatch_demand(num_ranks, top_k, row_bytes));
  of["combine"] = jax_ep::default_sms(gpu, jax_ep::combine_demand(num_ranks, top_k, row_bytes));
  return of;
}

#ifdef JAX_EP_CUDA
template <size_t kCount>
nb::list rows_of(const jax_ep::Field (&fields)[kCount]) {
  nb::list rows;
  for (const jax_ep::Field& f : fields) {
    rows.append(nb::make_tuple(f.name, f.writer, f.offset, f.bytes));
  }
  return rows;
}

nb::list control_layout(int num_ranks) {
  jax_ep::Field fields[jax_ep::kControlFields];
  jax_ep::control_layout(num_ranks, fields);
  return rows_of(fields);
}

nb::list piece_layout(int num_ranks, int node_ranks, std::pair<int, int> rings,
                      std::pair<int, int> slots) {
  jax_ep::Field fields[jax_ep::kPieceFields];
  jax_ep::rings_of(num_ranks, node_ranks, {rings.first, rings.second}, {slots.first, slots.second},
                   fields);
  return rows_of(fields);
}

nb::list read_stats() {
  std::vector<jax_ep::RankStats> all;
  {
    const nb::gil_scoped_release released;
    all = jax_ep::read_stats();
  }
  nb::list ranks;
  for (const jax_ep::RankStats& one : all) {
    const nb::bytes records(one.records.data(), one.records.size() * sizeof one.records[0]);
    ranks.append(nb::make_tuple(one.device, one.rank, one.words, records));
  }
  return ranks;
}
#endif

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "Compiled part of jax_ep.";
  m.def("build_facts", &build_facts, "Version, compiler and CUDA version of this build.");
  m.def("default_sms", &default_sms,
        "SMs of dispatch and combine on a GPU of so many SMs and GB/s.");
  m.attr("default_sms_numbers") =
      nb::make_tuple(jax_ep::kDispatchGbsPerSm, jax_ep::kCombineGbsPerSm, jax_ep::kCombineUsPerSum,
                     jax_ep::kSpareSms, jax_ep::kLeftToOthers);
#ifdef JAX_EP_CUDA
  m.def(
      "handlers",
      [] {
        nb::dict all;
        for (const auto& [name, address] : jax_ep::handlers()) all[name] = nb::capsule(address);
        return all;
      },
      "Name and capsule of every FFI handler.");
  m.def(
      "plan_scratch_words",
      [](int num_ranks, int num_experts, int num_tokens, int top_k) {
        return jax_ep::plan_scratch_words({num_ranks, num_experts, num_tokens, top_k, 0, 1, 0});
      },
      "32-bit words of the plan's scratch result.");
  const auto no_gil = nb::call_guard<nb::gil_scoped_release>();
  m.def("make_group", &jax_ep::make_group, no_gil,
        "Make the group `key`: the CUDA device of each rank, -1 for ranks of other processes.");
  m.def(
      "make_node_group",
      [](const std::string& key, const std::vector<int>& devices, uint64_t address, int node_ranks,
         const std::vector<int>& elements, std::pair<int, int> rings, std::pair<int, int> slots) {
        return jax_ep::make_node_group(key, devices,
                                       {address,
                                        node_ranks,
                                        elements,
                                        {rings.first, rings.second},
                                        {slots.first, slots.second}});
      },
      no_gil,
      "The same of a group that spans nodes: where its piece of the arena is on this rank, ranks "
      "of a node, NVSHMEM's rank of each, slots of a ring and bytes of one, tokens of a small "
      "batch and bytes of a row.");
  m.def(
      "export_rank",
      [](const std::string& key, int rank, uint64_t in_pool) {
        std::vector<std::pair<int, size_t>> exported;
        for (const jax_ep::Exported& e : jax_ep::export_rank(key, rank, in_pool)) {
          exported.emplace_back(e.fd, e.range.bytes);
        }
        return exported;
      },
      "Descriptor and bytes of the memory around `in_pool`, and of a rank's control block.");
  m.def(
      "attach_rank",
      [](const std::string& key, int rank, const std::vector<std::pair<int, size_t>>& exported) {
        std::vector<jax_ep::Exported> its;
        for (const auto& [fd, bytes] : exported) its.push_back({fd, {nullptr, bytes}});
        jax_ep::attach_rank(key, rank, its);
      },
      no_gil, "Map what another process exported.");
  m.def("start_group", &jax_ep::start_group, no_gil,
        "Start a generation of the group `key`, in use under `signature`.");
  m.def("is_broken", &jax_ep::is_broken, no_gil,
        "Whether a rank here failed or knows of a failure.");
  m.def(
      "device_bus_id",
      [](int device) {
        char id[32];
        jax_ep::require(cudaDeviceGetPCIBusId(id, sizeof id, device), "cudaDeviceGetPCIBusId");
        return std::string(id);
      },
      "PCI bus id of a CUDA device: the same in every process.");
  m.def(
      "device_speeds",
      [](int device) {
        const jax_ep::Speeds gpu = jax_ep::speeds_of(device);
        return nb::make_tuple(gpu.sms, gpu.memory_gbs, gpu.link_gbs);
      },
      "SMs, and GB/s of memory and links as the device says them, 0 where it does not.");
  m.def(
      "slot_bytes",
      [](int num_ranks, int tokens, int row_bytes) {
        return jax_ep::slot_bytes(num_ranks, {tokens, row_bytes});
      },
      "Bytes of the slots on each rank.");
  m.def("record_stats", &jax_ep::record_stats, no_gil,
        "Whether operations of the groups under a signature record timings from now on.");
  m.def("read_stats", &read_stats, "Device, rank, words of a record, and records, of each rank.");
  m.def("finalize_groups", &jax_ep::finalize_groups, "Take all groups out of use.");
  m.def("describe_faults", &jax_ep::describe_faults,
        "What went wrong first; empty if nothing did.");
  m.def("describe_groups", &jax_ep::describe_groups, "One line for each group.");
  m.def("control_layout", &control_layout, "Name, writer, offset and bytes of each control field.");
  m.def("piece_layout", &piece_layout,
        "The same of what lies behind it in a group that spans nodes: slots, outboxes, rings.");
  jax_ep::define_rdma(m);
#endif
}
