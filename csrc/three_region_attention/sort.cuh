// SPDX-License-Identifier: Apache-2.0
// The pivots of every sample in ascending order: those that a query sees as far keys are then a prefix.
#pragma once

#include "three_region_attention/three_region_attention_cuda.h"

namespace cogview {
namespace {

constexpr int kSortThreads = 256;

__device__ int pivot_key(const CudaAttention& a, int b, int p) {
    const int64_t at = int64_t(b) * a.P + p;
    const int64_t pivot = a.pivot_bytes == 8   ? static_cast<const int64_t*>(a.pivots)[at]
                          : a.pivot_bytes == 4 ? static_cast<const int32_t*>(a.pivots)[at]
                                               : static_cast<const int16_t*>(a.pivots)[at];
    return pivot < 0 || pivot >= a.T ? a.T : int(pivot);
}

// Every pivot counts those before it: P^2 comparisons a sample, a few microseconds up to P = 4096. Ties (the
// padding, and what a caller repeats against the rules) are broken by index, so every place is written.
__global__ void __launch_bounds__(kSortThreads) three_region_attention_sort_kernel(CudaAttention a) {
    __shared__ int others[kSortThreads];
    const int b = blockIdx.y, p = blockIdx.x * kSortThreads + threadIdx.x;
    const int mine = p < a.P ? pivot_key(a, b, p) : 0;
    int rank = 0;
    for (int base = 0; base < a.P; base += kSortThreads) {
        const int count = min(kSortThreads, a.P - base);
        if (int(threadIdx.x) < count) others[threadIdx.x] = pivot_key(a, b, base + threadIdx.x);
        __syncthreads();
        for (int i = 0; i < count; ++i) rank += others[i] < mine || (others[i] == mine && base + i < p);
        __syncthreads();
    }
    if (p < a.P) a.sorted[int64_t(b) * a.P + rank] = mine;
}

}  // namespace
}  // namespace cogview
