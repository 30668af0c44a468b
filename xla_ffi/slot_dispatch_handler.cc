// SPDX-License-Identifier: Apache-2.0
// jax_ep_slot_dispatch: plan and dispatch of a small batch, or a half of both.
#include "call.h"
#include "handlers.h"
#include "rows.h"

namespace jax_ep {
namespace {

ffi::Error slot_dispatch(cudaStream_t stream, const Attributes& a, int64_t phase, int64_t wire,
                         bool power_of_two, bool zero_tail, bool has_scales, bool has_scalars,
                         ffi::RemainingArgs args, ffi::RemainingRets results) {
  Checker checker("jax_ep_slot_dispatch");
  Half half{};
  Wire how{};
  if (!within_limits(a, checker) || !half_of(phase, &half, checker) ||
      !wire_of(wire, &how, checker)) {
    return checker.error();
  }
  Buffers buffers(args, results, checker);
  const Exchange& x = a.exchange;
  const int64_t T = x.num_tokens, K = x.top_k, rows = x.num_rows;
  SlotDispatchParams p{};
  if (half == Half::kDone) p.started = buffers.operand<int32_t>("ticket", kInt, {1});
  ffi::DataType type{};
  int64_t H = 0;
  Element element{};
  if (!x_of(buffers, how, has_scales, &type, &H, &element, checker)) return checker.error();
  const int64_t S = H / kScaleBlock;
  p.exchange = x;
  p.half = half;
  p.hidden = static_cast<int>(H);
  p.row_bytes = static_cast<int>(H) * (how == Wire::kQuantized ? 1 : element_bytes(element));
  p.zero_tail = zero_tail;
  p.power_of_two_scales = power_of_two;
  p.x = buffers.operand<char>("x", type, {T, H});
  if (has_scales) p.scales = buffers.operand<float>("scales", kFloat, {T, S});
  if (has_scalars) p.scalars = buffers.operand<float>("scalars", kFloat, {T * K});
  p.topk_idx = buffers.operand<int32_t>("topk_idx", kInt, {T, K});
  if (half == Half::kStart) {
    p.ticket = buffers.result<int32_t>("ticket", kInt, {1});
  } else {
    const ffi::DataType row_type = how == Wire::kQuantized ? ffi::DataType::F8E4M3FN : type;
    p.rows = buffers.result<char>("rows", row_type, {rows, H});
    if (has_scales || how == Wire::kQuantized) {
      p.row_scales = buffers.result<float>("row_scales", kFloat, {rows, S});
    }
    if (has_scalars) p.row_scalars = buffers.result<float>("row_scalars", kFloat, {rows});
    p.plan = take_plan(x, buffers);
  }
  buffers.finish();
  Member member;
  const Operation operations[] = {Operation::kDispatch, Operation::kDispatchStart,
                                  Operation::kDispatchDone};
  if (!checker.ok() || !enter(a, operations[phase], checker, &p.call, &member) ||
      !fits_slots(a, member, size_t(H) * element_bytes(element), checker)) {
    return checker.error();
  }
  Signature s = signature_of(a, member, Operation::kDispatch);
  s.add(kSlots).add(H).add(static_cast<int>(type)).add(wire).add(power_of_two);
  s.add(has_scales).add(has_scalars);
  p.call.signature = s.value();
  const Launch where = launch_of(a, member, stream, member.group->most_sms(member.rank));
  if (const Nodes* nodes = member.group->nodes()) {
    return launched(nodes->library->launch_slot_dispatch(p, nodes->elements, element, how, where),
                    "jax_ep_slot_dispatch between nodes");
  }
  return launched(launch_slot_dispatch(&p, x, element, how, H, where), "jax_ep_slot_dispatch");
}

XLA_FFI_DEFINE_HANDLER(handler, with_attributes("jax_ep_slot_dispatch", slot_dispatch),
                       bind_exchange()
                           .Attr<int64_t>("phase")
                           .Attr<int64_t>("wire")
                           .Attr<bool>("power_of_two")
                           .Attr<bool>("zero_tail")
                           .Attr<bool>("has_scales")
                           .Attr<bool>("has_scalars")
                           .RemainingArgs()
                           .RemainingRets(),
                       kTraits);

}  // namespace

void* slot_dispatch_handler() { return reinterpret_cast<void*>(handler); }

}  // namespace jax_ep
