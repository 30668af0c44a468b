// SPDX-License-Identifier: Apache-2.0
// jax_ep_combine: rows back to tokens.
#include "call.h"
#include "handlers.h"
#include "rows.h"

namespace jax_ep {
namespace {

ffi::Error combine(cudaStream_t stream, const Attributes& a, bool has_rows, bool has_weights,
                   bool has_scalars, int64_t wire, bool power_of_two, ffi::RemainingArgs args,
                   ffi::RemainingRets results) {
  Checker checker("jax_ep_combine");
  Wire how{};
  if (!within_limits(a, checker) || !partials_wire_of(wire, &how, checker)) return checker.error();
  Buffers buffers(args, results, checker);
  const Exchange& x = a.exchange;
  const int64_t T = x.num_tokens, K = x.top_k, rows = x.num_rows;
  ffi::DataType type = kFloat;
  int64_t H = 0;
  Element element = Element::kF32;
  if (has_rows && !y_of(buffers, how, &type, &H, &element, checker)) return checker.error();
  CombineParams p{};
  p.exchange = x;
  p.power_of_two_scales = power_of_two;
  p.hidden = static_cast<int>(H);
  if (has_rows) p.y = buffers.operand<char>("y", type, {rows, H});
  if (has_weights) p.weights = buffers.operand<float>("weights", kFloat, {rows});
  if (has_scalars) p.row_scalars = buffers.operand<float>("scalars", kFloat, {rows});
  p.pair_rank = buffers.operand<int32_t>("pair_rank", kInt, {T, K});
  p.pair_row = buffers.operand<int32_t>("pair_row", kInt, {T, K});
  p.row_pair = buffers.operand<int32_t>("row_pair", kInt, {rows});
  p.token_rows = buffers.operand<int32_t>("token_rows", kInt, {x.num_ranks * T, K});
  p.token_slot = buffers.operand<int32_t>("token_slot", kInt, {x.num_ranks * T});
  const int64_t slots = partial_slots(x), row_bytes = H * element_bytes(element);
  const bool fp8 = how == Wire::kQuantized;
  const int64_t partial_bytes = fp8 ? fp8_partial_bytes(p.hidden) : row_bytes;
  if (has_rows) p.out = buffers.result<char>("out", type, {T, H});
  if (has_scalars) p.scalars = buffers.result<float>("scalars_out", kFloat, {T * K});
  if (has_rows && slots > 0) {
    p.partials =
        fp8 ? buffers.result<char>("partials", ffi::DataType::U8, {T, slots, partial_bytes})
            : buffers.result<char>("partials", type, {T, slots, H});
  }
  buffers.finish();
  Member member;
  if (!checker.ok() || !enter(a, Operation::kCombine, checker, &p.call, &member))
    return checker.error();
  Signature s = signature_of(a, member, Operation::kCombine);
  s.add(H).add(static_cast<int>(type)).add(has_rows).add(has_weights).add(has_scalars);
  s.add(wire).add(power_of_two);
  p.call.signature = s.value();
  if (const Nodes* nodes = member.group->nodes()) {
    if (fp8) {
      checker.fail(
          "wire_dtype: expected None between nodes in a combine that is not of a small batch, "
          "whose partial sums travel in y's type, got float8_e4m3fn");
      return checker.error();
    }
    const NodeCombine q{p, nodes->at,
                        combine_message(x, static_cast<int>(row_bytes), nodes->at.slot_bytes)};
    if (!fits_rings(a, *nodes, q.shape, checker)) return checker.error();
    const Launch where = launch_of(a, member, stream, member.group->default_sms(member.rank));
    return launched(nodes->library->launch_combine(q, nodes->elements, element, where),
                    "jax_ep_combine between nodes");
  }
  lend(member, &p.call, 0, p.partials, T * slots * partial_bytes, checker);
  lend(member, &p.call, 1, p.scalars, size_t(T) * K * sizeof(float), checker);
  if (!checker.ok()) return checker.error();
  const Demand of = how == Wire::kCopy ? combine_demand(x.num_ranks, x.top_k, row_bytes) : Demand{};
  const int sms = member.group->default_sms(member.rank, of);
  return launched(launch_combine(&p, element, how, launch_of(a, member, stream, sms)),
                  "jax_ep_combine");
}

XLA_FFI_DEFINE_HANDLER(handler, with_attributes("jax_ep_combine", combine),
                       bind_exchange()
                           .Attr<bool>("has_rows")
                           .Attr<bool>("has_weights")
                           .Attr<bool>("has_scalars")
                           .Attr<int64_t>("wire")
                           .Attr<bool>("power_of_two")
                           .RemainingArgs()
                           .RemainingRets(),
                       kTraits);

}  // namespace

void* combine_handler() { return reinterpret_cast<void*>(handler); }

}  // namespace jax_ep
