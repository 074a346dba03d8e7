// SPDX-License-Identifier: Apache-2.0
// Begins a function that both the CPU's compiler and nvcc compile. Such a function is always inlined: files
// compiled per instruction set must not share an out-of-line copy (see common/vec.h).
#pragma once

#if defined(__CUDACC__)
#define COGVIEW_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define COGVIEW_HOST_DEVICE __attribute__((always_inline)) inline
#endif
