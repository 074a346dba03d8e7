// SPDX-License-Identifier: Apache-2.0
// One row at a time, in a float buffer that stays in the L1 cache. Bytes: forward reads branch and residual
// and writes residual_out and normed, once each; under pb_relax="tensor" branch is read twice, as its maximum
// must be known first, and so is residual_out. Backward reads four tensors and writes two.
#include "norms/row.h"
#include "sandwich_layer_norm/sandwich_layer_norm.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// row = residual + (row - mean) * rstd * weight + bias, rounded to T as it is stored in `out`.
template <typename T>
Moments add_post_norm(float* row, Statistics s, const float* weight, const float* bias, const T* residual,
                      int64_t C, T* out, bool streaming) {
    const Totals<1> total = accumulate<1>(C, [&](int64_t j, auto tag, Totals<1>& t) {
        const VecF y = (load(row + j, tag) - s.mean) * s.rstd;
        const VecF sum = load(residual + j, tag) + (y * load(weight + j, tag) + load(bias + j, tag));
        const VecF v = rounded<T>(only(sum, tag));
        put_rounded(out + j, v, tag, streaming);
        store(row + j, v, tag);
        t.sum[0] += v;
        t.largest = maximum(magnitude(v), t.largest);
    });
    return {reduce_sum(total.sum[0]), reduce_max(total.largest)};
}

template <bool kDropout, typename T>
void forward(const SandwichForward& a, int threads) {
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const T* branch = static_cast<const T*>(a.branch);
    const T* residual = static_cast<const T*>(a.residual);
    T* residual_out = static_cast<T*>(a.residual_out);
    T* normed = static_cast<T*>(a.normed);
    const bool by_row = a.options.pb_relax == PbRelax::kRow,
               by_tensor = a.options.pb_relax == PbRelax::kTensor;
    const Scratch parameters(4 * C);
    float *post_weight = parameters.data, *post_bias = post_weight + C;
    float *pre_weight = post_bias + C, *pre_bias = pre_weight + C;
    widen_parameter(a.post.weight, C, 1.0f, post_weight);
    widen_parameter(a.post.bias, C, 0.0f, post_bias);
    widen_parameter(a.pre.weight, C, 1.0f, pre_weight);
    widen_parameter(a.pre.bias, C, 0.0f, pre_bias);

    const float post_abs_max =
        by_tensor ? tensor_abs_max<kDropout>(branch, rows, C, a.dropout, threads) : 8.0f;
    const int64_t grain = forward_chunk(C), chunks = (rows + grain - 1) / grain;
    const Scratch abs_maxima(chunks);
    const bool streaming = streams(residual_out, rows, C) && streams(normed, rows, C);
    float* pre_stats = a.stats == nullptr ? nullptr : a.stats + 2 * rows;
    const auto pre_norm = [&](int64_t r, float* row, Moments moments, float abs_max, const T* source) {
        Statistics saved;
        const Statistics s =
            statistics(row, C, moments, abs_max, a.options.eps, source + (r + 1) * C, &saved);
        normalise_row(row, s, pre_weight, pre_bias, C, normed + r * C, streaming);
        save_statistics(saved, pre_stats, rows, r);
    };
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch row(C);
        float largest = 0.0f;
        for (int64_t r = begin; r < end; ++r) {
            const RowWords words = kDropout ? row_words(a.dropout, r) : RowWords{};
            Moments m = widen_row<kDropout>(branch + r * C, C, a.dropout, words, row.data);
            Statistics saved;
            const Statistics s = statistics(row.data, C, m, by_row ? m.abs_max : post_abs_max, a.options.eps,
                                            residual + r * C, &saved);
            save_statistics(saved, a.stats, rows, r);
            m = add_post_norm(row.data, s, post_weight, post_bias, residual + r * C, C, residual_out + r * C,
                              streaming);
            largest = m.abs_max > largest ? m.abs_max : largest;
            if (!by_tensor) pre_norm(r, row.data, m, by_row ? m.abs_max : 8.0f, branch);
        }
        stream_fence();
        abs_maxima.data[begin / grain] = largest;
    });
    if (!by_tensor) return;
    float abs_max = 0.0f;
    for (int64_t i = 0; i < chunks; ++i)
        abs_max = abs_maxima.data[i] > abs_max ? abs_maxima.data[i] : abs_max;
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch row(C);
        for (int64_t r = begin; r < end; ++r)
            pre_norm(r, row.data, widen_row<false>(residual_out + r * C, C, a.dropout, {}, row.data), abs_max,
                     residual_out);
        stream_fence();
    });
}

