// SPDX-License-Identifier: Apache-2.0
// A block per row, the row in registers: see norms/block.cuh. Bytes: forward reads branch and residual
// and writes residual_out and normed, once each; under pb_relax="tensor" branch is read once more for its
// maximum, and residual_out again in a second pass. Backward reads four tensors and writes two. Without a
// norm after the addition both read two and write one.
#pragma once

#include "norms/block.cuh"
#include "norms/sandwich.h"

namespace cogview {
namespace {

// kPost: residual_out = residual + norm_post(dropout(branch)). kPre: normed = norm_pre(residual_out). Both at
// once, or one after the other under pb_relax="tensor", with the maxima of residual_out going from the first
// to the second through the latter half of the workspace. B: the dtype of branch, T: that of the trunk,
// N: that of normed.
template <NormKind kKind, typename B, typename T, typename N, bool kPost, bool kPre>
__global__ void __launch_bounds__(kMaxThreads) sandwich_fwd_kernel(SandwichForward a, bool vector) {
    const int C = int(a.shape.C);
    const B* branch = static_cast<const B*>(a.branch);
    const T* residual = static_cast<const T*>(a.residual);
    T* residual_out = static_cast<T*>(a.residual_out);
    N* normed = static_cast<N*>(a.normed);
    const bool round = a.options.round_before_weight;
    BlockReduction reduction;
    Row post_weight = {}, post_bias = {}, pre_weight = {}, pre_bias = {};
    if (kPost) {
        post_weight = load_weight<kKind>(a.post.weight, C, a.options.weight_offset);
        if (kKind == NormKind::kLayer) post_bias = load_parameter(a.post.bias, C, 0.0f);
    }
    if (kPre) {
        pre_weight = load_weight<kKind>(a.pre.weight, C, a.options.weight_offset);
        if (kKind == NormKind::kLayer) pre_bias = load_parameter(a.pre.bias, C, 0.0f);
    }
    float* out_abs_maxima = a.workspace.data + gridDim.x;
    float abs_max = 8.0f, out_abs_max = 0.0f;
    if (a.options.pb_relax == PbRelax::kTensor)
        abs_max = load_abs_max(kPost ? a.workspace.data : out_abs_maxima, gridDim.x, reduction);
    for (int64_t r = blockIdx.x; r < a.shape.rows; r += gridDim.x) {
        Row out;
        if (kPost) {
            Row x = load_row(branch + r * C, C, vector);
            out = load_row(residual + r * C, C, vector);
            drop(x, a.dropout, r);
            const Statistics s =
                normalise<kKind>(x, C, a.options.pb_relax, abs_max, a.options.eps, reduction);
            x = affine<kKind, B>(x, post_weight, post_bias, round);
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
                out.of[i] = first_column() + i < C ? out.of[i] + x.of[i] : 0.0f;
            out = rounded<T>(out);
            store_row(residual_out + r * C, out, C, vector);
            out_abs_max = fmaxf(out_abs_max, abs_max_of(out));
            if (threadIdx.x == 0) save_statistics<kKind>(a.stats, 0, a.shape.rows, r, s);
        } else {
            out = load_row(residual_out + r * C, C, vector);
        }
        if (kPre) {
            const Statistics s =
                normalise<kKind>(out, C, a.options.pb_relax, abs_max, a.options.eps, reduction);
            store_row(normed + r * C, affine<kKind, T>(out, pre_weight, pre_bias, round), C, vector);
            if (threadIdx.x == 0) save_statistics<kKind>(a.stats, 1, a.shape.rows, r, s);
        }
    }
    if (!kPre && a.options.pb_relax == PbRelax::kTensor) {
        out_abs_max = reduction.max_and_sum(out_abs_max, 0.0f).x;
        if (threadIdx.x == 0) out_abs_maxima[blockIdx.x] = out_abs_max;
    }
}

template <NormKind kKind, typename B, typename T, typename N>
__global__ void __launch_bounds__(kMaxThreads) sandwich_bwd_kernel(SandwichBackward a, bool vector) {
    const int C = int(a.shape.C);
    const T* dresidual_out = static_cast<const T*>(a.dresidual_out);
    const N* dnormed = static_cast<const N*>(a.dnormed);
    const B* branch = static_cast<const B*>(a.branch);
    const T* residual_out = static_cast<const T*>(a.residual_out);
    BlockReduction reduction;
    const Row post_weight = load_weight<kKind>(a.post_weight, C, a.weight_offset);
    const Row pre_weight = load_weight<kKind>(a.pre_weight, C, a.weight_offset);
    Row dpost_weight = {}, dpost_bias = {}, dpre_weight = {}, dpre_bias = {};
    for (int64_t r = blockIdx.x; r < a.shape.rows; r += gridDim.x) {
        // Through the pre norm: d residual_out in all, which is d residual too.
        Row trunk = {};
        if (dnormed != nullptr) {
            trunk = load_row(dnormed + r * C, C, vector);
            const Row out = load_row(residual_out + r * C, C, vector);
            const Statistics s = read_statistics<kKind>(a.stats, 1, a.shape.rows, r);
            gradient_through<kKind>(trunk, out, s, pre_weight, C, dpre_weight, dpre_bias, reduction);
        }
        if (dresidual_out != nullptr) {
            const Row direct = load_row(dresidual_out + r * C, C, vector);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) trunk.of[i] += direct.of[i];
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            if (first_column() + i >= C) trunk.of[i] = 0.0f;
        if (kKind == NormKind::kLayer || a.dresidual != nullptr)
            store_row(static_cast<T*>(a.dresidual) + r * C, trunk, C, vector);
        // Through the post norm and dropout.
        Row x = load_row(branch + r * C, C, vector);
        drop(x, a.dropout, r);
        gradient_through<kKind>(trunk, x, read_statistics<kKind>(a.stats, 0, a.shape.rows, r), post_weight, C,
                                dpost_weight, dpost_bias, reduction);
        drop(trunk, a.dropout, r);
        store_row(static_cast<B*>(a.dbranch) + r * C, trunk, C, vector);
    }
    constexpr int kNorm = parameters_of(kKind);
    float* partial = a.workspace.data + int64_t(blockIdx.x) * 2 * kNorm * C;
    store_partial(partial, dpost_weight, C);
    store_partial(partial + kNorm * C, dpre_weight, C);
    if (kKind == NormKind::kLayer) {
        store_partial(partial + C, dpost_bias, C);
        store_partial(partial + 3 * C, dpre_bias, C);
    }
}

}  // namespace
}  // namespace cogview
