// SPDX-License-Identifier: Apache-2.0
// Two norms and the addition between them on the CPU: a row at a time, in a float buffer that stays in the L1
// cache. Bytes: forward reads branch and residual and writes residual_out and normed, once each; under
// pb_relax="tensor" branch is read twice, as its maximum must be known first, and so is residual_out.
// Backward reads four tensors and writes two; without a norm after the addition it reads two and writes one.
#pragma once

#include "norms/row.h"
#include "norms/sandwich.h"

namespace cogview {
namespace {

// row = residual + the row, normalised; rounded to T as it is stored in `out`. B: the dtype of the branch, of
// which RMSNorm fetches the row at `next` meanwhile.
template <NormKind kKind, typename B, typename T>
Moments add_post_norm(float* row, Statistics s, const WideAffine& post, const T* residual, int64_t C, T* out,
                      bool streaming, const B* next) {
    const bool amd = is_amd();
    const Totals<1> total = accumulate<1>(C, [&](int64_t j, auto tag, Totals<1>& t) {
        const VecF y = normalised<kKind, B>(load(row + j, tag), s, post, j, tag);
        const VecF v = rounded<T>(only(load(residual + j, tag) + y, tag));
        put_rounded(out + j, v, tag, streaming);
        store(row + j, v, tag);
        t.sum[0] += moment<kKind>(v);
        t.largest = maximum(magnitude(v), t.largest);
        if (kKind == NormKind::kRms) prefetch_vector(next + j, amd);
    });
    return {reduce_sum(total.sum[0]), reduce_max(total.largest)};
}

// B: the dtype of branch, T: that of the other rows.
template <NormKind kKind, bool kDropout, typename B, typename T>
void sandwich_forward(const SandwichForward& a, int threads) {
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const B* branch = static_cast<const B*>(a.branch);
    const T* residual = static_cast<const T*>(a.residual);
    T* residual_out = static_cast<T*>(a.residual_out);
    T* normed = static_cast<T*>(a.normed);
    const bool by_row = a.options.pb_relax == PbRelax::kRow,
               by_tensor = a.options.pb_relax == PbRelax::kTensor;
    const Scratch parameters(4 * C);
    float *post_weight = parameters.data, *post_bias = post_weight + C;
    float *pre_weight = post_bias + C, *pre_bias = pre_weight + C;
    widen_parameter(a.post.weight, C, 1.0f, a.options.weight_offset, post_weight);
    widen_parameter(a.post.bias, C, 0.0f, 0.0f, post_bias);
    widen_parameter(a.pre.weight, C, 1.0f, a.options.weight_offset, pre_weight);
    widen_parameter(a.pre.bias, C, 0.0f, 0.0f, pre_bias);
    const WideAffine post = {post_weight, post_bias, a.options.round_before_weight};
    const WideAffine pre = {pre_weight, pre_bias, a.options.round_before_weight};

    const float post_abs_max =
        by_tensor ? tensor_abs_max<kDropout>(branch, rows, C, a.dropout, threads) : 8.0f;
    const int64_t grain = forward_chunk(C), chunks = (rows + grain - 1) / grain;
    const Scratch abs_maxima(chunks);
    const bool streaming = streams(residual_out, rows, C) && (normed == nullptr || streams(normed, rows, C));
    const auto pre_norm = [&](int64_t r, float* row, Moments moments, float abs_max, const auto* source) {
        Statistics saved;
        const Statistics s =
            statistics<kKind>(row, C, moments, abs_max, a.options.eps, source + (r + 1) * C, &saved);
        normalise_row<kKind>(row, s, pre, C, normed + r * C, streaming, residual + (r + 1) * C);
        if (a.stats != nullptr) save_statistics<kKind>(a.stats, 1, rows, r, saved);
    };
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch row(C);
        float largest = 0.0f;
        for (int64_t r = begin; r < end; ++r) {
            const RowWords words = kDropout ? row_words(a.dropout, r) : RowWords{};
            Moments m = widen_row<kKind, kDropout>(branch + r * C, C, a.dropout, words, row.data);
            Statistics saved;
            const Statistics s = statistics<kKind>(row.data, C, m, by_row ? m.abs_max : post_abs_max,
                                                   a.options.eps, residual + r * C, &saved);
            if (a.stats != nullptr) save_statistics<kKind>(a.stats, 0, rows, r, saved);
            m = add_post_norm<kKind, B>(row.data, s, post, residual + r * C, C, residual_out + r * C,
                                        streaming, branch + (r + 1) * C);
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
        const Scratch row(C);
        for (int64_t r = begin; r < end; ++r)
            pre_norm(r, row.data, widen_row<kKind, false>(residual_out + r * C, C, a.dropout, {}, row.data),
                     abs_max, residual_out);
        stream_fence();
    });
}

template <NormKind kKind, bool kDropout, typename B, typename T>
void sandwich_backward(const SandwichBackward& a, int threads) {
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const T* dresidual_out = static_cast<const T*>(a.dresidual_out);
    const T* dnormed = static_cast<const T*>(a.dnormed);
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
                prefetch_vector(residual_out + at + C + j, amd);
            });
        }
        stream_fence();
    });
    const Parameter to[] = {a.dpost.weight, a.dpost.bias, a.dpre.weight, a.dpre.bias};
    for (int slot = 0; slot < kSlots; ++slot)
        reduce_partials(partials.data, chunks, kSlots, slot, C, to[kNorm == 2 ? slot : 2 * slot]);
}

}  // namespace
}  // namespace cogview
