// SPDX-License-Identifier: Apache-2.0
// combine of a small batch inside a node: its kernels, and how they are launched.
#include "../device/kernel.cuh"
#include "slot_combine.cuh"

namespace jax_ep {
namespace {

template <typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_combine_kernel(const __grid_constant__ SlotCombineParams p,
                        const __grid_constant__ SlotCombineSizes sizes) {
  slot_combine_body<T, SlotOp>(p, sizes);
}

template <typename T>
__global__ void __launch_bounds__(kSlotThreads, 1)
    slot_combine_all_ranks(const SlotCombineParams* p,
                           const __grid_constant__ SlotCombineSizes sizes) {
  slot_combine_body<T, SlotOp>(p[blockIdx.y], sizes);
}

template <typename T>
cudaError_t launch(const SlotCombineParams* params, const Exchange& e, int hidden,
                   const Launch& how) {
  const int blocks = min_int(how.num_sms, max_int(e.num_ranks - 1, 1) * e.num_tokens);
  const SlotCombineSizes sizes(e, blocks, hidden * int(sizeof(T)) / int(sizeof(Vec)));
  if (how.all_ranks == 0) {
    return launch_kernel(slot_combine_kernel<T>, blocks, kSlotThreads, 0, how.stream, *params,
                         sizes);
  }
  if constexpr (kAllRanks) {
    return launch_kernel(slot_combine_all_ranks<T>, dim3(blocks, how.all_ranks), kSlotThreads, 0,
                         how.stream, params, sizes);
  }
  return cudaErrorNotSupported;
}

}  // namespace

// Every compiled variant: one for each type of y.
cudaError_t launch_slot_combine(const SlotCombineParams* params, const Exchange& e, Element y,
                                int hidden, const Launch& how) {
  switch (y) {
    case Element::kBf16:
      return launch<__nv_bfloat16>(params, e, hidden, how);
    case Element::kF16:
      return launch<__half>(params, e, hidden, how);
    case Element::kF32:
      return launch<float>(params, e, hidden, how);
    case Element::kFp8:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t load_slot_combine() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(&slot_combine_kernel<__nv_bfloat16>),
                             reinterpret_cast<const void*>(&slot_combine_kernel<__half>),
                             reinterpret_cast<const void*>(&slot_combine_kernel<float>)}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_ep
