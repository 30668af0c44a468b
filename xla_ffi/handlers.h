// SPDX-License-Identifier: Apache-2.0
// The FFI handlers, one a file; what they share is in call.h, rows.h and decode.h.
#pragma once
#include <utility>
#include <vector>

namespace jax_ep {

void* plan_handler();
void* dispatch_handler();
void* combine_handler();
void* slot_dispatch_handler();
void* slot_combine_handler();

// Name and address of every FFI handler.
inline std::vector<std::pair<const char*, void*>> handlers() {
  return {{"jax_ep_plan", plan_handler()},
          {"jax_ep_dispatch", dispatch_handler()},
          {"jax_ep_combine", combine_handler()},
          {"jax_ep_slot_dispatch", slot_dispatch_handler()},
          {"jax_ep_slot_combine", slot_combine_handler()}};
}

}  // namespace jax_ep
