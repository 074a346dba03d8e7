// SPDX-License-Identifier: Apache-2.0
// One row at a time, in a float buffer that stays in the L1 cache. Bytes: forward reads and writes a row
// (reads it twice under pb_relax="tensor"); backward reads two and writes one.
#include "common/norm_row.h"
#include "layer_norm/layer_norm.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <typename T>
void forward(const LayerNormForward& a, int threads) {
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    const Dropout none = {};
    const float fixed =
        a.pb_relax == PbRelax::kTensor ? tensor_peak<false>(x, a.rows, a.C, none, threads) : 8.0f;
    const bool streaming = streams(y, a.rows, a.C);
    const Scratch weight(a.C), bias(a.C);
    widen_parameter(a.weight, a.C, 1.0f, weight.data);
    widen_parameter(a.bias, a.C, 0.0f, bias.data);
    parallel_for(a.rows, forward_chunk(a.C), threads, [&](int64_t begin, int64_t end) {
        const Scratch row(a.C);
        for (int64_t r = begin; r < end; ++r) {
            const Moments moments = widen_row<false>(x + r * a.C, a.C, none, {}, row.data);
            Statistics saved;
            const Statistics s =
                statistics(row.data, a.C, moments, a.pb_relax == PbRelax::kRow ? moments.peak : fixed, a.eps,
                           x + (r + 1) * a.C, &saved);
            normalise_row(row.data, s, weight.data, bias.data, a.C, y + r * a.C, streaming);
            a.stats[r] = saved.mean;
            a.stats[a.rows + r] = saved.rstd;
        }
        stream_fence();
    });
}

template <typename T>
void backward(const LayerNormBackward& a, int threads) {
    const T* dy = static_cast<const T*>(a.dy);
    const T* x = static_cast<const T*>(a.x);
    T* dx = static_cast<T*>(a.dx);
    const bool streaming = streams(dx, a.rows, a.C);
    const Scratch weight(a.C);
    widen_parameter(a.weight, a.C, 1.0f, weight.data);
    const int64_t grain = backward_chunk(a.rows), chunks = (a.rows + grain - 1) / grain;
    const Scratch partials(chunks * 2 * a.C);
    parallel_for(a.rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch hat(a.C), scaled(a.C);
        float* dweight = partials.data + begin / grain * 2 * a.C;
        float* dbias = dweight + a.C;
        std::memset(dweight, 0, 2 * a.C * sizeof(float));
        for (int64_t r = begin; r < end; ++r) {
            const Statistics s = {a.stats[r], a.stats[a.rows + r]};
            const GradientMeans means = gradient_means(
                a.C, [&](int64_t j, auto tag) { return load(x + r * a.C + j, tag); },
                [&](int64_t j, auto tag) { return load(dy + r * a.C + j, tag); }, s, weight.data, dweight,
                dbias, hat.data, scaled.data);
            for_each_vector(a.C, [&](int64_t j, auto tag) {
                const VecF g = load(scaled.data + j, tag) - means.plain - load(hat.data + j, tag) * means.hat;
                put(dx + r * a.C + j, s.rstd * g, tag, streaming);
                prefetch(x + (r + 1) * a.C + j);
                prefetch(dy + (r + 1) * a.C + j);
            });
        }
        stream_fence();
    });
    reduce_partials(partials.data, chunks, 2, 0, a.C, a.dweight);
    reduce_partials(partials.data, chunks, 2, 1, a.C, a.dbias);
}

}  // namespace

void layer_norm_fwd_cpu(const LayerNormForward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, forward<scalar_t>(args, threads));
}

void layer_norm_bwd_cpu(const LayerNormBackward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, backward<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
