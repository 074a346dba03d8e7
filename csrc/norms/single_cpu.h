// SPDX-License-Identifier: Apache-2.0
// One norm over rows on the CPU, a row at a time, which stays in the L1 cache. Bytes: forward reads and
// writes a row (reads it twice under pb_relax="tensor"); backward reads two and writes one.
#pragma once

#include "norms/single.h"
#include "norms/values.h"

namespace cogview {
namespace {

template <NormKind kKind, typename T>
void norm_forward(const NormForward& a, int threads) {
    constexpr bool kW = kIsBf16<T>;
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const PbRelax pb_relax = a.options.pb_relax;
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    const bool by_row = pb_relax == PbRelax::kRow;
    const float fixed =
        pb_relax == PbRelax::kTensor ? tensor_abs_max<false>(x, rows, C, Dropout{}, threads) : 8.0f;
    const bool streaming = streams(y, rows, C) && has_blocks<kW>(y, C);
    const Scratch weight(C), bias(C);
    widen_parameter(a.affine.weight, C, 1.0f, a.options.weight_offset, weight.data);
    widen_parameter(a.affine.bias, C, 0.0f, 0.0f, bias.data);
    if (kW) {
        order_as_words(weight.data, C);
        order_as_words(bias.data, C);
    }
    const WideAffine affine = {weight.data, bias.data, a.options.round_before_weight};
    parallel_for(rows, forward_chunk(C), threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T *row = x + r * C, *next = row + C;
            const Moments m = moments_of<kW, kKind>(row, C, by_row);
            const float abs_max = by_row ? m.abs_max : fixed, scale = scale_of(abs_max);
            Statistics saved;
            with_scaling(scale, [&](auto scaled) {
                constexpr bool kScaled = decltype(scaled)::value;
                const Statistics s = statistics_of<kW, kKind, kScaled>(row, C, m.sum, abs_max, scale,
                                                                       a.options.eps, next, &saved);
                normalise_values<kW, kKind, kScaled, T>(row, s, scale, affine, C, y + r * C, streaming, next);
            });
            if (a.stats != nullptr) save_statistics<kKind>(a.stats, 0, rows, r, saved);
        }
        stream_fence();
    });
}

template <NormKind kKind, typename T>
void norm_backward(const NormBackward& a, int threads) {
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const T* dy = static_cast<const T*>(a.dy);
    const T* x = static_cast<const T*>(a.x);
    T* dx = static_cast<T*>(a.dx);
    const bool streaming = streams(dx, rows, C), amd = is_amd();
    const Scratch weight(C);
    widen_parameter(a.weight, C, 1.0f, a.weight_offset, weight.data);
    const int64_t grain = backward_chunk(rows), chunks = (rows + grain - 1) / grain;
    constexpr int kSlots = parameters_of(kKind);
    const Scratch partials(chunks * kSlots * C);
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch hat(C), scaled(C);
        float* dweight = partials.data + begin / grain * kSlots * C;
        float* dbias = dweight + C;  // LayerNorm
        std::memset(dweight, 0, kSlots * C * sizeof(float));
        for (int64_t r = begin; r < end; ++r) {
            const Statistics s = read_statistics<kKind>(a.stats, 0, rows, r);
            const GradientMeans means = gradient_means<kKind>(
                C, [&](int64_t j, auto tag) { return load(x + r * C + j, tag); },
                [&](int64_t j, auto tag) { return load(dy + r * C + j, tag); }, s, weight.data, dweight,
                dbias, hat.data, scaled.data);
            for_each_vector(C, [&](int64_t j, auto tag) {
                put(dx + r * C + j, row_gradient<kKind>(s, means, hat.data, scaled.data, j, tag), tag,
                    streaming);
                prefetch_vector(x + (r + 1) * C + j, amd);
                prefetch_vector(dy + (r + 1) * C + j, amd);
            });
        }
        stream_fence();
    });
    reduce_partials(partials.data, chunks, kSlots, 0, C, a.gradients.weight);
    if (kKind == NormKind::kLayer) reduce_partials(partials.data, chunks, kSlots, 1, C, a.gradients.bias);
}

}  // namespace
}  // namespace cogview
