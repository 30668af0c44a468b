// SPDX-License-Identifier: Apache-2.0
#include "shared_memory.h"

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "group.h"

namespace jax_ep {
namespace {

// The driver's functions, found through the runtime: no link to libcuda.
template <typename Function>
Function driver(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  require(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found),
          name);
#else
  require(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found), name);
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error(std::string(name) + ": not in this CUDA driver");
  }
  return reinterpret_cast<Function>(function);
}

#define DRIVER(name) driver<decltype(&name)>(#name)

void require_driver(CUresult result, const std::string& what) {
  if (result == CUDA_SUCCESS) return;
  const char* words = nullptr;
  DRIVER(cuGetErrorString)(result, &words);
  throw std::runtime_error(what + ": " + (words ? words : "unknown error"));
}

void allow(CUdeviceptr at, size_t bytes, int device) {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  require_driver(DRIVER(cuMemSetAccess)(at, bytes, &access, 1),
                 "cuMemSetAccess: GPU " + std::to_string(device) +
                     " cannot reach this memory (expected NVLink between all GPUs of a group)");
}

Range map(CUmemGenericAllocationHandle handle, size_t bytes, int device) {
  CUdeviceptr at = 0;
  require_driver(DRIVER(cuMemAddressReserve)(&at, bytes, 0, 0, 0), "cuMemAddressReserve");
  require_driver(DRIVER(cuMemMap)(at, bytes, 0, handle, 0), "cuMemMap");
  allow(at, bytes, device);
  return {reinterpret_cast<char*>(at), bytes};
}

}  // namespace

Range allocate_shared(int device, size_t bytes) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  size_t granularity = 0;
  require_driver(DRIVER(cuMemGetAllocationGranularity)(&granularity, &properties,
                                                       CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                 "cuMemGetAllocationGranularity");
  bytes = (bytes + granularity - 1) / granularity * granularity;
  CUmemGenericAllocationHandle handle{};
  require_driver(DRIVER(cuMemCreate)(&handle, bytes, &properties, 0), "cuMemCreate");
  return map(handle, bytes, device);
}

Exported export_allocation(const void* pointer) {
  const auto at = reinterpret_cast<CUdeviceptr>(pointer);
  CUdeviceptr base = 0;
  size_t bytes = 0;
  require_driver(DRIVER(cuMemGetAddressRange)(&base, &bytes, at), "cuMemGetAddressRange");
  CUmemGenericAllocationHandle handle{};
  const char* advice =
      " (expected XLA's default allocator with preallocation: XLA_PYTHON_CLIENT_ALLOCATOR and "
      "XLA_PYTHON_CLIENT_PREALLOCATE unset, in every process)";
  require_driver(DRIVER(cuMemRetainAllocationHandle)(&handle, reinterpret_cast<void*>(base)),
                 std::string("XLA's memory is not of a kind that processes can share") + advice);
  Exported out;
  require_driver(DRIVER(cuMemExportToShareableHandle)(&out.fd, handle,
                                                      CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                 std::string("XLA's memory cannot be exported") + advice);
  out.range = {reinterpret_cast<char*>(base), bytes};
  return out;
}

Range import_allocation(int fd, size_t bytes, int device) {
  CUmemGenericAllocationHandle handle{};
  require_driver(DRIVER(cuMemImportFromShareableHandle)(
                     &handle, reinterpret_cast<void*>(static_cast<uintptr_t>(fd)),
                     CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                 "cuMemImportFromShareableHandle of a peer's memory");
  return map(handle, bytes, device);
}

}  // namespace jax_ep
