// SPDX-License-Identifier: Apache-2.0
#include "call.h"

#include <algorithm>
#include <climits>

namespace jax_ep {

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
  call->stats = member.stats;
  *out = member;
  return true;
}

Signature signature_of(const Attributes& a, const Member& member, Operation operation) {
  const Exchange& x = a.exchange;
  Signature s;
  s.add(static_cast<int>(operation)).add(a.num_sms);
  for (int v :
       {x.num_ranks, x.num_experts, x.num_tokens, x.top_k, x.num_rows, x.alignment, x.batched}) {
    s.add(v);
  }
  if (const Nodes* nodes = member.group->nodes()) {
    s.add(nodes->node_ranks).add(nodes->at.slots).add(nodes->at.slot_bytes);
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

Launch launch_of(const Attributes& a, const Member& member, cudaStream_t stream, int default_sms) {
  const int wanted = a.num_sms > 0 ? a.num_sms : default_sms;
  return Launch{std::min(wanted, member.group->most_sms(member.rank)), stream, 0};
}

ffi::Error launched(cudaError_t error, const char* operation) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(operation) + ": " + cudaGetErrorString(error));
}

bool half_of(int64_t phase, Half* out, Checker& checker) {
  *out = static_cast<Half>(phase);
  if (phase >= 0 && phase <= 2) return true;
  checker.fail("phase: expected 0 (whole), 1 (start) or 2 (done), got " + std::to_string(phase));
  return false;
}

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

bool fits_rings(const Attributes& a, const Nodes& nodes, const MessageShape& shape,
                Checker& checker) {
  if (shape.chunk > 0) return true;
  const int tokens = std::max(1, ceil_div(a.exchange.num_tokens, kMaxChunks));
  MessageShape least = shape;
  least.chunk = tokens;
  checker.fail("a message of " + std::to_string(tokens) + " tokens between nodes: expected slots " +
               "of at least " + std::to_string(most_slot_bytes(least)) + " bytes, got " +
               std::to_string(nodes.at.slot_bytes) +
               ": raise Rdma.ring_slot_bytes in the Config of jax_ep.initialize");
  return false;
}

}  // namespace jax_ep
