// SPDX-License-Identifier: Apache-2.0
// What a GPU says of its SMs, its memory and its links.
#pragma once
#include "sms.h"

namespace jax_ep {

// By CUDA's device attributes, and by the driver's management library (NVML) for the links; what
// cannot be learnt is 0. Throws std::runtime_error without such a device.
Speeds speeds_of(int device);

}  // namespace jax_ep