template <bool kDropout, typename T>
void backward(const SandwichBackward& a, int threads) {
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const T* dresidual_out = static_cast<const T*>(a.dresidual_out);
    const T* dnormed = static_cast<const T*>(a.dnormed);
    const T* branch = static_cast<const T*>(a.branch);
    const T* residual_out = static_cast<const T*>(a.residual_out);
    T* dbranch = static_cast<T*>(a.dbranch);
    T* dresidual = static_cast<T*>(a.dresidual);
    const Scratch post_weight(C), pre_weight(C);
    widen_parameter(a.post_weight, C, 1.0f, post_weight.data);
    widen_parameter(a.pre_weight, C, 1.0f, pre_weight.data);
    const int64_t grain = backward_chunk(rows), chunks = (rows + grain - 1) / grain;
    const Scratch partials(chunks * 4 * C);
    const bool streaming = streams(dbranch, rows, C) && streams(dresidual, rows, C);
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch hat(C), scaled(C);
        float* partial = partials.data + begin / grain * 4 * C;
        std::memset(partial, 0, 4 * C * sizeof(float));
        for (int64_t r = begin; r < end; ++r) {
            const int64_t at = r * C;
            // Through LN_pre.
            GradientMeans means = {};
            const Statistics pre = {a.stats[2 * rows + r], a.stats[3 * rows + r]};
            if (dnormed != nullptr)
                means = gradient_means(
                    C, [&](int64_t j, auto tag) { return load(residual_out + at + j, tag); },
                    [&](int64_t j, auto tag) {
                        if (dresidual_out != nullptr) prefetch(dresidual_out + at + j);
                        prefetch(branch + at + j);
                        return load(dnormed + at + j, tag);
                    },
                    pre, pre_weight.data, partial + 2 * C, partial + 3 * C, hat.data, scaled.data);
            // d residual_out in all is d residual too, and goes on through LN_post and dropout.
            const GradientMeans pre_means = means;
            const auto residual_gradient = [&](int64_t j, auto tag) {
                VecF d = VecF{};
                if (dnormed != nullptr)
                    d = pre.rstd * (load(scaled.data + j, tag) - pre_means.plain -
                                    load(hat.data + j, tag) * pre_means.hat);
                if (dresidual_out != nullptr) d += load(dresidual_out + at + j, tag);
                put(dresidual + at + j, d, tag, streaming);
                if (dnormed != nullptr) prefetch(dnormed + at + C + j);
                return d;
            };
            const Statistics post = {a.stats[r], a.stats[rows + r]};
            const RowWords words = kDropout ? row_words(a.dropout, r) : RowWords{};
            means = gradient_means(
                C,
                [&](int64_t j, auto tag) {
                    const VecF v = load(branch + at + j, tag);
                    return kDropout ? drop(v, a.dropout, words, j) : v;
                },
                residual_gradient, post, post_weight.data, partial, partial + C, hat.data, scaled.data);
            for_each_vector(C, [&](int64_t j, auto tag) {
                const VecF g = load(scaled.data + j, tag) - means.plain - load(hat.data + j, tag) * means.hat;
                const VecF d = post.rstd * g;
                put(dbranch + at + j, kDropout ? drop(d, a.dropout, words, j) : d, tag, streaming);
                prefetch(residual_out + at + C + j);
            });
        }
        stream_fence();
    });
    reduce_partials(partials.data, chunks, 4, 0, C, a.dpost.weight);
    reduce_partials(partials.data, chunks, 4, 1, C, a.dpost.bias);
    reduce_partials(partials.data, chunks, 4, 2, C, a.dpre.weight);
    reduce_partials(partials.data, chunks, 4, 3, C, a.dpre.bias);
}

}  // namespace

void sandwich_layer_norm_fwd_cpu(const SandwichForward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype, !args.dropout.drops() ? forward<false, scalar_t>(args, threads)
                                                                   : forward<true, scalar_t>(args, threads));
}

void sandwich_layer_norm_bwd_cpu(const SandwichBackward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype, !args.dropout.drops() ? backward<false, scalar_t>(args, threads)
                                                                   : backward<true, scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
