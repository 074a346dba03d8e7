// SPDX-License-Identifier: Apache-2.0
// y = (x - mean) * rstd * weight + bias over rows of C, rstd = 1 / sqrt(variance + eps * (abs_max / 8)^2).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "norms/norm.h"

namespace cogview {

struct LayerNormForward {
    const void* x;
    void* y;
    Affine affine;
    float* stats;  // [2, rows]: mean, rstd; CPU: nullptr where no backward pass follows
    RowShape shape;
    NormOptions options;
    BlockWorkspace workspace;  // with kTensor a float a block: maxima
};

// With xhat = (x - mean) * rstd and g = dy * weight:
// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), dweight = sum(dy * xhat), dbias = sum(dy) over rows.
struct LayerNormBackward {
    const void* dy;
    const void* x;
    void* dx;
    Parameter weight;
    Affine gradients;
    const float* stats;
    RowShape shape;
    BlockWorkspace workspace;  // 2 * C floats a block: sums over its rows
};

COGVIEW_DECLARE_PER_ISA(void layer_norm_fwd_cpu(const LayerNormForward& args, int threads);
                        void layer_norm_bwd_cpu(const LayerNormBackward& args, int threads);)

#if COGVIEW_HAS_CUDA
// `stream` is a cudaStream_t. Rows of up to kMaxWidth. Throws std::runtime_error with the kernel's name.
void layer_norm_fwd_cuda(const LayerNormForward& args, void* stream);
void layer_norm_bwd_cuda(const LayerNormBackward& args, void* stream);
#endif

}  // namespace cogview
