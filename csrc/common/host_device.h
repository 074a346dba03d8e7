// SPDX-License-Identifier: Apache-2.0
// Marks a function that both the CPU's compiler and nvcc compile.
#pragma once

#if defined(__CUDACC__)
#define COGVIEW_HOST_DEVICE __host__ __device__
#else
#define COGVIEW_HOST_DEVICE
#endif
