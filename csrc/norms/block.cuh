// SPDX-License-Identifier: Apache-2.0
// A norm of one row by one block.
//
// A thread holds kColumns adjacent columns of its block's row in registers, from the load to the store.
// Blocks are persistent: each takes every gridDim.x-th row, with the weights, and in the backward its partial
// sums of the weights' gradients, in registers too. Those go to memory once a block; a second kernel adds
// them up in order, so there are no atomics and two runs give the same bits.
#pragma once

#include "common/cuda_types.cuh"
#include "common/dropout.h"
#include "norms/norm.h"

namespace cogview {
namespace {

constexpr int kColumns = 8;
constexpr int kMaxThreads = kMaxWidth / kColumns;

struct Row {
    float of[kColumns];
};

__device__ inline int first_column() {
    return threadIdx.x * kColumns;
}

// ---- loads and stores; `vector` where every row is aligned to 16 bytes and ends with a thread's columns

template <typename T>
__device__ inline Row load_row(const T* row, int C, bool vector) {
    const int first = first_column();
    alignas(16) T values[kColumns] = {};
    if (vector && first < C) {
        constexpr int kLoads = kColumns * sizeof(T) / sizeof(uint4);
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            reinterpret_cast<uint4*>(values)[i] = reinterpret_cast<const uint4*>(row + first)[i];
    } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            if (first + i < C) values[i] = row[first + i];
    }
    Row x;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x.of[i] = first + i < C ? widen(values[i]) : 0.0f;
    return x;
}

template <typename T>
__device__ inline void store_row(T* row, const Row& x, int C, bool vector) {
    const int first = first_column();
    alignas(16) T values[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) narrow(x.of[i], values + i);
    if (vector && first < C) {
        constexpr int kStores = kColumns * sizeof(T) / sizeof(uint4);
#pragma unroll
        for (int i = 0; i < kStores; ++i)
            reinterpret_cast<uint4*>(row + first)[i] = reinterpret_cast<const uint4*>(values)[i];
    } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            if (first + i < C) row[first + i] = values[i];
    }
}

// As stored and read again: what the next norm, and the backward, will see.
template <typename T>
__device__ inline Row rounded(const Row& x) {
    Row y;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        T value;
        narrow(x.of[i], &value);
        y.of[i] = widen(value);
    }
    return y;
}

// A weight or bias, `fill` where there is none.
__device__ inline Row load_parameter(Parameter p, int C, float fill) {
    Row x;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const int j = first_column() + i;
        x.of[i] = fill;
        if (p.data != nullptr && j < C)
            COGVIEW_DISPATCH_DTYPE(
                p.dtype, { x.of[i] = widen(static_cast<const CudaType<scalar_t>::type*>(p.data)[j]); });
    }
    return x;
}

// The weight of a norm: 1 where there is none. RMSNorm adds an offset.
template <NormKind kKind>
__device__ inline Row load_weight(Parameter p, int C, float offset) {
    Row x = load_parameter(p, C, 1.0f);
    if (kKind == NormKind::kRms && p.data != nullptr)
#pragma unroll
        for (int i = 0; i < kColumns; ++i) x.of[i] += offset;
    return x;
}

// ---- reductions over the block

// One pair of values at a time. Two sets of shared memory take turns: who writes one has passed the barrier
// of the other, which all reach only after they have read this one.
struct BlockReduction {
    int turn = 0;

    // (sum or maximum of first, sum of second), the same in every thread.
    template <bool kMaximum>
    __device__ float2 reduce(float first, float second) {
        __shared__ float firsts[2][32], seconds[2][32];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
        within_warp<kMaximum>(first, second);
        if (lane == 0) {
            firsts[turn][warp] = first;
            seconds[turn][warp] = second;
        }
        __syncthreads();
        // Both operands are of absolute values where a maximum is taken, so 0 is neutral in either case.
        first = lane < warps ? firsts[turn][lane] : 0.0f;
        second = lane < warps ? seconds[turn][lane] : 0.0f;
        within_warp<kMaximum>(first, second);
        turn ^= 1;
        return {first, second};
    }

    __device__ float2 sums(float first, float second) { return reduce<false>(first, second); }
    __device__ float2 max_and_sum(float abs_max, float sum) { return reduce<true>(abs_max, sum); }

  private:
    template <bool kMaximum>
    __device__ static void within_warp(float& first, float& second) {
        for (int step = 16; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(kAllLanes, first, step);
            first = kMaximum ? fmaxf(first, other) : first + other;
            second += __shfl_xor_sync(kAllLanes, second, step);
        }
    }
};

__device__ inline float abs_max_of(const Row& x) {
    float abs_max = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) abs_max = fmaxf(abs_max, fabsf(x.of[i]));
    return abs_max;
}

// The maximum of what the blocks of a pass before left.
__device__ inline float load_abs_max(const float* abs_maxima, int64_t blocks, BlockReduction& reduction) {
    float abs_max = 0.0f;
    for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) abs_max = fmaxf(abs_max, abs_maxima[i]);
    return reduction.max_and_sum(abs_max, 0.0f).x;
}

// ---- norms

