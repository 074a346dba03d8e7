// SPDX-License-Identifier: Apache-2.0
// The pivots of every sample in ascending order: those that a query sees as far keys are then a prefix.
#pragma once

#include "three_region_attention/three_region_attention.h"

namespace cogview {
namespace {

constexpr int kSortThreads = 256;

__device__ __forceinline__ int pivot_key(const Attention& a, int b, int p) {
    const int T = a.shape.T;
    const int64_t pivot = a.layout.pivots[int64_t(b) * a.layout.P + p];
    return pivot < a.layout.origin_of(b, T) || pivot >= T ? T : int(pivot);
}

// Every pivot counts those before it: P^2 comparisons a sample, a few microseconds up to P = 4096. Ties (the
// padding, and what a caller repeats against the rules) are broken by index, so every place is written.
__global__ void __launch_bounds__(kSortThreads) three_region_attention_sort_kernel(Attention a) {
    const int P = a.layout.P, blocks = (P + kSortThreads - 1) / kSortThreads;  // of a sample
    __shared__ int others[kSortThreads];
    const int b = blockIdx.x / blocks, p = blockIdx.x % blocks * kSortThreads + threadIdx.x;
    const int mine = p < P ? pivot_key(a, b, p) : 0;
    int rank = 0;
    for (int base = 0; base < P; base += kSortThreads) {
        const int count = min(kSortThreads, P - base);
        if (int(threadIdx.x) < count) others[threadIdx.x] = pivot_key(a, b, base + threadIdx.x);
        __syncthreads();
        for (int i = 0; i < count; ++i) rank += others[i] < mine || (others[i] == mine && base + i < p);
        __syncthreads();
    }
    if (p < P) a.sorted_pivots[int64_t(b) * P + rank] = mine;
}

}  // namespace
}  // namespace cogview
