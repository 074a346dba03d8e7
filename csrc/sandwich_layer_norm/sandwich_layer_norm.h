// SPDX-License-Identifier: Apache-2.0
// residual_out = residual + LN_post(dropout(branch)); normed = LN_pre(residual_out), over rows of C, each LN
// with rstd = 1 / sqrt(variance + eps * (peak / 8)^2).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/norm.h"

namespace cogview {

struct SandwichForward {
    const void* branch;  // [rows, C], contiguous, as the next three
    const void* residual;
    void* residual_out;
    void* normed;
    Parameter post_weight, post_bias, pre_weight, pre_bias;
    float* stats;    // [4, rows]: mean and rstd of the post norm, then of the pre norm
    float* peaks;    // CUDA with kTensor: workspace of 2 * blocks floats
    int64_t blocks;  // CUDA: persistent blocks
    int64_t rows, C;
    float eps;
    PbRelax pb_relax;
    Dropout dropout;
    DType dtype;
};

struct SandwichBackward {
    const void* dresidual_out;  // either may be nullptr: zeros
    const void* dnormed;
    const void* branch;
    const void* residual_out;
    void* dbranch;
    void* dresidual;
    Parameter post_weight, pre_weight;
    Parameter dpost_weight, dpost_bias, dpre_weight, dpre_bias;
    const float* stats;
    float* partials;  // CUDA: workspace of blocks * 4 * C floats
    int64_t blocks;
    int64_t rows, C;
    Dropout dropout;
    DType dtype;
};

COGVIEW_DECLARE_PER_ISA(void sandwich_layer_norm_fwd_cpu(const SandwichForward& args, int threads);
                        void sandwich_layer_norm_bwd_cpu(const SandwichBackward& args, int threads);)

#if COGVIEW_HAS_CUDA
// `stream` is a cudaStream_t. Rows of up to _norm.GPU_MAX_WIDTH. Throws std::runtime_error with the kernel's
// name.
void sandwich_layer_norm_fwd_cuda(const SandwichForward& args, void* stream);
void sandwich_layer_norm_bwd_cuda(const SandwichBackward& args, void* stream);
#endif

}  // namespace cogview
