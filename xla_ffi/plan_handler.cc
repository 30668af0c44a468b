// SPDX-License-Identifier: Apache-2.0
// jax_ep_plan: who sends which rows where.
#include <algorithm>

#include "call.h"
#include "handlers.h"
#include "rows.h"

namespace jax_ep {
namespace {

ffi::Error plan(cudaStream_t stream, const Attributes& a, ffi::RemainingArgs args,
                ffi::RemainingRets results) {
  Checker checker("jax_ep_plan");
  if (!within_limits(a, checker)) return checker.error();
  Buffers buffers(args, results, checker);
  const Exchange& x = a.exchange;
  PlanParams p{};
  p.exchange = x;
  p.topk_idx = buffers.operand<int32_t>("topk_idx", kInt, {x.num_tokens, x.top_k});
  p.out = take_plan(x, buffers);
  p.scratch = buffers.result<int32_t>("scratch", kInt, {int64_t(plan_scratch_words(x))});
  buffers.finish();
  Member member;
  if (!checker.ok() || !enter(a, Operation::kPlan, checker, &p.call, &member))
    return checker.error();
  p.call.signature = signature_of(a, member, Operation::kPlan).value();
  // Whatever is asked for leaves room: more SMs gain a plan little.
  const int most = member.group->default_sms(member.rank);
  Launch how = launch_of(a, member, stream, most);
  how.num_sms = std::min(how.num_sms, most);
  if (const Nodes* nodes = member.group->nodes()) {
    Call call = p.call;
    call.operation = Operation::kRouting;
    call.signature = signature_of(a, member, Operation::kRouting).value();
    const NodeRouting routing{call, p.call.signature, x, p.topk_idx, nodes->at};
    const cudaError_t error = nodes->library->launch_routing(routing, nodes->elements, how);
    if (error != cudaSuccess) return launched(error, "jax_ep_plan, routing between nodes");
  }
  return launched(launch_plan(&p, x, how), "jax_ep_plan");
}

XLA_FFI_DEFINE_HANDLER(handler, with_attributes("jax_ep_plan", plan),
                       bind_exchange().RemainingArgs().RemainingRets(), kTraits);

}  // namespace

void* plan_handler() { return reinterpret_cast<void*>(handler); }

}  // namespace jax_ep
