// SPDX-License-Identifier: Apache-2.0
// jax_ep_combine: rows back to tokens.
#include "call.h"
#include "handlers.h"
#include "rows.h"

namespace jax_ep {
namespace {

ffi::Error combine(cudaStream_t stream, const Attributes& a, bool has_rows, bool has_weights,
                   bool has_scalars, ffi::RemainingArgs args, ffi::RemainingRets results) {
  Checker checker("jax_ep_combine");
  if (!within_limits(a, checker)) return checker.error();
  Buffers buffers(args, results, checker);
  const Exchange& x = a.exchange;
  const int64_t T = x.num_tokens, K = x.top_k, rows = x.num_rows;
  ffi::DataType type = kFloat;
  int64_t H = 0;
  Element element = Element::kF32;
  if (has_rows &&
      (!buffers.peek(0, &type, &H) || !element_of(type, &element) || element == Element::kFp8)) {
    checker.fail("y: expected bf16, f16 or f32");
    return checker.error();
  }
  CombineParams p{};
  p.exchange = x;
  p.hidden = static_cast<int>(H);
  if (has_rows) p.y = buffers.operand<char>("y", type, {rows, H});
  if (has_weights) p.weights = buffers.operand<float>("weights", kFloat, {rows});
  if (has_scalars) p.row_scalars = buffers.operand<float>("scalars", kFloat, {rows});
  p.pair_rank = buffers.operand<int32_t>("pair_rank", kInt, {T, K});
  p.pair_row = buffers.operand<int32_t>("pair_row", kInt, {T, K});
  p.row_pair = buffers.operand<int32_t>("row_pair", kInt, {rows});
  p.token_rows = buffers.operand<int32_t>("token_rows", kInt, {x.num_ranks * T, K});
  p.token_slot = buffers.operand<int32_t>("token_slot", kInt, {x.num_ranks * T});
  const int64_t slots = partial_slots(x);
  if (has_rows) p.out = buffers.result<char>("out", type, {T, H});
  if (has_scalars) p.scalars = buffers.result<float>("scalars_out", kFloat, {T * K});
  if (has_rows && slots > 0) p.partials = buffers.result<char>("partials", type, {T, slots, H});
  buffers.finish();
  const size_t row_bytes = size_t(H) * bytes_of(element);
  if (row_bytes % 16 != 0) {
    checker.fail("y: expected rows of a multiple of 16 bytes, got " + std::to_string(row_bytes));
  }
  Member member;
  if (!checker.ok() || !enter(a, Operation::kCombine, checker, &p.call, &member))
    return checker.error();
  lend(member, &p.call, 0, p.partials, size_t(T) * slots * row_bytes, checker);
  lend(member, &p.call, 1, p.scalars, size_t(T) * K * sizeof(float), checker);
  if (!checker.ok()) return checker.error();
  Signature s = signature_of(a, Operation::kCombine);
  s.add(H).add(static_cast<int>(type)).add(has_rows).add(has_weights).add(has_scalars);
  p.call.signature = s.value();
  return launched(launch_combine(&p, element, launch_of(a, member, stream)), "jax_ep_combine");
}

XLA_FFI_DEFINE_HANDLER(handler, with_attributes(combine),
                       bind_exchange()
                           .Attr<bool>("has_rows")
                           .Attr<bool>("has_weights")
                           .Attr<bool>("has_scalars")
                           .RemainingArgs()
                           .RemainingRets(),
                       kTraits);

}  // namespace

void* combine_handler() { return reinterpret_cast<void*>(handler); }

}  // namespace jax_ep
