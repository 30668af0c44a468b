// SPDX-License-Identifier: Apache-2.0
// The FFI handlers: decode and check the call, find the group, launch. Nothing here allocates
// device memory, synchronises, or waits; a failure that the device has recorded is returned as an
// error.
#include "handlers.h"

#include <algorithm>
#include <climits>

#include "decode.h"

namespace jax_ep {
namespace {

constexpr auto kInt = ffi::DataType::S32;
constexpr auto kFloat = ffi::DataType::F32;

// What every call carries besides its buffers.
struct Attributes {
  std::string_view group;
  Exchange exchange;
  int num_sms;  // 0: all
};

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

int bytes_of(Element e) { return e == Element::kF32 ? 4 : e == Element::kFp8 ? 1 : 2; }

// The rank that this device is, and the header of its parameters.
bool enter(const Attributes& a, Operation operation, Checker& checker, Call* call, Member* out) {
  int device = -1;
  if (cudaGetDevice(&device) != cudaSuccess) {
    checker.fail("no current CUDA device");
    return false;
  }
  const Member member = find_member(a.group, device);
  if (member.group == nullptr) {
    checker.fail(
        "no group '" + std::string(a.group) + "' with GPU " + std::to_string(device) +
        ": call jax_ep.initialize(mesh, axis_name) with the mesh that the program runs on, "
        "before it runs");
    return false;
  }
  if (member.group->num_ranks() != a.exchange.num_ranks) {
    checker.fail("expected a group of " + std::to_string(a.exchange.num_ranks) + " ranks, got " +
                 std::to_string(member.group->num_ranks()));
    return false;
  }
  const std::string fault = member.group->describe_fault();
  if (!fault.empty()) {
    checker.fail("the group is broken until jax_ep.initialize is called again: " + fault);
    return false;
  }
  call->peers = member.group->peers(member.rank);
  call->operation = operation;
  *out = member;
  return true;
}

// The kernels' limits: Python keeps them too, but an exported program may come from elsewhere.
bool within_limits(const Attributes& a, Checker& checker) {
  const Exchange& x = a.exchange;
  const bool ok = x.num_ranks >= 1 && x.num_ranks <= kMaxRanks && x.num_experts >= 1 &&
                  x.num_experts <= kMaxExperts && x.num_experts % x.num_ranks == 0 &&
                  x.top_k >= 1 && x.top_k <= kMaxTopK && x.num_tokens >= 1 && x.alignment >= 1 &&
                  int64_t{x.num_tokens} * x.top_k <= kMaxPairs && x.num_rows >= 0 &&
                  int64_t{x.num_ranks} * x.num_pairs() + x.alignment <= INT_MAX && a.num_sms >= 0;
  if (!ok) {
    checker.fail("expected at most " + std::to_string(kMaxRanks) + " ranks that divide at most " +
                 std::to_string(kMaxExperts) + " experts, top_k up to " + std::to_string(kMaxTopK) +
                 ", 1 to " + std::to_string(kMaxPairs) + " pairs and num_sms from 0, got " +
                 std::to_string(x.num_ranks) + ", " + std::to_string(x.num_experts) + ", " +
                 std::to_string(x.top_k) + ", " + std::to_string(int64_t{x.num_tokens} * x.top_k) +
                 " and " + std::to_string(a.num_sms));
  }
  return ok;
}

Signature signature_of(const Attributes& a, Operation operation) {
  const Exchange& x = a.exchange;
  Signature s;
  s.add(static_cast<int>(operation)).add(a.num_sms);
  for (int v :
       {x.num_ranks, x.num_experts, x.num_tokens, x.top_k, x.num_rows, x.alignment, x.batched}) {
    s.add(v);
  }
  return s;
}

void lend(const Member& member, Call* call, int slot, const void* data, size_t bytes,
          Checker& checker) {
  if (data == nullptr) return;
  if (!member.group->locate(member.rank, data, &call->lent.output[slot])) {
    checker.fail(
        "a result lies outside the memory that other processes have mapped: expected XLA's "
        "default allocator with preallocation (XLA_PYTHON_CLIENT_ALLOCATOR and "
        "XLA_PYTHON_CLIENT_PREALLOCATE unset) in every process");
  }
  call->lent.bytes[slot] = bytes;
}

ffi::Error launched(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(operation) + ": " + cudaGetErrorString(error));
}

// On all SMs by default; ranks that share a GPU share them, as their kernels wait for each other.
Launch launch_of(const Attributes& a, const Member& member, cudaStream_t stream) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount,
                         member.group->devices()[member.rank]);
  count = std::max(1, count / member.group->ranks_per_device());
  return Launch{a.num_sms == 0 ? count : std::min(a.num_sms, count), stream, 0};
}

