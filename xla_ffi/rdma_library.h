// SPDX-License-Identifier: Apache-2.0
// libjax_ep_rdma.so and NVSHMEM's host library as this process has them: opened once, never closed.
// Everything here throws std::runtime_error.
#pragma once
#include <string>

#include "../csrc/rdma/library.h"

namespace jax_ep {

// NVSHMEM's host library in this process.
struct Nvshmem {
  std::string path;
  rdma::Version version;
  int status;  // rdma::Status, whoever started it
};

// The one that is loaded, by whomever; with an empty `path` if none is.
Nvshmem loaded_nvshmem();

// Load `path`, unless one is loaded: a process can have only one.
Nvshmem load_nvshmem(const std::string& path);

// Open libjax_ep_rdma.so, once NVSHMEM is loaded.
void open_rdma(const std::string& path);

// Its table. Throws unless it is open.
const rdma::Table& rdma_library();

// Throws if a function of the table said that something went wrong.
void require_rdma(const char* failure);

}  // namespace jax_ep
