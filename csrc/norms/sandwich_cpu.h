// SPDX-License-Identifier: Apache-2.0
// Two norms and the addition between them on the CPU: a row at a time, which stays in the L1 cache. Bytes:
// forward reads branch and residual and writes residual_out and normed, once each; under pb_relax="tensor"
// branch is read twice, as its maximum must be known first, and residual_out once more. Backward reads four
// tensors and writes two; without a norm after the addition it reads two and writes one.
#pragma once

#include "norms/sandwich.h"
#include "norms/values.h"

namespace cogview {
namespace {

// B: the dtype of branch, T: that of the trunk, N: that of normed.
template <NormKind kKind, bool kDropout, typename B, typename T, typename N>
void sandwich_forward(const SandwichForward& a, int threads) {
    constexpr bool kW = kIsBf16<B> && kIsBf16<T> && !kDropout;
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const B* branch = static_cast<const B*>(a.branch);
    const T* residual = static_cast<const T*>(a.residual);
    T* residual_out = static_cast<T*>(a.residual_out);
    N* normed = static_cast<N*>(a.normed);
    const bool by_row = a.options.pb_relax == PbRelax::kRow,
               by_tensor = a.options.pb_relax == PbRelax::kTensor, amd = is_amd();
    const Scratch parameters(4 * C);
    float *post_weight = parameters.data, *post_bias = post_weight + C;
    float *pre_weight = post_bias + C, *pre_bias = pre_weight + C;
    widen_parameter(a.post.weight, C, 1.0f, a.options.weight_offset, post_weight);
    widen_parameter(a.post.bias, C, 0.0f, 0.0f, post_bias);
    widen_parameter(a.pre.weight, C, 1.0f, a.options.weight_offset, pre_weight);
    widen_parameter(a.pre.bias, C, 0.0f, 0.0f, pre_bias);
    if (kW)
        for (int i = 0; i < 4; ++i) order_as_words(parameters.data + i * C, C);
    const WideAffine post = {post_weight, post_bias, a.options.round_before_weight};
    const WideAffine pre = {pre_weight, pre_bias, a.options.round_before_weight};

    const float post_abs_max =
        by_tensor ? tensor_abs_max<kDropout>(branch, rows, C, a.dropout, threads) : 8.0f;
    const int64_t grain = forward_chunk(C), chunks = (rows + grain - 1) / grain;
    const Scratch abs_maxima(chunks);
    const bool streaming = streams(residual_out, rows, C) && has_blocks<kW>(residual_out, C) &&
                           (normed == nullptr || (streams(normed, rows, C) && has_blocks<kW>(normed, C)));
    // row[0, C) = residual + the values of x, normalised, as residual_out has them.
    const auto post_norm = [&](int64_t r, const auto* x, Moments m, float* row) {
        const float abs_max = by_row ? m.abs_max : post_abs_max, scale = scale_of(abs_max);
        Statistics saved;
        m = with_scaling(scale, [&](auto scaled) {
            constexpr bool kScaled = decltype(scaled)::value;
            const Statistics s = statistics_of<kW, kKind, kScaled>(x, C, m.sum, abs_max, scale, a.options.eps,
                                                                   residual + r * C, &saved);
            const B* next = branch + (r + 1) * C;
            return join_values<kW, kKind>(x, residual + r * C, C, row, residual_out + r * C, streaming,
                                          [&](int64_t j, VecF v, VecF other, auto tag) {
                                              if (kKind == NormKind::kRms && (!kW || j % (2 * kLanes) == 0))
                                                  prefetch_vector(next + j, amd);
                                              const VecF y = normalised<kKind, B>(kScaled ? v * scale : v, s,
                                                                                  post, j, tag);
                                              return only(other + y, tag);
                                          });
        });
        if (a.stats != nullptr) save_statistics<kKind>(a.stats, 0, rows, r, saved);
        return m;
    };
    // `x` is what post_norm() gave; meanwhile the rows that come next are fetched.
    const auto pre_norm = [&](int64_t r, const auto* x, Moments m, float abs_max, const auto* next) {
        const float scale = scale_of(abs_max);
        Statistics saved;
        with_scaling(scale, [&](auto scaled) {
            constexpr bool kScaled = decltype(scaled)::value;
            const Statistics s = statistics_of<kW, kKind, kScaled>(x, C, m.sum, abs_max, scale, a.options.eps,
                                                                   next + (r + 1) * C, &saved);
            normalise_values<kW, kKind, kScaled, T>(x, s, scale, pre, C, normed + r * C, streaming,
                                                    residual + (r + 1) * C);
        });
        if (a.stats != nullptr) save_statistics<kKind>(a.stats, 1, rows, r, saved);
    };
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch row(C);
        float largest = 0.0f;
        for (int64_t r = begin; r < end; ++r) {
            Moments m;
            if constexpr (kW) {
                m = moments_of<kW, kKind>(branch + r * C, C, by_row);
                m = post_norm(r, branch + r * C, m, row.data);
            } else {
                // A copy, so that rows of float32 find room in the L1 cache: it is written over in place.
                const RowWords words = kDropout ? row_words(a.dropout, r) : RowWords{};
                m = widen_row<kKind, kDropout>(branch + r * C, C, a.dropout, words, row.data);
                m = post_norm(r, row.data, m, row.data);
            }
            largest = m.abs_max > largest ? m.abs_max : largest;
            if (!by_tensor && normed != nullptr) pre_norm(r, row.data, m, by_row ? m.abs_max : 8.0f, branch);
        }
        stream_fence();
        abs_maxima.data[begin / grain] = largest;
    });
    if (!by_tensor || normed == nullptr) return;
    float abs_max = 0.0f;
    for (int64_t i = 0; i < chunks; ++i)
        abs_max = abs_maxima.data[i] > abs_max ? abs_maxima.data[i] : abs_max;
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T* row = residual_out + r * C;
            pre_norm(r, row, moments_of<kW, kKind>(row, C, false), abs_max, residual_out);
        }
        stream_fence();
    });
}