Attributes attributes(std::string_view group, int64_t num_ranks, int64_t num_experts,
                      int64_t num_tokens, int64_t top_k, int64_t rows, int64_t alignment,
                      bool batched, int64_t num_sms) {
  auto narrow = [](int64_t v) {  // what does not fit is refused by `within_limits`
    return static_cast<int>(std::clamp<int64_t>(v, -1, INT_MAX));
  };
  return {group,
          {narrow(num_ranks), narrow(num_experts), narrow(num_tokens), narrow(top_k), narrow(rows),
           narrow(alignment), batched},
          narrow(num_sms)};
}

// The results that say the plan.
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
  p.call.signature = signature_of(a, Operation::kPlan).value();
  return launched(launch_plan(&p, x, launch_of(a, member, stream)), "jax_ep_plan");
}

bool wire_of(int64_t wire, Wire* out, Checker& checker) {
  *out = static_cast<Wire>(wire);
  if (wire >= 0 && wire <= 2) return true;
  checker.fail("wire: expected 0 (copy), 1 (quantized) or 2 (dequantized), got " +
               std::to_string(wire));
  return false;
}

// Type and hidden size of the next operand, rows called `name`. False: they are wrong.
bool rows_of(const char* name, const Buffers& buffers, Wire how, bool has_scales,
             ffi::DataType* type, int64_t* H, Element* element, Checker& checker) {
  const std::string rows = std::string(name) + ": expected ";
  if (!buffers.peek(0, type, H) || !element_of(*type, element)) {
    checker.fail(rows + "bf16, f16, f32 or e4m3fn");
    return false;
  }
  if ((how != Wire::kCopy || has_scales) && *H % kScaleBlock != 0) {
    checker.fail(rows + "a hidden size that is a multiple of 128 for fp8, got " +
                 std::to_string(*H));
  }
  const int64_t row_bytes = *H * (how == Wire::kQuantized ? 1 : bytes_of(*element));
  if (row_bytes % 16 != 0) {
    checker.fail(rows + "rows of a multiple of 16 bytes, got " + std::to_string(row_bytes));
  }
  return checker.ok();
}

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
      !rows_of("x", buffers, how, has_scales, &type, &H, &element, checker)) {
    return checker.error();
  }
  const bool scales_out = has_scales || how == Wire::kQuantized;
  const ffi::DataType row_type = how == Wire::kQuantized ? ffi::DataType::F8E4M3FN : type;
  const int64_t S = H / kScaleBlock;
  DispatchParams p{};
  p.exchange = x;
  p.hidden = static_cast<int>(H);
  p.row_bytes = static_cast<int>(H) * (how == Wire::kQuantized ? 1 : bytes_of(element));
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
  Signature s = signature_of(a, Operation::kDispatch);
  s.add(H).add(static_cast<int>(type)).add(wire).add(power_of_two).add(has_scales).add(has_scalars);
  p.call.signature = s.value();
  return launched(launch_dispatch(&p, element, how, p.hidden, launch_of(a, member, stream)),
                  "jax_ep_dispatch");
}

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

// The halves of a small batch's operation as the program names them.
bool half_of(int64_t phase, Half* out, Checker& checker) {
  *out = static_cast<Half>(phase);
  if (phase >= 0 && phase <= 2) return true;
  checker.fail("phase: expected 0 (whole), 1 (start) or 2 (done), got " + std::to_string(phase));
  return false;
}

