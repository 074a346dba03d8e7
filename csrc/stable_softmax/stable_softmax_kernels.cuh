// SPDX-License-Identifier: Apache-2.0
// One block per row, in two passes of which only the first reads device memory when the row fits the L1
// cache: maximum and sum together (online softmax), then the probabilities.
// Bytes: 2 N elements a row from memory (3 N past the cache). Row sums go through warp shuffles and 32 floats
// of shared memory; no atomics, so two runs give the same bits.
#pragma once

#include "common/cuda_types.cuh"
#include "stable_softmax/stable_softmax.h"

namespace cogview {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// A mergeable softmax: sum of 2^(factor * (x - row_max)) over the keys seen so far.
struct State {
    float row_max, sum;
};

__device__ State merge(State a, State b, float factor) {
    const float row_max = fmaxf(a.row_max, b.row_max);
    // Where one is empty, -inf minus -inf is NaN, and so is 0 times -inf (the backward's factor is 0).
    if (a.row_max == -INFINITY || b.row_max == -INFINITY) return {row_max, a.sum + b.sum};
    return {row_max,
            a.sum * exp2f(factor * (a.row_max - row_max)) + b.sum * exp2f(factor * (b.row_max - row_max))};
}

__device__ State reduce_block(State s, float factor) {
    __shared__ float maxima[32], sums[32];
    for (int step = 16; step > 0; step /= 2) {
        const State other = {__shfl_xor_sync(kAllLanes, s.row_max, step),
                             __shfl_xor_sync(kAllLanes, s.sum, step)};
        s = merge(s, other, factor);
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (lane == 0) {
        maxima[warp] = s.row_max;
        sums[warp] = s.sum;
    }
    __syncthreads();
    s = lane < warps ? State{maxima[lane], sums[lane]} : State{-INFINITY, 0.0f};
    for (int step = 16; step > 0; step /= 2) {
        const State other = {__shfl_xor_sync(kAllLanes, s.row_max, step),
                             __shfl_xor_sync(kAllLanes, s.sum, step)};
        s = merge(s, other, factor);
    }
    return s;
}

template <typename T>
__global__ void stable_softmax_fwd_kernel(SoftmaxForward a) {
    const int64_t r = blockIdx.x;
    const int64_t t = r % a.T, b = r / a.T % a.B, i = r / a.T / a.B;
    const T* scores = static_cast<const T*>(a.scores) + i * a.scores_stride[0] + b * a.scores_stride[1] +
                      t * a.scores_stride[2];
    const uint8_t* mask = a.mask == nullptr
                              ? nullptr
                              : a.mask + i * a.mask_stride[0] + b * a.mask_stride[1] + t * a.mask_stride[2];
    T* probs = static_cast<T*>(a.probs) + r * a.N;
    const int64_t visible = a.causal && t + 1 < a.N ? t + 1 : a.N;
    const float factor = a.alpha * kLog2e;

    State s = {-INFINITY, 0.0f};
    float nan = 0.0f;
    for (int64_t j = threadIdx.x; j < visible; j += blockDim.x) {
        if (mask != nullptr && !mask[j * a.mask_stride[3]]) continue;
        const float x = widen(scores[j]) * a.scale;
        if (x != x) nan = x;  // fmaxf drops NaN
        s = merge(s, {x, x == -INFINITY ? 0.0f : 1.0f}, factor);
    }
    s.sum += nan;
    s = reduce_block(s, factor);
    const float inverse = s.row_max == -INFINITY && s.sum == 0.0f ? 0.0f : 1.0f / s.sum;
    for (int64_t j = threadIdx.x; j < a.N; j += blockDim.x) {
        const bool seen = j < visible && (mask == nullptr || mask[j * a.mask_stride[3]]);
        const bool empty = inverse == 0.0f;
        narrow(seen && !empty ? exp2f(factor * (widen(scores[j]) * a.scale - s.row_max)) * inverse : 0.0f,
               probs + j);
    }
}

template <typename T>
__global__ void stable_softmax_bwd_kernel(SoftmaxBackward a) {
    const int64_t at = int64_t(blockIdx.x) * a.N;
    const T* dprobs = static_cast<const T*>(a.dprobs) + at;
    const T* probs = static_cast<const T*>(a.probs) + at;
    T* dscores = static_cast<T*>(a.dscores) + at;
    float dot = 0.0f;
    for (int64_t j = threadIdx.x; j < a.N; j += blockDim.x) dot += widen(dprobs[j]) * widen(probs[j]);
    // With equal maxima, merging states adds their sums.
    dot = reduce_block({0.0f, dot}, 0.0f).sum;
    for (int64_t j = threadIdx.x; j < a.N; j += blockDim.x)
        narrow(a.factor * widen(probs[j]) * (widen(dprobs[j]) - dot), dscores + j);
}

}  // namespace
}  // namespace cogview
