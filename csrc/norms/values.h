// SPDX-License-Identifier: Apache-2.0
// Passes over the values of rows where they lie, in the L1 cache after the first pass: to keep a row widened
// would cost stores that take longer than to widen it again.
//
// Of bfloat16, whole vectors are best taken two elements a word (common/vec.h). Their order is that of words
// then: of each 2 kLanes elements those at even places, then those at odd ones; what is left stands as it
// lies. What goes with such values, as weights and rows of floats do, is brought into this order too. kW: it
// is that of words.
#pragma once

#include "norms/row.h"

namespace cogview {
namespace {

template <typename T>
constexpr bool kIsBf16 = std::is_same<T, BFloat16>::value;

template <int... kLane>
inline EvenOdd apart(VecF a, VecF b, std::integer_sequence<int, kLane...>) {
    return {take_lanes(a, b, std::integer_sequence<int, 2 * kLane...>{}),
            take_lanes(a, b, std::integer_sequence<int, 2 * kLane + 1 ...>{})};
}
// Brings floats into the order of words.
inline void order_as_words(float* row, int64_t C) {
    for (int64_t j = 0; j + 2 * kLanes <= C; j += 2 * kLanes) {
        const EvenOdd x =
            apart(load(row + j), load(row + j + kLanes), std::make_integer_sequence<int, kLanes>{});
        store(row + j, x.even);
        store(row + j + kLanes, x.odd);
    }
}

// 2 kLanes values in the order of words, which floats have already.
inline EvenOdd load_block(const BFloat16* x) {
    return load_words(x);
}
inline EvenOdd load_block(const float* x) {
    return {load(x), load(x + kLanes)};
}
inline void put_block(BFloat16* to, VecU words, bool streaming) {
    if (streaming)
        stream_bits(to, words);
    else
        std::memcpy(to, &words, sizeof(words));
}

// Whether rows [.., C] at `to` may be streamed as far as blocks go: whole lines.
template <bool kW>
inline bool has_blocks(const void* to, int64_t C) {
    return !kW || (C % (2 * kLanes) == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(VecU) == 0);
}

// accumulate() over the values of a row: step(j, value, tag, totals).
template <bool kW, int K, typename X, typename Step>
__attribute__((flatten)) inline Totals<K> accumulate_values(const X* x, int64_t C, const Step& step) {
    if constexpr (!kW) {
        return accumulate<K>(C,
                             [&](int64_t j, auto tag, Totals<K>& t) { step(j, load(x + j, tag), tag, t); });
    } else {
        Totals<K> a = {}, b = {}, c = {}, d = {};
        int64_t j = 0;
        for (; j + 4 * kLanes <= C; j += 4 * kLanes) {
            const EvenOdd low = load_block(x + j), high = load_block(x + j + 2 * kLanes);
            step(j, low.even, Whole{}, a);
            step(j + kLanes, low.odd, Whole{}, b);
            step(j + 2 * kLanes, high.even, Whole{}, c);
            step(j + 3 * kLanes, high.odd, Whole{}, d);
        }
        if (j + 2 * kLanes <= C) {
            const EvenOdd low = load_block(x + j);
            step(j, low.even, Whole{}, a);
            step(j + kLanes, low.odd, Whole{}, b);
            j += 2 * kLanes;
        }
        if (j + kLanes <= C) {
            step(j, load(x + j), Whole{}, c);
            j += kLanes;
        }
        if (j < C) {
            const Part part = {int(C - j)};
            step(j, load(x + j, part), part, d);
        }
        for (int k = 0; k < K; ++k) a.sum[k] = (a.sum[k] + b.sum[k]) + (c.sum[k] + d.sum[k]);
        a.largest = maximum(maximum(a.largest, b.largest), maximum(c.largest, d.largest));
        return a;
    }
}

// out[0, C) = f(j, value, tag) of the values of a row.
template <bool kW, typename X, typename T, typename F>
__attribute__((flatten)) inline void map_values(const X* x, int64_t C, T* out, bool streaming, const F& f) {
    int64_t j = 0;
    if constexpr (kW) {
        for (; j + 2 * kLanes <= C; j += 2 * kLanes) {
            const EvenOdd v = load_block(x + j);
            put_block(out + j, to_words({f(j, v.even, Whole{}), f(j + kLanes, v.odd, Whole{})}), streaming);
        }
    }
    for (; j + kLanes <= C; j += kLanes) put(out + j, f(j, load(x + j), Whole{}), Whole{}, streaming);
    if (j < C) {
        const Part part = {int(C - j)};
        put(out + j, f(j, load(x + j, part), part), part, streaming);
    }
}

// row[0, C) and out[0, C) = f(j, value, other, tag) of the values of two rows, rounded to T; gives their
// moments.
template <bool kW, NormKind kKind, typename X, typename T, typename F>
__attribute__((flatten)) inline Moments join_values(const X* x, const T* other, int64_t C, float* row, T* out,
                                                    bool streaming, const F& f) {
    const auto count = [&](int64_t j, VecF v, auto tag, Totals<1>& t) {
        store(row + j, v, tag);
        t.sum[0] += moment<kKind>(v);
        t.largest = maximum(magnitude(v), t.largest);
    };
    Totals<1> total;
    if constexpr (!kW) {
        total = accumulate<1>(C, [&](int64_t j, auto tag, Totals<1>& t) {
            const VecF v = rounded<T>(f(j, load(x + j, tag), load(other + j, tag), tag));
            put_rounded(out + j, v, tag, streaming);
            count(j, v, tag, t);
        });
    } else {
        Totals<1> even = {}, odd = {};
        int64_t j = 0;
        for (; j + 2 * kLanes <= C; j += 2 * kLanes) {
            const EvenOdd a = load_block(x + j), b = load_block(other + j);
            const VecU words =
                to_words({f(j, a.even, b.even, Whole{}), f(j + kLanes, a.odd, b.odd, Whole{})});
            put_block(out + j, words, streaming);
            count(j, bitcast<VecF>(words << 16), Whole{}, even);
            count(j + kLanes, bitcast<VecF>(words & 0xffff0000), Whole{}, odd);
        }
        for_each_vector(C - j, [&](int64_t i, auto tag) {
            const VecF v = rounded<T>(f(j + i, load(x + j + i, tag), load(other + j + i, tag), tag));
            put_rounded(out + j + i, v, tag, false);
            count(j + i, v, tag, even);
        });
        total.sum[0] = even.sum[0] + odd.sum[0];
        total.largest = maximum(even.largest, odd.largest);
    }
    return {reduce_sum(total.sum[0]), reduce_max(total.largest)};
}

// The moments of a row; the largest value only where it is asked for.
template <bool kW, NormKind kKind, typename X>
inline Moments moments_of(const X* x, int64_t C, bool largest) {
    if (!largest) {
        const Totals<1> total = accumulate_values<kW, 1>(
            x, C, [&](int64_t, VecF v, auto, Totals<1>& t) { t.sum[0] += moment<kKind>(v); });
        return {reduce_sum(total.sum[0]), 0.0f};
    }
    const Totals<1> total = accumulate_values<kW, 1>(x, C, [&](int64_t, VecF v, auto, Totals<1>& t) {
        t.sum[0] += moment<kKind>(v);
        t.largest = maximum(magnitude(v), t.largest);
    });
    return {reduce_sum(total.sum[0]), reduce_max(total.largest)};
}

// Mean and 1 / sqrt(variance + eps * (abs_max / 8)^2) of a row, for RMSNorm with the mean of squares in place
// of the variance; `abs_max` is 8 without PB-Relax. They are those of the row multiplied by `scale`, of
// scale_of(); `saved` are those of the row as it is. Meanwhile LayerNorm fetches the row at `next`.
template <bool kW, NormKind kKind, bool kScaled, typename X, typename Next>
inline Statistics statistics_of(const X* x, int64_t C, float sum, float abs_max, float scale, float eps,
                                const Next* next, Statistics* saved) {
    const auto scaled = [=](VecF v) { return kScaled ? v * scale : v; };
    const float inverse = 1.0f / float(C);
    if (kScaled) {
        const Totals<1> total = accumulate_values<kW, 1>(
            x, C, [&](int64_t, VecF v, auto, Totals<1>& t) { t.sum[0] += moment<kKind>(scaled(v)); });
        sum = reduce_sum(total.sum[0]);
    }
    const float first = sum * inverse;
    float mean = 0.0f, spread = first;
    if constexpr (kKind == NormKind::kLayer) {
        const bool amd = is_amd();
        const Totals<2> total =
            accumulate_values<kW, 2>(x, C, [&](int64_t j, VecF v, auto tag, Totals<2>& t) {
                const VecF d = only(scaled(v) - first, tag);
                t.sum[0] += d;
                t.sum[1] += d * d;
                prefetch_vector(next + j, amd);
            });
        const float correction = reduce_sum(total.sum[0]) * inverse;
        mean = first + correction;
        spread = reduce_sum(total.sum[1]) * inverse - correction * correction;
    }
    const float relaxed = abs_max * scale * 0.125f;
    const float variance = (spread > 0.0f || spread != spread ? spread : 0.0f) + eps * relaxed * relaxed;
    const float rstd = variance > 0.0f || variance != variance ? 1.0f / __builtin_sqrtf(variance) : 0.0f;
    const float limit = std::numeric_limits<float>::max();
    saved->mean = mean / scale;
    saved->rstd = rstd * scale < limit ? rstd * scale : limit;
    return {mean, rstd};
}

// out[0, C) = the row of T, normalised; `kScaled` and `scale` as before. Meanwhile RMSNorm, which has no pass
// for statistics, fetches the row at `next`.
template <bool kW, NormKind kKind, bool kScaled, typename T, typename X, typename Out, typename Next>
inline void normalise_values(const X* x, Statistics s, float scale, const WideAffine& affine, int64_t C,
                             Out* out, bool streaming, const Next* next) {
    const bool amd = is_amd();
    map_values<kW>(x, C, out, streaming, [&](int64_t j, VecF v, auto tag) {
        // Two vectors of bfloat16 are one line.
        if (kKind == NormKind::kRms && (!kW || j % (2 * kLanes) == 0)) prefetch_vector(next + j, amd);
        return normalised<kKind, T>(kScaled ? v * scale : v, s, affine, j, tag);
    });
}

// Calls f with std::true_type where `scale` is not 1, else with std::false_type.
template <typename F>
inline auto with_scaling(float scale, const F& f) {
    return scale == 1.0f ? f(std::false_type{}) : f(std::true_type{});
}

}  // namespace
}  // namespace cogview