// Whether a small batch fits what the group's slots were made for.
bool fits_slots(const Attributes& a, const Member& member, size_t row_bytes, Checker& checker) {
  const Exchange& x = a.exchange;
  const SlotSize& slots = member.group->slots();
  if (x.num_tokens > slots.tokens || row_bytes > size_t(slots.row_bytes)) {
    checker.fail("expected at most " + std::to_string(slots.tokens) + " tokens of " +
                 std::to_string(slots.row_bytes) + " bytes, got " + std::to_string(x.num_tokens) +
                 " of " + std::to_string(row_bytes) +
                 ": give jax_ep.initialize the Config that the program uses");
  }
  if (int64_t{x.num_ranks} * x.num_pairs() > kMaxSlotPairs || x.num_experts > kMaxSlotExperts) {
    checker.fail("expected at most " + std::to_string(kMaxSlotPairs) + " pairs of the group and " +
                 std::to_string(kMaxSlotExperts) + " experts in a small batch, got " +
                 std::to_string(int64_t{x.num_ranks} * x.num_pairs()) + " and " +
                 std::to_string(x.num_experts));
  }
  return checker.ok();
}

// Start and done of one operation have one signature.
constexpr int kSlots = 1 << 8;

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
  if (!rows_of("x", buffers, how, has_scales, &type, &H, &element, checker)) return checker.error();
  const int64_t S = H / kScaleBlock;
  p.exchange = x;
  p.half = half;
  p.hidden = static_cast<int>(H);
  p.row_bytes = static_cast<int>(H) * (how == Wire::kQuantized ? 1 : bytes_of(element));
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
      !fits_slots(a, member, size_t(H) * bytes_of(element), checker)) {
    return checker.error();
  }
  Signature s = signature_of(a, Operation::kDispatch);
  s.add(kSlots).add(H).add(static_cast<int>(type)).add(wire).add(power_of_two);
  s.add(has_scales).add(has_scalars);
  p.call.signature = s.value();
  return launched(launch_slot_dispatch(&p, x, element, how, H, launch_of(a, member, stream)),
                  "jax_ep_slot_dispatch");
}

ffi::Error slot_combine(cudaStream_t stream, const Attributes& a, int64_t phase, bool has_weights,
                        int64_t wire, bool power_of_two, ffi::RemainingArgs args,
                        ffi::RemainingRets results) {
  Checker checker("jax_ep_slot_combine");
  Half half{};
  Wire how{};
  if (!within_limits(a, checker) || !half_of(phase, &half, checker) ||
      !wire_of(wire, &how, checker)) {
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
  if (!rows_of("y", buffers, how, false, &type, &H, &element, checker)) return checker.error();
  if (element == Element::kFp8) checker.fail("y: expected bf16, f16 or f32");
  if (how == Wire::kDequantized) checker.fail("wire: expected 0 (copy) or 1 (quantized), got 2");
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
      !fits_slots(a, member, size_t(H) * bytes_of(element), checker)) {
    return checker.error();
  }
  Signature s = signature_of(a, Operation::kCombine);
  s.add(kSlots).add(H).add(static_cast<int>(type)).add(has_weights).add(wire).add(power_of_two);
  p.call.signature = s.value();
  return launched(launch_slot_combine(&p, x, element, H, launch_of(a, member, stream)),
                  "jax_ep_slot_combine");
}

// Attributes come one by one and in no order; these bindings and the functions below agree on one.
auto bind_exchange() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Attr<std::string_view>("group")
      .Attr<int64_t>("num_ranks")
      .Attr<int64_t>("num_experts")
      .Attr<int64_t>("num_tokens")
      .Attr<int64_t>("top_k")
      .Attr<int64_t>("rows")
      .Attr<int64_t>("alignment")
      .Attr<bool>("batched")
      .Attr<int64_t>("num_sms");
}

ffi::Error plan_entry(cudaStream_t stream, std::string_view group, int64_t R, int64_t E, int64_t T,
                      int64_t K, int64_t rows, int64_t A, bool batched, int64_t sms,
                      ffi::RemainingArgs args, ffi::RemainingRets results) {
  return plan(stream, attributes(group, R, E, T, K, rows, A, batched, sms), args, results);
}