// x becomes xhat = (x - mean) * rstd, rstd = 1 / sqrt(variance + eps * (abs_max / 8)^2); RMSNorm has no mean
// and takes the mean of squares in place of the variance. Squares are of the row times a power of two that
// brings abs_max near 1, so they do not overflow; the centred values' own mean undoes the rounding of the
// first one, so constant rows come out right.
template <NormKind kKind>
__device__ inline Statistics normalise(Row& x, int C, PbRelax pb_relax, float tensor_abs_max, float eps,
                                       BlockReduction& reduction) {
    float scale = 1.0f, unscale = 1.0f, relaxed = 1.0f;
    if (pb_relax != PbRelax::kNone) {
        const float abs_max =
            pb_relax == PbRelax::kRow ? reduction.max_and_sum(abs_max_of(x), 0.0f).x : tensor_abs_max;
        int exponent = __float_as_int(abs_max) >> 23;
        exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
        scale = __int_as_float((254 - exponent) << 23);
        unscale = __int_as_float(exponent << 23);
        relaxed = abs_max * scale * 0.125f;
    }
    const float inverse = 1.0f / float(C);
    float sum = 0.0f;
    if constexpr (kKind == NormKind::kRms) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            x.of[i] *= scale;
            sum += x.of[i] * x.of[i];
        }
        const float squares = reduction.sums(sum, 0.0f).x * inverse + eps * relaxed * relaxed;
        const float rstd = squares == 0.0f ? 0.0f : 1.0f / sqrtf(squares);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) x.of[i] *= rstd;
        return {0.0f, fminf(rstd * scale, 3.402823466e38f)};
    } else {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            x.of[i] *= scale;
            sum += x.of[i];
        }
        const float first = reduction.sums(sum, 0.0f).x * inverse;
        float rest = 0.0f, squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            x.of[i] = first_column() + i < C ? x.of[i] - first : 0.0f;
            rest += x.of[i];
            squares += x.of[i] * x.of[i];
        }
        const float2 sums = reduction.sums(rest, squares);
        const float correction = sums.x * inverse;
        const float spread = sums.y * inverse - correction * correction;
        const float variance = (spread < 0.0f ? 0.0f : spread) + eps * relaxed * relaxed;
        const float rstd = variance == 0.0f ? 0.0f : 1.0f / sqrtf(variance);
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            x.of[i] = first_column() + i < C ? (x.of[i] - correction) * rstd : 0.0f;
        return {(first + correction) * unscale, fminf(rstd * scale, 3.402823466e38f)};
    }
}

// A normalised row times weight plus bias; RMSNorm's is rounded to T first where `round` says so.
template <NormKind kKind, typename T>
__device__ inline Row affine(Row x, const Row& weight, const Row& bias, bool round) {
    Row y;
    if (kKind == NormKind::kRms && round) x = rounded<T>(x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) y.of[i] = x.of[i] * weight.of[i] + bias.of[i];
    return y;
}

// dy becomes dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), g = dy * weight; adds dy * xhat and dy.
// RMSNorm has neither mean(g) nor dbias.
template <NormKind kKind>
__device__ inline void gradient_through(Row& dy, const Row& x, Statistics s, const Row& weight, int C,
                                        Row& dweight, Row& dbias, BlockReduction& reduction) {
    float plain = 0.0f, hat = 0.0f;
    Row xhat, g;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        xhat.of[i] = kKind == NormKind::kRms  ? x.of[i] * s.rstd
                     : first_column() + i < C ? (x.of[i] - s.mean) * s.rstd
                                              : 0.0f;
        g.of[i] = dy.of[i] * weight.of[i];
        dweight.of[i] += dy.of[i] * xhat.of[i];
        if (kKind == NormKind::kLayer) {
            dbias.of[i] += dy.of[i];
            plain += g.of[i];
        }
        hat += g.of[i] * xhat.of[i];
    }
    const float2 sums = reduction.sums(plain, hat);
    const float inverse = 1.0f / float(C);
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
        dy.of[i] = kKind == NormKind::kRms
                       ? s.rstd * (g.of[i] - xhat.of[i] * (sums.y * inverse))
                       : s.rstd * (g.of[i] - sums.x * inverse - xhat.of[i] * (sums.y * inverse));
}

// x * scale where the element of this row survives, else 0.
__device__ inline void drop(Row& x, const Dropout& dropout, int64_t row) {
    if (!dropout.drops()) return;
    const RowWords words = philox(dropout.read_seed(), uint32_t(row), uint32_t(uint64_t(row) >> 32), 0);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const uint32_t column = first_column() + i;
        x.of[i] = keep_mask(words.r0, words.r1, column, dropout.keep_threshold) ? x.of[i] * dropout.keep_scale
                                                                                : 0.0f;
    }
}

// ---- kernels of all norm ops

// abs_maxima[block] = max |x after dropout| over the block's rows. Bytes: rows * C elements read.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    norm_abs_max_kernel(const T* x, float* abs_maxima, int64_t rows, int C, Dropout dropout, bool vector) {
    float abs_max = 0.0f;
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        Row row = load_row(x + r * C, C, vector);
        drop(row, dropout, r);
        abs_max = fmaxf(abs_max, abs_max_of(row));
    }
    BlockReduction reduction;
    abs_max = reduction.max_and_sum(abs_max, 0.0f).x;
    if (threadIdx.x == 0) abs_maxima[blockIdx.x] = abs_max;
}

__device__ inline void store_partial(float* partial, const Row& sum, int C) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
        if (first_column() + i < C) partial[first_column() + i] = sum.of[i];
}

struct ParameterGradients {
    Parameter of[4];
};

// to[slot][j] = sum over blocks of partials[block][slot][j]; slot = blockIdx.y.
__global__ void norm_reduce_partials_kernel(const float* partials, int64_t blocks, int slots, int C,
                                            ParameterGradients to) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x, slot = blockIdx.y;
    const Parameter p = to.of[slot];
    if (j >= C || p.data == nullptr) return;
    float sum = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) sum += partials[(b * slots + slot) * C + j];
    COGVIEW_DISPATCH_DTYPE(p.dtype, { narrow(sum, static_cast<CudaType<scalar_t>::type*>(p.data) + j); });
}

}  // namespace
}  // namespace cogview
