// SPDX-License-Identifier: Apache-2.0
// A norm of one row on the CPU. Only *_cpu.cpp files include this; internal linkage as in common/vec.h.
//
// Statistics: LayerNorm takes the mean, then centred squares, and the centred values' own mean to undo the
// first one's rounding, so that constant rows come out right. RMSNorm: squares.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/dropout.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/vec.h"
#include "norms/norm.h"

namespace cogview {
namespace {

// Forward passes deal rows in chunks of about this many elements, or of the second number to threads that are
// awake.
constexpr int64_t kChunk = 1 << 17, kChunkAwake = 1 << 12;
// Backward passes deal at most so many chunks, each with its own partial sums of the weights' gradients. It
// does not depend on the number of threads, so their number does not change a bit of the result.
constexpr int64_t kPartials = 64;

inline int64_t at_least(int64_t low, int64_t x) {
    return x < low ? low : x;
}
inline int64_t forward_chunk(int64_t C) {
    return at_least(1, (in_parallel_region() ? kChunkAwake : kChunk) / at_least(1, C));
}
inline int64_t backward_chunk(int64_t rows) {
    return at_least(16, (rows + kPartials - 1) / kPartials);
}

// A weight or bias as floats, plus `added`; `fill` where there is none.
inline void widen_parameter(Parameter p, int64_t C, float fill, float added, float* to) {
    for (int64_t j = 0; j < C; ++j) to[j] = fill;
    if (p.data == nullptr) return;
    COGVIEW_DISPATCH_DTYPE(p.dtype, {
        const scalar_t* from = static_cast<const scalar_t*>(p.data);
        for_each_vector(C, [&](int64_t j, auto tag) { store(to + j, load(from + j, tag) + added, tag); });
    });
}

// ---- results past the caches

// Whether a result of `bytes` at `to` will have left the caches when its reader comes. Others want a part of
// the cache that cores share: a sixteenth counts (of 480 MB; there streaming slowed 22 MB down and sped 43 MB
// up). Fresh pages, which PyTorch's tensors of more than 32 MB have, lie in the caches since the system
// cleared them, and stores past the caches cost more there than they save.
inline bool leaves_caches(const void* to, int64_t bytes) {
    static const int64_t large = std::max<int64_t>(4 << 20, shared_cache_bytes() / 16);
    return bytes >= large && !is_fresh(to, bytes);
}

// Whether [rows, C] at `to` is to be streamed: it leaves the caches, and its vectors are aligned.
template <typename T>
inline bool streams(const T* to, int64_t rows, int64_t C) {
    const int64_t vector = kLanes * sizeof(T);
    return C % kLanes == 0 && reinterpret_cast<uintptr_t>(to) % vector == 0 &&
           leaves_caches(to, rows * C * int64_t(sizeof(T)));
}

// v as T holds it.
template <typename T>
inline VecF rounded(VecF v) {
    if constexpr (std::is_same<T, float>::value) {
        return v;
    } else if constexpr (std::is_same<T, BFloat16>::value) {
        return round_to_bfloat16(v);
    } else {
        T values[kLanes];
        store(values, v);
        return load(values);
    }
}

template <typename T>
inline void put(T* to, VecF v, Whole, bool streaming) {
    if (streaming)
        stream(to, v);
    else
        store(to, v);
}
template <typename T>
inline void put(T* to, VecF v, Part part, bool) {
    store(to, v, part);
}

// Writes what rounded() gave: bfloat16 is not rounded a second time.
template <typename T, typename Tag>
inline void put_rounded(T* to, VecF v, Tag tag, bool streaming) {
    if constexpr (std::is_same<T, BFloat16>::value && std::is_same<Tag, Whole>::value) {
        const VecU16 h = upper_halves(bitcast<VecU>(v));
        if (streaming)
            stream_bits(to, h);
        else
            std::memcpy(to, &h, sizeof(h));
    } else {
        put(to, v, tag, streaming);
    }
}

// ---- dropout

inline RowWords row_words(const Dropout& dropout, int64_t row) {
    return philox(dropout.seed, uint32_t(row), uint32_t(uint64_t(row) >> 32), 0);
}

// x * scale where the element of column j + lane survives, else 0.
inline VecF drop(VecF x, const Dropout& dropout, RowWords row, int64_t j) {
    VecU column;
    for (int i = 0; i < kLanes; ++i) column[i] = uint32_t(j) + uint32_t(i);
    const VecU r0 = row.r0 - VecU{}, r1 = row.r1 - VecU{};
    return keep_mask(r0, r1, column, dropout.keep_threshold) ? x * dropout.keep_scale : VecF{};
}

// ---- statistics

struct Moments {
    float sum, abs_max;  // RMSNorm: the sum of squares
};

// What a value adds to Moments::sum.
template <NormKind kKind>
inline VecF moment(VecF v) {
    return kKind == NormKind::kLayer ? v : v * v;
}

// row[0, C) = x after dropout, with its moments.
template <NormKind kKind, bool kDropout, typename T>
inline Moments widen_row(const T* x, int64_t C, const Dropout& dropout, RowWords words, float* row) {
    const Totals<1> total = accumulate<1>(C, [&](int64_t j, auto tag, Totals<1>& t) {
        VecF v = load(x + j, tag);
        if (kDropout) v = drop(v, dropout, words, j);
        store(row + j, v, tag);
        t.sum[0] += moment<kKind>(v);
        t.largest = maximum(magnitude(v), t.largest);
    });
    return {reduce_sum(total.sum[0]), reduce_max(total.largest)};
}

// The absolute maximum of [rows, C] after dropout, for pb_relax="tensor".
template <bool kDropout, typename T>
inline float tensor_abs_max(const T* x, int64_t rows, int64_t C, const Dropout& dropout, int threads) {
    const int64_t grain = forward_chunk(C), chunks = (rows + grain - 1) / grain;
    const Scratch abs_maxima(chunks);
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        float abs_max = 0.0f;
        for (int64_t r = begin; r < end; ++r) {
            const RowWords words = kDropout ? row_words(dropout, r) : RowWords{};
            const Totals<1> total = accumulate<1>(C, [&](int64_t j, auto tag, Totals<1>& t) {
                VecF v = load(x + r * C + j, tag);
                if (kDropout) v = drop(v, dropout, words, j);
                t.largest = maximum(magnitude(v), t.largest);
            });
            const float own = reduce_max(total.largest);
            abs_max = own > abs_max ? own : abs_max;
        }
        abs_maxima.data[begin / grain] = abs_max;
    });
    float abs_max = 0.0f;
    for (int64_t i = 0; i < chunks; ++i)
        abs_max = abs_maxima.data[i] > abs_max ? abs_maxima.data[i] : abs_max;
    return abs_max;
}

