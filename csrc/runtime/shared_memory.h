// SPDX-License-Identifier: Apache-2.0
// Device memory that several processes of one host map: exported as POSIX file descriptors by the
// CUDA driver's virtual memory management, which XLA's preallocated pool is made of too.
#pragma once
#include <cstddef>
#include <cstdint>

namespace jax_ep {

// A piece of device memory as this process addresses it.
struct Range {
  char* base = nullptr;
  size_t bytes = 0;
};

// What another process needs in order to map a range; it owns the descriptor.
struct Exported {
  int fd = -1;
  Range range;
};

// New memory of `device` that can be exported; at least `bytes`, never freed.
Range allocate_shared(int device, size_t bytes);

// The whole allocation that `pointer` lies in. Throws std::runtime_error if it cannot be exported.
Exported export_allocation(const void* pointer);

// The memory behind another process's descriptor, mapped for `device`; never unmapped.
Range import_allocation(int fd, size_t bytes, int device);

}  // namespace jax_ep
