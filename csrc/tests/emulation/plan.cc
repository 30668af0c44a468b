// SPDX-License-Identifier: Apache-2.0
// The kernel and its launcher, for a host compiler.
#include "../../kernels/plan.cu"