// A power of two by which a row is to be multiplied, since float cannot hold its squares (the norm does not
// change); else 1.
inline float scale_of(float abs_max) {
    if (!(abs_max > 0.0f) || (abs_max > 1e-15f && abs_max < 1e15f)) return 1.0f;
    int32_t exponent = bitcast<int32_t>(abs_max) >> 23;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    return bitcast<float>((254 - exponent) << 23);
}

// What a row's values, normalised, are multiplied by and added to; RMSNorm adds nothing.
struct WideAffine {
    const float *weight, *bias;
    bool round_before_weight;
};

// (x - mean) * rstd * weight + bias for the values of columns j to j + lane; T is the dtype of the row.
template <NormKind kKind, typename T, typename Tag>
inline VecF normalised(VecF x, Statistics s, const WideAffine& affine, int64_t j, Tag tag) {
    if constexpr (kKind == NormKind::kLayer)
        return (x - s.mean) * s.rstd * load(affine.weight + j, tag) + load(affine.bias + j, tag);
    const VecF y = x * s.rstd;
    return (affine.round_before_weight ? rounded<T>(y) : y) * load(affine.weight + j, tag);
}

// ---- gradients

// Adds a row's dy * xhat and dy to partial sums (where there are any), and returns, in `hat` and `scaled`,
// xhat = (x - mean) * rstd and dy * weight, with the means that dx = rstd * (scaled - plain - xhat * hat)
// needs. RMSNorm has neither `plain` nor dbias.
struct GradientMeans {
    float plain, hat;
};

template <NormKind kKind, typename LoadX, typename LoadDy>
inline GradientMeans gradient_means(int64_t C, const LoadX& load_x, const LoadDy& load_dy, Statistics s,
                                    const float* weight, float* dweight, float* dbias, float* hat,
                                    float* scaled) {
    const Totals<2> total = accumulate<2>(C, [&](int64_t j, auto tag, Totals<2>& t) {
        const VecF dy = load_dy(j, tag);
        const VecF x = load_x(j, tag);
        const VecF xhat = kKind == NormKind::kLayer ? only((x - s.mean) * s.rstd, tag) : x * s.rstd;
        const VecF g = dy * load(weight + j, tag);
        store(dweight + j, load(dweight + j, tag) + dy * xhat, tag);
        if (kKind == NormKind::kLayer) store(dbias + j, load(dbias + j, tag) + dy, tag);
        store(hat + j, xhat, tag);
        store(scaled + j, g, tag);
        if (kKind == NormKind::kLayer) t.sum[0] += g;
        t.sum[1] += g * xhat;
    });
    const float inverse = 1.0f / float(C);
    return {reduce_sum(total.sum[0]) * inverse, reduce_sum(total.sum[1]) * inverse};
}

// One vector of dx from what gradient_means() left.
template <NormKind kKind, typename Tag>
inline VecF row_gradient(Statistics s, GradientMeans means, const float* hat, const float* scaled, int64_t j,
                         Tag tag) {
    const VecF g = load(scaled + j, tag), xhat = load(hat + j, tag);
    return s.rstd * (kKind == NormKind::kLayer ? g - means.plain - xhat * means.hat : g - xhat * means.hat);
}

// The gradient of a weight or bias: the sum over chunks of partial[chunk][slot][0, C), in their order.
inline void reduce_partials(const float* partial, int64_t chunks, int64_t slots, int64_t slot, int64_t C,
                            Parameter to) {
    if (to.data == nullptr) return;
    COGVIEW_DISPATCH_DTYPE(to.dtype, {
        scalar_t* out = static_cast<scalar_t*>(to.data);
        for_each_vector(C, [&](int64_t j, auto tag) {
            VecF sum = VecF{};
            for (int64_t i = 0; i < chunks; ++i) sum += load(partial + (i * slots + slot) * C + j, tag);
            store(out + j, sum, tag);
        });
    });
}

}  // namespace
}  // namespace cogview