template <NormKind kKind, bool kDropout, typename B, typename T, typename N>
void sandwich_backward(const SandwichBackward& a, int threads) {
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const T* dresidual_out = static_cast<const T*>(a.dresidual_out);
    const N* dnormed = static_cast<const N*>(a.dnormed);
    const B* branch = static_cast<const B*>(a.branch);
    const T* residual_out = static_cast<const T*>(a.residual_out);
    B* dbranch = static_cast<B*>(a.dbranch);
    T* dresidual = static_cast<T*>(a.dresidual);
    const Scratch post_weight(C), pre_weight(C);
    widen_parameter(a.post_weight, C, 1.0f, a.weight_offset, post_weight.data);
    widen_parameter(a.pre_weight, C, 1.0f, a.weight_offset, pre_weight.data);
    const int64_t grain = backward_chunk(rows), chunks = (rows + grain - 1) / grain;
    constexpr int kNorm = parameters_of(kKind), kSlots = 2 * kNorm;
    const Scratch partials(chunks * kSlots * C);
    const bool streaming = streams(dbranch, rows, C) && (dresidual == nullptr || streams(dresidual, rows, C));
    const bool amd = is_amd();
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch hat(C), scaled(C);
        float* post_partial = partials.data + begin / grain * kSlots * C;
        float* pre_partial = post_partial + kNorm * C;
        std::memset(post_partial, 0, kSlots * C * sizeof(float));
        for (int64_t r = begin; r < end; ++r) {
            const int64_t at = r * C;
            // Through the pre norm.
            GradientMeans means = {};
            Statistics pre = {};
            if (dnormed != nullptr) {
                pre = read_statistics<kKind>(a.stats, 1, rows, r);
                means = gradient_means<kKind>(
                    C, [&](int64_t j, auto tag) { return load(residual_out + at + j, tag); },
                    [&](int64_t j, auto tag) {
                        if (dresidual_out != nullptr) prefetch_vector(dresidual_out + at + j, amd);
                        prefetch_vector(branch + at + j, amd);
                        return load(dnormed + at + j, tag);
                    },
                    pre, pre_weight.data, pre_partial, pre_partial + C, hat.data, scaled.data);
            }
            // d residual_out in all is d residual too, and goes on through the post norm and dropout.
            const GradientMeans pre_means = means;
            const auto residual_gradient = [&](int64_t j, auto tag) {
                VecF d = VecF{};
                if (dnormed != nullptr)
                    d = row_gradient<kKind>(pre, pre_means, hat.data, scaled.data, j, tag);
                if (dresidual_out != nullptr) d += load(dresidual_out + at + j, tag);
                if (dresidual != nullptr) put(dresidual + at + j, d, tag, streaming);
                if (dnormed != nullptr) prefetch_vector(dnormed + at + C + j, amd);
                return d;
            };
            const Statistics post = read_statistics<kKind>(a.stats, 0, rows, r);
            const RowWords words = kDropout ? row_words(a.dropout, r) : RowWords{};
            means = gradient_means<kKind>(
                C,
                [&](int64_t j, auto tag) {
                    const VecF v = load(branch + at + j, tag);
                    return kDropout ? drop(v, a.dropout, words, j) : v;
                },
                residual_gradient, post, post_weight.data, post_partial, post_partial + C, hat.data,
                scaled.data);
            for_each_vector(C, [&](int64_t j, auto tag) {
                const VecF d = row_gradient<kKind>(post, means, hat.data, scaled.data, j, tag);
                put(dbranch + at + j, kDropout ? drop(d, a.dropout, words, j) : d, tag, streaming);
                if (dnormed != nullptr) prefetch_vector(residual_out + at + C + j, amd);
            });
        }
        stream_fence();
    });
    const Parameter to[] = {a.dpost.weight, a.dpost.bias, a.dpre.weight, a.dpre.bias};
    for (int slot = 0; slot < kSlots; ++slot)
        reduce_partials(partials.data, chunks, kSlots, slot, C, to[kNorm == 2 ? slot : 2 * slot]);
}

template <NormKind kKind>
void sandwich_forward(const SandwichForward& a, int threads) {
    with_row_types(a, [&](auto b, auto t, auto n) {
        using B = decltype(b);
        using T = decltype(t);
        using N = decltype(n);
        a.dropout.drops() ? sandwich_forward<kKind, true, B, T, N>(a, threads)
                          : sandwich_forward<kKind, false, B, T, N>(a, threads);
    });
}

template <NormKind kKind>
void sandwich_backward(const SandwichBackward& a, int threads) {
    with_row_types(a, [&](auto b, auto t, auto n) {
        using B = decltype(b);
        using T = decltype(t);
        using N = decltype(n);
        a.dropout.drops() ? sandwich_backward<kKind, true, B, T, N>(a, threads)
                          : sandwich_backward<kKind, false, B, T, N>(a, threads);
    });
}

}  // namespace
}  // namespace cogview
