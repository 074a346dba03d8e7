// SPDX-License-Identifier: Apache-2.0
// residual_out = residual + norm_post(dropout(branch)); normed = norm_pre(residual_out), over rows of C: the
// arguments of sandwich_layer_norm and sandwich_rms_norm. single.h has the norms.
//
// The trunk is residual and residual_out. Where it is float32, branch may have 16 bits, and normed then has
// the dtype of either; gradients have those of what they belong to. Elsewhere there is one dtype.
#pragma once

#include <cstdint>

#include "norms/norm.h"

namespace cogview {

struct SandwichForward {
    const void* branch;
    const void* residual;
    void* residual_out;
    void* normed;  // RMSNorm: nullptr where there is no norm_pre
    Affine post, pre;
    // [2 * stats_of(kind), rows]: those of the post norm, then of the pre norm; CPU: nullptr where no
    // backward pass follows
    float* stats;
    RowShape shape;  // of the trunk
    DType branch_dtype, normed_dtype;
    NormOptions options;
    Dropout dropout;
    BlockWorkspace workspace;  // with kTensor 2 floats a block: maxima of branch, then of residual_out
};

struct SandwichBackward {
    const void* dresidual_out;  // either may be nullptr: zeros
    const void* dnormed;
    const void* branch;
    const void* residual_out;  // nullptr where there is no norm_pre
    void* dbranch;
    void* dresidual;  // nullptr where there is no norm_pre: it is dresidual_out
    Parameter post_weight, pre_weight;
    float weight_offset;
    Affine dpost, dpre;
    const float* stats;
    RowShape shape;  // of the trunk
    DType branch_dtype, normed_dtype;
    Dropout dropout;
    BlockWorkspace workspace;  // 2 * parameters_of(kind) * C floats a block: sums over its rows
};

namespace {

// Calls f(b, t, n), whose arguments have the types of branch, trunk and normed; their values mean nothing.
template <typename Arguments, typename F>
void with_row_types(const Arguments& a, const F& f) {
    if (a.shape.dtype != DType::kFloat32)
        COGVIEW_DISPATCH_DTYPE(a.shape.dtype, f(scalar_t{}, scalar_t{}, scalar_t{}))
    else if (a.normed_dtype != DType::kFloat32)
        COGVIEW_DISPATCH_DTYPE(a.branch_dtype, f(scalar_t{}, float{}, scalar_t{}))
    else
        COGVIEW_DISPATCH_DTYPE(a.branch_dtype, f(scalar_t{}, float{}, float{}))
}

}  // namespace
}  // namespace cogview
