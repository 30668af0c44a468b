// SPDX-License-Identifier: Apache-2.0
// Functions that host and device share.
#pragma once

#ifdef __CUDACC__
#define JAX_EP_HD __host__ __device__ __forceinline__
#else
#define JAX_EP_HD inline
#endif
