// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <utility>
#include <vector>

namespace jax_ep {

// Name and address of every FFI handler.
std::vector<std::pair<const char*, void*>> handlers();

}  // namespace jax_ep
