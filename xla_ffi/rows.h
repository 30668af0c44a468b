// SPDX-License-Identifier: Apache-2.0
// Operands and results that several operations have: rows and plans.
#pragma once
#include "decode.h"

namespace jax_ep {

constexpr auto kInt = ffi::DataType::S32;
constexpr auto kFloat = ffi::DataType::F32;

bool element_of(ffi::DataType type, Element* out);

// How rows travel in a dispatch, and partials in a combine.
bool wire_of(int64_t wire, Wire* out, Checker& checker);
bool partials_wire_of(int64_t wire, Wire* out, Checker& checker);

// Type and hidden size of the next operand: x of a dispatch, y of a combine. False: they are wrong.
bool x_of(const Buffers& buffers, Wire how, bool has_scales, ffi::DataType* type, int64_t* H,
          Element* element, Checker& checker);
bool y_of(const Buffers& buffers, Wire how, ffi::DataType* type, int64_t* H, Element* element,
          Checker& checker);

// The results that say the plan.
PlanArrays take_plan(const Exchange& x, Buffers& buffers);

}  // namespace jax_ep
