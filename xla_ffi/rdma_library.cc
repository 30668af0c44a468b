// SPDX-License-Identifier: Apache-2.0
#include "rdma_library.h"

#include <dlfcn.h>

#include <stdexcept>

namespace jax_ep {
namespace {

constexpr const char* kHostLibrary = "libnvshmem_host.so.3";

[[noreturn]] void fail(const std::string& what) {
  const char* why = dlerror();
  throw std::runtime_error(what + (why ? std::string(": ") + why : ""));
}

template <typename Function>
Function* find(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) fail(std::string("no ") + name);
  return reinterpret_cast<Function*>(found);
}

Nvshmem describe(void* library) {
  Nvshmem n;
  auto* version = find<void(int*, int*, int*)>(library, "nvshmemx_vendor_get_version_info");
  version(&n.version.major, &n.version.minor, &n.version.patch);
  n.status = find<int()>(library, "nvshmemx_init_status")();
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(version), &info) && info.dli_fname) n.path = info.dli_fname;
  return n;
}

const rdma::Table*& table() {
  static const rdma::Table* opened = nullptr;
  return opened;
}

}  // namespace

Nvshmem loaded_nvshmem() {
  void* library = dlopen(kHostLibrary, RTLD_NOW | RTLD_NOLOAD);
  return library == nullptr ? Nvshmem{} : describe(library);
}

Nvshmem load_nvshmem(const std::string& path) {
  void* library = dlopen(kHostLibrary, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) library = dlopen(path.c_str(), RTLD_NOW);
  if (library == nullptr) fail("cannot load NVSHMEM");
  return describe(library);
}

void open_rdma(const std::string& path) {
  if (table() != nullptr) return;
  void* library = dlopen(path.c_str(), RTLD_NOW);
  if (library == nullptr) fail("cannot load the RDMA library");
  const rdma::Table* found = find<JaxEpRdmaTable>(library, "jax_ep_rdma_table")();
  if (found->version != rdma::kTableVersion) {
    throw std::runtime_error(path + ": expected a table of version " +
                             std::to_string(rdma::kTableVersion) + ", got " +
                             std::to_string(found->version));
  }
  table() = found;
}

const rdma::Table& rdma_library() {
  if (table() == nullptr) throw std::runtime_error("the RDMA library is not open");
  return *table();
}

void require_rdma(const char* failure) {
  if (failure != nullptr) throw std::runtime_error(std::string("NVSHMEM: ") + failure);
}

}  // namespace jax_ep
