// SPDX-License-Identifier: Apache-2.0
// Merges attentions row by row: bound by memory, which is read and written once in each direction.
//
// Bytes, forward: count + 1 rows of D elements a query. Backward: dout and count rows read, count rows
// written.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "merge_attention/merge_attention.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int64_t kGrain = 64;  // queries

// Calls body(b, h, t, row) for every query; `row` is its place in lse.
template <typename Body>
void for_each_query(const MergeAttention& a, int threads, const Body& body) {
    parallel_for(a.B * a.H * a.T, kGrain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) body(row / a.T / a.H, row / a.T % a.H, row % a.T, row);
    });
}

// Fills `weights`, exp(lse_i - lse); gives lse. Where no attention saw a key, the weights are 0.
float weights_of(const MergeAttention& a, int64_t row, float* weights) {
    float top = -kInf, total = 0.0f;
    for (int i = 0; i < a.count; ++i) top = std::max(top, a.lses[i][row]);
    for (int i = 0; i < a.count; ++i) {
        weights[i] = a.lses[i][row] == -kInf ? 0.0f : std::exp(a.lses[i][row] - top);
        total += weights[i];
    }
    for (int i = 0; i < a.count; ++i) weights[i] = weights[i] == 0.0f ? 0.0f : weights[i] / total;
    return top + std::log(total);
}

template <typename T>
void forward(const MergeAttentionForward& args, int threads) {
    const MergeAttention& a = args.common;
    for_each_query(a, threads, [&](int64_t b, int64_t h, int64_t t, int64_t row) {
        float weights[kMostMerged];
        const T* outputs[kMostMerged];
        for (int i = 0; i < a.count; ++i) outputs[i] = a.outputs[i].row<T>(b, h, t);
        args.lse[row] = weights_of(a, row, weights);
        T* out = args.out.row<T>(b, h, t);
        for_each_vector(a.D, [&](int64_t d, auto tag) {
            VecF sum = VecF{};
            for (int i = 0; i < a.count; ++i) sum += load(outputs[i] + d, tag) * weights[i];
            store(out + d, sum, tag);
        });
    });
}

template <typename T>
void backward(const MergeAttentionBackward& args, int threads) {
    const MergeAttention& a = args.common;
    for_each_query(a, threads, [&](int64_t b, int64_t h, int64_t t, int64_t row) {
        const T* dout = args.dout.row<T>(b, h, t);
        float weights[kMostMerged], dots[kMostMerged], mean = 0.0f;
        weights_of(a, row, weights);
        for (int i = 0; i < a.count; ++i) {
            dots[i] = dot(a.outputs[i].row<T>(b, h, t), dout, a.D);
            mean += weights[i] * dots[i];
        }
        const float dlse = args.dlse == nullptr ? 0.0f : args.dlse[row];
        for (int i = 0; i < a.count; ++i) {
            args.dlses[i][row] = weights[i] * (dots[i] - mean + dlse);
            T* doutput = args.doutputs[i].row<T>(b, h, t);
            for_each_vector(
                a.D, [&](int64_t d, auto tag) { store(doutput + d, load(dout + d, tag) * weights[i], tag); });
        }
    });
}

}  // namespace

void merge_attention_fwd_cpu(const MergeAttentionForward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.common.dtype, forward<scalar_t>(args, threads));
}

void merge_attention_bwd_cpu(const MergeAttentionBackward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.common.dtype, backward<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
