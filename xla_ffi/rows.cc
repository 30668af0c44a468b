// SPDX-License-Identifier: Apache-2.0
#include "rows.h"

namespace jax_ep {
namespace {

// Whether rows called `name` of H channels, of `row_bytes` where they arrive, have whole blocks of
// channels that share a scale, where they have to, and whole vectors.
bool are_whole(const char* name, int64_t H, int64_t row_bytes, bool in_blocks, Checker& checker) {
  const std::string rows = std::string(name) + ": expected ";
  if (in_blocks && H % kScaleBlock != 0) {
    checker.fail(rows + "a hidden size that is a multiple of 128 for fp8, got " +
                 std::to_string(H));
  }
  if (row_bytes % 16 != 0) {
    checker.fail(rows + "rows of a multiple of 16 bytes, got " + std::to_string(row_bytes));
  }
  return checker.ok();
}

}  // namespace

bool element_of(ffi::DataType type, Element* out) {
  switch (type) {
    case ffi::DataType::BF16:
      *out = Element::kBf16;
      return true;
    case ffi::DataType::F16:
      *out = Element::kF16;
      return true;
    case ffi::DataType::F32:
      *out = Element::kF32;
      return true;
    case ffi::DataType::F8E4M3FN:
      *out = Element::kFp8;
      return true;
    default:
      return false;
  }
}

bool wire_of(int64_t wire, Wire* out, Checker& checker) {
  *out = static_cast<Wire>(wire);
  if (wire >= 0 && wire <= 2) return true;
  checker.fail("wire: expected 0 (copy), 1 (quantized) or 2 (dequantized), got " +
               std::to_string(wire));
  return false;
}

bool partials_wire_of(int64_t wire, Wire* out, Checker& checker) {
  *out = static_cast<Wire>(wire);
  if (wire == 0 || wire == 1) return true;
  checker.fail("wire: expected 0 (copy) or 1 (quantized), got " + std::to_string(wire));
  return false;
}

bool x_of(const Buffers& buffers, Wire how, bool has_scales, ffi::DataType* type, int64_t* H,
          Element* element, Checker& checker) {
  if (!buffers.peek(0, type, H) || !element_of(*type, element)) {
    checker.fail("x: expected bf16, f16, f32 or e4m3fn");
    return false;
  }
  const int64_t row_bytes = *H * (how == Wire::kQuantized ? 1 : element_bytes(*element));
  return are_whole("x", *H, row_bytes, how != Wire::kCopy || has_scales, checker);
}

bool y_of(const Buffers& buffers, Wire how, ffi::DataType* type, int64_t* H, Element* element,
          Checker& checker) {
  if (!buffers.peek(0, type, H) || !element_of(*type, element) || *element == Element::kFp8) {
    checker.fail("y: expected bf16, f16 or f32");
    return false;
  }
  return are_whole("y", *H, *H * element_bytes(*element), how == Wire::kQuantized, checker);
}

PlanArrays take_plan(const Exchange& x, Buffers& buffers) {
  const int64_t T = x.num_tokens, K = x.top_k, all = int64_t{x.num_ranks} * T;
  PlanArrays a{};
  a.pair_rank = buffers.result<int32_t>("pair_rank", kInt, {T, K});
  a.pair_row = buffers.result<int32_t>("pair_row", kInt, {T, K});
  a.row_pair = buffers.result<int32_t>("row_pair", kInt, {x.num_rows});
  a.token_rows = buffers.result<int32_t>("token_rows", kInt, {all, K});
  a.token_slot = buffers.result<int32_t>("token_slot", kInt, {all});
  a.expert_ids = buffers.result<int32_t>("expert_ids", kInt, {x.num_rows});
  a.counts = buffers.result<int32_t>("counts", kInt, {x.local_experts()});
  a.group_sizes = buffers.result<int32_t>("group_sizes", kInt, {x.local_experts()});
  a.num_dropped = buffers.result<int32_t>("num_dropped", kInt, {1});
  return a;
}

}  // namespace jax_ep
