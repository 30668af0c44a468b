// SPDX-License-Identifier: Apache-2.0
// The kernel and its launcher, for a host compiler.
// An order without a row, or a tail, is written without it.
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#include "../../kernels/combine.cu"
