// SPDX-License-Identifier: Apache-2.0
// Decode attention: bound by memory, so plain arithmetic serves. A block takes `chunk` keys of one sample and
// key head for up to ROWS of the queries that share it (group heads times new positions); LANES lanes share a
// key, eight elements each, and keep a softmax of their own over the keys they meet. These are merged in the
// block, and over blocks by whichever of them finishes last, as a counter tells it, always in one order: two
// runs give the same bits.
//
// Bytes: k and v of the keys seen, once per ROWS queries. FLOPs: 4 D a key and query.
#pragma once

#include "common/cuda_types.cuh"
#include "decode_attention/decode_attention.h"

namespace cogview {
namespace {

constexpr int kDecodeThreads = 128;
constexpr int kAhead = 4;  // keys whose rows are on their way at once, for each group of lanes

__device__ __forceinline__ void load_eight(const float* at, float* x) {
    const float4 low = *reinterpret_cast<const float4*>(at), high = *reinterpret_cast<const float4*>(at + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void load_eight(const __half* at, float* x) {
    const uint4 raw = *reinterpret_cast<const uint4*>(at);
    const __half2* pairs = reinterpret_cast<const __half2*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(pairs[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void load_eight(const __nv_bfloat16* at, float* x) {
    const uint4 raw = *reinterpret_cast<const uint4*>(at);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ float power(float x) {
    return exp2f(x * 1.4426950408889634f);
}

// Of the queries from first_row on, from what all splits left in a.partial: their softmax over the splits. A
// query that saw no key gives zeros. What other blocks wrote is read past the L1 cache.
template <typename T, int ROWS>
__device__ __forceinline__ void merge_splits(const DecodeAttention& a, int b, int kv_head, int first_row) {
    const auto [B, H, Hkv, Tq, S, D] = a.shape;
    const int heads = H / Hkv, rows = heads * Tq;
    for (int r = 0; r < ROWS && first_row + r < rows; ++r) {
        const int row = first_row + r, h = kv_head * heads + row / Tq, t = row % Tq;
        const float* partial = a.partial + ((int64_t(b) * H + h) * Tq + t) * a.splits * (D + 2);
        float top = -INFINITY, all = 0.0f;
        for (int s = 0; s < a.splits; ++s) top = fmaxf(top, __ldcg(partial + s * (D + 2)));
        const float base = top == -INFINITY ? 0.0f : top;
        for (int s = 0; s < a.splits; ++s)
            all += __ldcg(partial + s * (D + 2) + 1) * power(__ldcg(partial + s * (D + 2)) - base);
        T* out = a.out.row<T>(b, h, t);
        for (int d = threadIdx.x; d < D; d += kDecodeThreads) {
            float x = 0.0f;
            for (int s = 0; s < a.splits; ++s)
                x += __ldcg(partial + s * (D + 2) + 2 + d) * power(__ldcg(partial + s * (D + 2)) - base);
            narrow(all == 0.0f ? 0.0f : x / all, out + d);
        }
    }
}

// Occupancy on sm_70: 128 threads, 17.4 KB (ROWS 4) or 4.5 KB (ROWS 1) of shared memory.
template <typename T, int LANES, int ROWS>
__global__ void __launch_bounds__(kDecodeThreads) decode_attention_kernel(DecodeAttention a) {
    constexpr int kGroups = kDecodeThreads / LANES;
    __shared__ float sums[ROWS][kDecodeThreads * 8];
    __shared__ float maxima[ROWS][kGroups], totals[ROWS][kGroups];
    __shared__ bool is_last;

    const auto [B, H, Hkv, Tq, S, D] = a.shape;
    const int heads = H / Hkv, rows = heads * Tq, row_tiles = (rows + ROWS - 1) / ROWS;
    const int split = blockIdx.x % a.splits;
    const int first_row = blockIdx.x / a.splits % row_tiles * ROWS;
    const int kv_head = blockIdx.x / a.splits / row_tiles % Hkv;
    const int b = blockIdx.x / a.splits / row_tiles / Hkv;
    const int group = threadIdx.x / LANES, element = threadIdx.x % LANES * 8;
    const bool holds = element < D;

    const int length = int(min(int64_t(S), max(int64_t(0), a.lengths[b])));
    // The keys: first the pivots, then all positions from the first query's window on.
    const int listed = a.layout.P, origin = a.layout.origin_of(b, S);
    const int window = a.layout.window_start(max(0, length - Tq), origin);
    const int latest_start = a.layout.window_start(max(0, length - 1), origin);
    const int stop = min((split + 1) * a.chunk, listed + length - window);

    float q[ROWS][8], sum[ROWS][8], row_max[ROWS], total[ROWS];
    int position[ROWS], window_start[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int row = min(first_row + r, rows - 1), h = kv_head * heads + row / Tq, t = row % Tq;
        position[r] = length - Tq + t;
        window_start[r] = a.layout.window_start(max(0, position[r]), origin);
        row_max[r] = -INFINITY;
        total[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) q[r][i] = sum[r][i] = 0.0f;
        if (holds) load_eight(a.q.row<T>(b, h, t) + element, q[r]);
    }
    const T* keys = a.k.head<T>(b, kv_head) + element;
    const T* values = a.v.head<T>(b, kv_head) + element;

    // All groups make the same number of steps, so that shuffles meet whole warps.
    for (int base = split * a.chunk; base < stop; base += kGroups * kAhead) {
        float k[kAhead][8], v[kAhead][8];
        int at[kAhead];
        bool far[kAhead];
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
            const int item = base + n * kGroups + group;
            far[n] = item < listed;
            at[n] = -1;
            if (item < stop)
                at[n] = far[n] ? int(a.layout.pivots[int64_t(b) * listed + item]) : window + item - listed;
            // Nothing before or past the sequence is read: it may be anything. Nor a pivot in every query's
            // window.
            if (at[n] < origin || at[n] >= length || (far[n] && at[n] >= latest_start)) at[n] = -1;
#pragma unroll
            for (int i = 0; i < 8; ++i) k[n][i] = v[n][i] = 0.0f;
            if (at[n] >= 0 && holds) {
                load_eight(keys + at[n] * a.k.stride[2], k[n]);
                load_eight(values + at[n] * a.v.stride[2], v[n]);
            }
        }
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float score = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; ++i) score += q[r][i] * k[n][i];
#pragma unroll
                for (int step = LANES / 2; step > 0; step /= 2)
                    score += __shfl_xor_sync(kAllLanes, score, step);
                if (at[n] < 0 || !sees(far[n], at[n], window_start[r], position[r], true)) continue;
                score = score * a.scale + (far[n] ? a.layout.pivot_bias : 0.0f);
                const float next = fmaxf(row_max[r], score);
                const float old = power(row_max[r] - next), p = power(score - next);
                row_max[r] = next;
                total[r] = total[r] * old + p;
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[r][i] = sum[r][i] * old + p * v[n][i];
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[r][group * LANES * 8 + element + i] = sum[r][i];
        maxima[r][group] = row_max[r];
        totals[r][group] = total[r];
    }
    __syncthreads();
    for (int r = 0; r < ROWS && first_row + r < rows; ++r) {
        const int row = first_row + r, h = kv_head * heads + row / Tq, t = row % Tq;
        float top = -INFINITY, all = 0.0f;
        for (int g = 0; g < kGroups; ++g) top = fmaxf(top, maxima[r][g]);
        const float base = top == -INFINITY ? 0.0f : top;
        for (int g = 0; g < kGroups; ++g) all += totals[r][g] * power(maxima[r][g] - base);
        float* partial = a.partial + (((int64_t(b) * H + h) * Tq + t) * a.splits + split) * (D + 2);
        T* out = a.out.row<T>(b, h, t);
        for (int d = threadIdx.x; d < D; d += kDecodeThreads) {
            float x = 0.0f;
            for (int g = 0; g < kGroups; ++g) x += sums[r][g * LANES * 8 + d] * power(maxima[r][g] - base);
            if (a.splits == 1)
                narrow(all == 0.0f ? 0.0f : x / all, out + d);
            else
                partial[2 + d] = x;
        }
        if (a.splits > 1 && threadIdx.x == 0) {
            partial[0] = top;
            partial[1] = all;
        }
    }
    if (a.splits == 1) return;

    // Each thread's stores are visible before its block counts. A split without keys counts, too. The last
    // one sets the counter back to zero for the next launch.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = a.counters + blockIdx.x / a.splits;
        is_last = atomicAdd(counter, 1) == a.splits - 1;
        if (is_last) *counter = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    merge_splits<T, ROWS>(a, b, kv_head, first_row);
}

}  // namespace
}  // namespace cogview
