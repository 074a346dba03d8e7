// SPDX-License-Identifier: Apache-2.0
// Chunks of outputs are dealt to the threads. In a chunk several rows of W are multiplied at a time, so that
// a core has several streams of memory under way and no sum waits for the one before it.
#include <type_traits>

#include "common/parallel.h"
#include "common/vec.h"
#include "decode_linear/decode_linear.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Of W in a chunk: a thread that is woken for less costs more than it saves, one that is awake does not.
constexpr int64_t kChunkBytes = 256 << 10, kChunkBytesAwake = 32 << 10;
// Products that one running sum takes up, since its error grows with their number.
constexpr int64_t kRun = 64 * kLanes;
// Rows of W that are multiplied at a time, with one row of x, and with up to kTogether: the sums, a vector of
// each row of x and one of W fill the 16 registers of AVX2.
constexpr int kAlone = 8, kShared = 4, kTogether = 3;

// sums[r * stride + o] = x_r w_o. Rows of x are floats with zeros up to `width`, a multiple of kLanes.
template <int kOutputs, int kRows, typename T>
inline void dot_products(const T* w, int64_t w_stride, const float* x, int64_t width, int64_t K, float* sums,
                         int64_t stride) {
    VecF total[kOutputs][kRows] = {};
    for (int64_t start = 0; start < K; start += kRun) {
        const int64_t stop = start + kRun < K ? start + kRun : K;
        VecF run[kOutputs][kRows] = {};
        const auto step = [&](int64_t k, auto tag) {
            VecF values[kRows];
#pragma GCC unroll 3
            for (int r = 0; r < kRows; ++r) values[r] = load(x + r * width + k);
#pragma GCC unroll 8
            for (int o = 0; o < kOutputs; ++o) {
                const VecF weight = load(w + o * w_stride + k, tag);
#pragma GCC unroll 3
                for (int r = 0; r < kRows; ++r) run[o][r] += weight * values[r];
            }
        };
        int64_t k = start;
        for (; k + kLanes <= stop; k += kLanes) step(k, Whole{});
        if (k < stop) step(k, Part{int(stop - k)});
#pragma GCC unroll 8
        for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 3
            for (int r = 0; r < kRows; ++r) total[o][r] += run[o][r];
    }
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 3
        for (int r = 0; r < kRows; ++r) sums[r * stride + o] = reduce_sum(total[o][r]);
}

// All N rows of x with kOutputs rows of W, which stay in the caches meanwhile.
template <int kOutputs, typename T>
inline void all_rows(const DecodeLinear& a, const T* w, const float* x, int64_t width, float* sums,
                     int64_t stride) {
    const auto multiply = [&](int64_t r, auto rows) {
        dot_products<kOutputs, decltype(rows)::value>(w, a.weight_stride, x + r * width, width, a.K,
                                                      sums + r * stride, stride);
    };
    int64_t r = 0;
    for (; r + kTogether <= a.N; r += kTogether) multiply(r, std::integral_constant<int, kTogether>{});
    if (r + 2 <= a.N) {
        multiply(r, std::integral_constant<int, 2>{});
    } else if (r < a.N) {
        multiply(r, std::integral_constant<int, 1>{});
    }
}

// x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / 2 (1 + tanh(u)); exp of no more than
// 0.
inline VecF gelu(VecF x) {
    constexpr double kLog2e = 1.4426950408889634;
    constexpr float kHigh = float(kLog2e), kLow = float(kLog2e - kHigh);
    const VecF twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    const VecF e = exp2_product(-magnitude(twice), kHigh, kLow);
    return x * (twice < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

template <typename T>
void forward(const DecodeLinear& a, int threads) {
    const T *x = static_cast<const T*>(a.x), *weight = static_cast<const T*>(a.weight);
    const T* bias = static_cast<const T*>(a.bias);
    T* y = static_cast<T*>(a.y);
    const int64_t width = (a.K + kLanes - 1) / kLanes * kLanes;
    const Scratch wide(a.N * width);
    for (int64_t r = 0; r < a.N; ++r) {
        for_each_vector(a.K, [&](int64_t k, auto tag) {
            store(wide.data + r * width + k, load(x + r * a.K + k, tag));  // zeros behind a part
        });
    }
    const int64_t bytes = in_parallel_region() ? kChunkBytesAwake : kChunkBytes;
    const int64_t rows = bytes / (int64_t(sizeof(T)) * (a.K + 1)) / kAlone * kAlone;
    const int64_t chunk = rows < kAlone ? kAlone : rows;
    parallel_for(a.O, chunk, threads, [&](int64_t begin, int64_t end) {
        const int64_t stride = end - begin;
        const Scratch sums(a.N * stride);
        int64_t o = begin;
        if (a.N == 1)
            for (; o + kAlone <= end; o += kAlone)
                dot_products<kAlone, 1>(weight + o * a.weight_stride, a.weight_stride, wide.data, width, a.K,
                                        sums.data + o - begin, stride);
        for (; o + kShared <= end; o += kShared)
            all_rows<kShared>(a, weight + o * a.weight_stride, wide.data, width, sums.data + o - begin,
                              stride);
        for (; o < end; ++o)
            all_rows<1>(a, weight + o * a.weight_stride, wide.data, width, sums.data + o - begin, stride);
        for (int64_t r = 0; r < a.N; ++r) {
            for_each_vector(stride, [&](int64_t j, auto tag) {
                VecF v = load(sums.data + r * stride + j, tag);
                if (bias != nullptr) v += load(bias + begin + j, tag);
                store(y + r * a.O + begin + j, a.gelu ? gelu(v) : v, tag);
            });
        }
    });
}

}  // namespace

void decode_linear_cpu(const DecodeLinear& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, forward<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
