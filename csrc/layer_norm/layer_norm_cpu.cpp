// SPDX-License-Identifier: Apache-2.0
// One row at a time, in a float buffer that stays in the L1 cache. Bytes: forward reads and writes a row
// (reads it twice under pb_relax="tensor"); backward reads two and writes one.
#include "layer_norm/layer_norm.h"
#include "norms/row.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <typename T>
void forward(const LayerNormForward& a, int threads) {
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const PbRelax pb_relax = a.options.pb_relax;
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    const Dropout none = {};
    const bool by_row = pb_relax == PbRelax::kRow;
    const float fixed =
        pb_relax == PbRelax::kTensor ? tensor_abs_max<false>(x, rows, C, none, threads) : 8.0f;
    const bool streaming = streams(y, rows, C);
    const Scratch weight(C), bias(C);
    widen_parameter(a.affine.weight, C, 1.0f, weight.data);
    widen_parameter(a.affine.bias, C, 0.0f, bias.data);
    parallel_for(rows, forward_chunk(C), threads, [&](int64_t begin, int64_t end) {
        const Scratch row(C);
        for (int64_t r = begin; r < end; ++r) {
            const Moments moments = widen_row<false>(x + r * C, C, none, {}, row.data);
            Statistics saved;
            const Statistics s = statistics(row.data, C, moments, by_row ? moments.abs_max : fixed,
                                            a.options.eps, x + (r + 1) * C, &saved);
            normalise_row(row.data, s, weight.data, bias.data, C, y + r * C, streaming);
            save_statistics(saved, a.stats, rows, r);
        }
        stream_fence();
    });
}

template <typename T>
void backward(const LayerNormBackward& a, int threads) {
    const int64_t rows = a.shape.rows, C = a.shape.C;
    const T* dy = static_cast<const T*>(a.dy);
    const T* x = static_cast<const T*>(a.x);
    T* dx = static_cast<T*>(a.dx);
    const bool streaming = streams(dx, rows, C);
    const Scratch weight(C);
    widen_parameter(a.weight, C, 1.0f, weight.data);
    const int64_t grain = backward_chunk(rows), chunks = (rows + grain - 1) / grain;
    const Scratch partials(chunks * 2 * C);
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        const Scratch hat(C), scaled(C);
        float* dweight = partials.data + begin / grain * 2 * C;
        float* dbias = dweight + C;
        std::memset(dweight, 0, 2 * C * sizeof(float));
        for (int64_t r = begin; r < end; ++r) {
            const Statistics s = {a.stats[r], a.stats[rows + r]};
            const GradientMeans means = gradient_means(
                C, [&](int64_t j, auto tag) { return load(x + r * C + j, tag); },
                [&](int64_t j, auto tag) { return load(dy + r * C + j, tag); }, s, weight.data, dweight,
                dbias, hat.data, scaled.data);
            for_each_vector(C, [&](int64_t j, auto tag) {
                const VecF g = load(scaled.data + j, tag) - means.plain - load(hat.data + j, tag) * means.hat;
                put(dx + r * C + j, s.rstd * g, tag, streaming);
                prefetch(x + (r + 1) * C + j);
                prefetch(dy + (r + 1) * C + j);
            });
        }
        stream_fence();
    });
    reduce_partials(partials.data, chunks, 2, 0, C, a.gradients.weight);
    reduce_partials(partials.data, chunks, 2, 1, C, a.gradients.bias);
}

}  // namespace

void layer_norm_fwd_cpu(const LayerNormForward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype, forward<scalar_t>(args, threads));
}

void layer_norm_bwd_cpu(const LayerNormBackward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype, backward<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
