// SPDX-License-Identifier: Apache-2.0
// What all FFI handlers do beside decoding buffers: they decode and check the attributes, find the
// group, and launch. Nothing here allocates device memory, synchronises, or waits; a failure that
// the device has recorded is returned as an error.
#pragma once
#include "decode.h"
#include "handler_range.h"

namespace jax_ep {

// What every call carries besides its buffers.
struct Attributes {
  std::string_view group;
  Exchange exchange;
  int num_sms;  // 0: the default
};

Attributes attributes(std::string_view group, int64_t num_ranks, int64_t num_experts,
                      int64_t num_tokens, int64_t top_k, int64_t rows, int64_t alignment,
                      bool batched, int64_t num_sms);

// Attributes come one by one and in no order; this binding and `with_attributes` agree on one.
inline auto bind_exchange() {
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

// `operation`, which takes stream, Attributes and the rest, as a function of what is bound, in a
// range called `name`.
template <typename Operation>
auto with_attributes(const char* name, Operation* operation) {
  return [name, operation](cudaStream_t stream, std::string_view group, int64_t R, int64_t E,
                           int64_t T, int64_t K, int64_t rows, int64_t A, bool batched, int64_t sms,
                           auto... rest) {
    const HandlerRange range(name);
    return operation(stream, attributes(group, R, E, T, K, rows, A, batched, sms), rest...);
  };
}

inline const std::initializer_list<ffi::Traits> kTraits = {ffi::Traits::kCmdBufferCompatible};

// The kernels' limits: Python keeps them too, but an exported program may come from elsewhere.
bool within_limits(const Attributes& a, Checker& checker);

// The rank that this device is, and the header of its parameters.
bool enter(const Attributes& a, Operation operation, Checker& checker, Call* call, Member* out);

// What must be alike on all ranks, so far.
Signature signature_of(const Attributes& a, const Member& member, Operation operation);

// Let peers write into a result, `bytes` at `data`, if there is one.
void lend(const Member& member, Call* call, int slot, const void* data, size_t bytes,
          Checker& checker);

// On as many SMs as the caller says, else on `default_sms`.
Launch launch_of(const Attributes& a, const Member& member, cudaStream_t stream, int default_sms);
ffi::Error launched(cudaError_t error, const char* operation);

// The halves of a small batch's operation as the program names them.
bool half_of(int64_t phase, Half* out, Checker& checker);

// Whether a small batch fits what the group's slots were made for.
bool fits_slots(const Attributes& a, const Member& member, size_t row_bytes, Checker& checker);

// Whether a message of `shape` fits the rings of a group that spans nodes.
bool fits_rings(const Attributes& a, const Nodes& nodes, const MessageShape& shape,
                Checker& checker);

// In the signature of a small batch: start and done of one operation have one.
constexpr int kSlots = 1 << 8;

}  // namespace jax_ep
