// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <nanobind/nanobind.h>

namespace jax_ep {

// Functions of the extension around libjax_ep_rdma.so and NVSHMEM.
void define_rdma(nanobind::module_& m);

}  // namespace jax_ep
