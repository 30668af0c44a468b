// SPDX-License-Identifier: Apache-2.0
// jax_ep_slot_combine: combine of a small batch, or a half of it.
#include "call.h"
#include "handlers.h"
#include "rows.h"

namespace jax_ep {
namespace {

ffi::Error slot_combine(cudaStream_t stream, const Attributes& a, int64_t phase, bool has_weights,
                        int64_t wire, bool power_of_two, ffi::RemainingArgs args,
                        ffi::RemainingRets results) {
  Checker checker("jax_ep_slot_combine");
  Half half{};
  Wire how{};
  if (!within_limits(a, checker) || !half_of(phase, &half, checker) ||
      !partials_wire_of(wire, &how, checker)) {
    return checker.error();
  }
  Buffers buffers(args, results, checker);
  const Exchange& x = a.exchange;
  const int64_t T = x.num_tokens, K = x.top_k, rows = x.num_rows;
  SlotCombineParams p{};
  if (half == Half::kDone) p.started = buffers.operand<int32_t>("ticket", kInt, {1});
  ffi::DataType type{};
  int64_t H = 0;
  Element element{};
  if (!y_of(buffers, how, &type, &H, &element, checker)) return checker.error();
  p.exchange = x;
  p.half = half;
  p.hidden = static_cast<int>(H);
  p.quantized = how == Wire::kQuantized;
  p.power_of_two_scales = power_of_two;
  p.y = buffers.operand<char>("y", type, {rows, H});
  if (has_weights) p.weights = buffers.operand<float>("weights", kFloat, {rows});
  p.pair_rank = buffers.operand<int32_t>("pair_rank", kInt, {T, K});
  p.pair_row = buffers.operand<int32_t>("pair_row", kInt, {T, K});
  buffers.operand<int32_t>("row_pair", kInt, {rows});
  p.token_rows = buffers.operand<int32_t>("token_rows", kInt, {x.num_ranks * T, K});
  buffers.operand<int32_t>("token_slot", kInt, {x.num_ranks * T});
  if (half == Half::kStart) {
    p.ticket = buffers.result<int32_t>("ticket", kInt, {1});
  } else {
    p.out = buffers.result<char>("out", type, {T, H});
  }
  buffers.finish();
  Member member;
  const Operation operations[] = {Operation::kCombine, Operation::kCombineStart,
                                  Operation::kCombineDone};
  if (!checker.ok() || !enter(a, operations[phase], checker, &p.call, &member) ||
      !fits_slots(a, member, size_t(H) * element_bytes(element), checker)) {
    return checker.error();
  }
  Signature s = signature_of(a, member, Operation::kCombine);
  s.add(kSlots).add(H).add(static_cast<int>(type)).add(has_weights).add(wire).add(power_of_two);
  p.call.signature = s.value();
  const Launch where = launch_of(a, member, stream, member.group->most_sms(member.rank));
  if (const Nodes* nodes = member.group->nodes()) {
    return launched(nodes->library->launch_slot_combine(p, nodes->elements, element, where),
                    "jax_ep_slot_combine between nodes");
  }
  return launched(launch_slot_combine(&p, x, element, H, where), "jax_ep_slot_combine");
}

XLA_FFI_DEFINE_HANDLER(handler, with_attributes("jax_ep_slot_combine", slot_combine),
                       bind_exchange()
                           .Attr<int64_t>("phase")
                           .Attr<bool>("has_weights")
                           .Attr<int64_t>("wire")
                           .Attr<bool>("power_of_two")
                           .RemainingArgs()
                           .RemainingRets(),
                       kTraits);

}  // namespace

void* slot_combine_handler() { return reinterpret_cast<void*>(handler); }

}  // namespace jax_ep
