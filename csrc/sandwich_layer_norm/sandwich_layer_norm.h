// SPDX-License-Identifier: Apache-2.0
// residual_out = residual + LN_post(dropout(branch)); normed = LN_pre(residual_out), over rows of C, each LN
// with rstd = 1 / sqrt(variance + eps * (abs_max / 8)^2).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "norms/norm.h"

namespace cogview {

struct SandwichForward {
    const void* branch;
    const void* residual;
    void* residual_out;
    void* normed;
    Affine post, pre;
    // [4, rows]: mean and rstd of the post norm, then of the pre norm; CPU: nullptr where no backward pass follows
    float* stats;
    RowShape shape;
    NormOptions options;
    Dropout dropout;
    BlockWorkspace workspace;  // with kTensor 2 floats a block: maxima of branch, then of residual_out
};

struct SandwichBackward {
    const void* dresidual_out;  // either may be nullptr: zeros
    const void* dnormed;
    const void* branch;
    const void* residual_out;
    void* dbranch;
    void* dresidual;
    Parameter post_weight, pre_weight;
    Affine dpost, dpre;
    const float* stats;
    RowShape shape;
    Dropout dropout;
    BlockWorkspace workspace;  // 4 * C floats a block: sums over its rows
};

COGVIEW_DECLARE_PER_ISA(void sandwich_layer_norm_fwd_cpu(const SandwichForward& args, int threads);
                        void sandwich_layer_norm_bwd_cpu(const SandwichBackward& args, int threads);)

#if COGVIEW_HAS_CUDA
// `stream` is a cudaStream_t. Rows of up to kMaxWidth. Throws std::runtime_error with the kernel's name.
void sandwich_layer_norm_fwd_cuda(const SandwichForward& args, void* stream);
void sandwich_layer_norm_bwd_cuda(const SandwichBackward& args, void* stream);
#endif

}  // namespace cogview