ffi::Error dispatch_entry(cudaStream_t stream, std::string_view group, int64_t R, int64_t E,
                          int64_t T, int64_t K, int64_t rows, int64_t A, bool batched, int64_t sms,
                          int64_t wire, bool power_of_two, bool zero_tail, bool has_scales,
                          bool has_scalars, ffi::RemainingArgs args, ffi::RemainingRets results) {
  return dispatch(stream, attributes(group, R, E, T, K, rows, A, batched, sms), wire, power_of_two,
                  zero_tail, has_scales, has_scalars, args, results);
}

ffi::Error combine_entry(cudaStream_t stream, std::string_view group, int64_t R, int64_t E,
                         int64_t T, int64_t K, int64_t rows, int64_t A, bool batched, int64_t sms,
                         bool has_rows, bool has_weights, bool has_scalars, ffi::RemainingArgs args,
                         ffi::RemainingRets results) {
  return combine(stream, attributes(group, R, E, T, K, rows, A, batched, sms), has_rows,
                 has_weights, has_scalars, args, results);
}

ffi::Error slot_dispatch_entry(cudaStream_t stream, std::string_view group, int64_t R, int64_t E,
                               int64_t T, int64_t K, int64_t rows, int64_t A, bool batched,
                               int64_t sms, int64_t phase, int64_t wire, bool power_of_two,
                               bool zero_tail, bool has_scales, bool has_scalars,
                               ffi::RemainingArgs args, ffi::RemainingRets results) {
  return slot_dispatch(stream, attributes(group, R, E, T, K, rows, A, batched, sms), phase, wire,
                       power_of_two, zero_tail, has_scales, has_scalars, args, results);
}

ffi::Error slot_combine_entry(cudaStream_t stream, std::string_view group, int64_t R, int64_t E,
                              int64_t T, int64_t K, int64_t rows, int64_t A, bool batched,
                              int64_t sms, int64_t phase, bool has_weights, int64_t wire,
                              bool power_of_two, ffi::RemainingArgs args,
                              ffi::RemainingRets results) {
  return slot_combine(stream, attributes(group, R, E, T, K, rows, A, batched, sms), phase,
                      has_weights, wire, power_of_two, args, results);
}

XLA_FFI_DEFINE_HANDLER(plan_handler, plan_entry, bind_exchange().RemainingArgs().RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(dispatch_handler, dispatch_entry,
                       bind_exchange()
                           .Attr<int64_t>("wire")
                           .Attr<bool>("power_of_two")
                           .Attr<bool>("zero_tail")
                           .Attr<bool>("has_scales")
                           .Attr<bool>("has_scalars")
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(combine_handler, combine_entry,
                       bind_exchange()
                           .Attr<bool>("has_rows")
                           .Attr<bool>("has_weights")
                           .Attr<bool>("has_scalars")
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(slot_dispatch_handler, slot_dispatch_entry,
                       bind_exchange()
                           .Attr<int64_t>("phase")
                           .Attr<int64_t>("wire")
                           .Attr<bool>("power_of_two")
                           .Attr<bool>("zero_tail")
                           .Attr<bool>("has_scales")
                           .Attr<bool>("has_scalars")
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(slot_combine_handler, slot_combine_entry,
                       bind_exchange()
                           .Attr<int64_t>("phase")
                           .Attr<bool>("has_weights")
                           .Attr<int64_t>("wire")
                           .Attr<bool>("power_of_two")
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

std::vector<std::pair<const char*, void*>> handlers() {
  return {{"jax_ep_plan", reinterpret_cast<void*>(plan_handler)},
          {"jax_ep_dispatch", reinterpret_cast<void*>(dispatch_handler)},
          {"jax_ep_combine", reinterpret_cast<void*>(combine_handler)},
          {"jax_ep_slot_dispatch", reinterpret_cast<void*>(slot_dispatch_handler)},
          {"jax_ep_slot_combine", reinterpret_cast<void*>(slot_combine_handler)}};
}

}  // namespace jax_ep
