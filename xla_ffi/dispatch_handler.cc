// SPDX-License-Identifier: Apache-2.0
// jax_ep_dispatch: tokens to rows, by a plan.
#include "call.h"
#include "handlers.h"
#include "rows.h"

namespace jax_ep {
namespace {

ffi::Error dispatch(cudaStream_t stream, const Attributes& a, int64_t wire, bool power_of_two,
                    bool zero_tail, bool has_scales, bool has_scalars, ffi::RemainingArgs args,
                    ffi::RemainingRets results) {
  Checker checker("jax_ep_dispatch");
  if (!within_limits(a, checker)) return checker.error();
  Buffers buffers(args, results, checker);
  const Exchange& x = a.exchange;
  const int64_t T = x.num_tokens, K = x.top_k, rows = x.num_rows;
  ffi::DataType type{};
  int64_t H = 0;
  Element element{};
  Wire how{};
  if (!wire_of(wire, &how, checker) ||
      !x_of(buffers, how, has_scales, &type, &H, &element, checker)) {
    return checker.error();
  }
  const bool scales_out = has_scales || how == Wire::kQuantized;
  const ffi::DataType row_type = how == Wire::kQuantized ? ffi::DataType::F8E4M3FN : type;
  const int64_t S = H / kScaleBlock;
  DispatchParams p{};
  p.exchange = x;
  p.hidden = static_cast<int>(H);
  p.row_bytes = static_cast<int>(H) * (how == Wire::kQuantized ? 1 : element_bytes(element));
  p.zero_tail = zero_tail;
  p.power_of_two_scales = power_of_two;
  p.x = buffers.operand<char>("x", type, {T, H});
  if (has_scales) p.scales = buffers.operand<float>("scales", kFloat, {T, S});
  if (has_scalars) p.scalars = buffers.operand<float>("scalars", kFloat, {T * K});
  p.pair_rank = buffers.operand<int32_t>("pair_rank", kInt, {T, K});
  p.pair_row = buffers.operand<int32_t>("pair_row", kInt, {T, K});
  p.row_pair = buffers.operand<int32_t>("row_pair", kInt, {rows});
  p.token_rows = buffers.operand<int32_t>("token_rows", kInt, {x.num_ranks * T, K});
  buffers.operand<int32_t>("token_slot", kInt, {x.num_ranks * T});
  p.rows = buffers.result<char>("rows", row_type, {rows, H});
  if (scales_out) p.row_scales = buffers.result<float>("row_scales", kFloat, {rows, S});
  if (has_scalars) p.row_scalars = buffers.result<float>("row_scalars", kFloat, {rows});
  buffers.finish();
  Member member;
  if (!checker.ok() || !enter(a, Operation::kDispatch, checker, &p.call, &member))
    return checker.error();
  lend(member, &p.call, 0, p.rows, size_t(rows) * p.row_bytes, checker);
  lend(member, &p.call, 1, p.row_scales, size_t(rows) * S * sizeof(float), checker);
  lend(member, &p.call, 2, p.row_scalars, size_t(rows) * sizeof(float), checker);
  if (!checker.ok()) return checker.error();
  Signature s = signature_of(a, member, Operation::kDispatch);
  s.add(H).add(static_cast<int>(type)).add(wire).add(power_of_two).add(has_scales).add(has_scalars);
  p.call.signature = s.value();
  if (const Nodes* nodes = member.group->nodes()) {
    const int values = how == Wire::kDequantized ? p.hidden : p.row_bytes;
    const int scales = has_scales || how != Wire::kCopy ? static_cast<int>(S) : 0;
    const NodeDispatch q{p, nodes->at, dispatch_message(x, values, scales, nodes->at.slot_bytes)};
    if (!fits_rings(a, *nodes, q.shape, checker)) return checker.error();
    const Launch where = launch_of(a, member, stream, member.group->default_sms(member.rank));
    return launched(nodes->library->launch_dispatch(q, nodes->elements, element, how, where),
                    "jax_ep_dispatch between nodes");
  }
  const Demand of =
      how == Wire::kCopy ? dispatch_demand(x.num_ranks, x.top_k, p.row_bytes) : Demand{};
  const int sms = member.group->default_sms(member.rank, of);
  return launched(launch_dispatch(&p, element, how, p.hidden, launch_of(a, member, stream, sms)),
                  "jax_ep_dispatch");
}

XLA_FFI_DEFINE_HANDLER(handler, with_attributes("jax_ep_dispatch", dispatch),
                       bind_exchange()
                           .Attr<int64_t>("wire")
                           .Attr<bool>("power_of_two")
                           .Attr<bool>("zero_tail")
                           .Attr<bool>("has_scales")
                           .Attr<bool>("has_scalars")
                           .RemainingArgs()
                           .RemainingRets(),
                       kTraits);

}  // namespace

void* dispatch_handler() { return reinterpret_cast<void*>(handler); }

}  // namespace jax_ep
