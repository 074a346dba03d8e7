// SPDX-License-Identifier: Apache-2.0
// y = (x - mean) * rstd * weight + bias over rows of C, rstd = 1 / sqrt(variance + eps * (peak / 8)^2).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/norm.h"

namespace cogview {

struct LayerNormForward {
    const void* x;  // [rows, C], contiguous, as y
    void* y;
    Parameter weight, bias;
    float* stats;    // [2, rows]: mean, rstd
    float* peaks;    // CUDA with kTensor: workspace of `blocks` floats
    int64_t blocks;  // CUDA: persistent blocks
    int64_t rows, C;
    float eps;
    PbRelax pb_relax;
    DType dtype;
};

// With xhat = (x - mean) * rstd and g = dy * weight:
// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), dweight = sum(dy * xhat), dbias = sum(dy) over rows.
struct LayerNormBackward {
    const void* dy;
    const void* x;
    void* dx;
    Parameter weight, dweight, dbias;
    const float* stats;
    float* partials;  // CUDA: workspace of blocks * 2 * C floats
    int64_t blocks;
    int64_t rows, C;
    DType dtype;
};

COGVIEW_DECLARE_PER_ISA(void layer_norm_fwd_cpu(const LayerNormForward& args, int threads);
                        void layer_norm_bwd_cpu(const LayerNormBackward& args, int threads);)

#if COGVIEW_HAS_CUDA
// `stream` is a cudaStream_t. Rows of up to _norm.GPU_MAX_WIDTH. Throws std::runtime_error with the kernel's
// name.
void layer_norm_fwd_cuda(const LayerNormForward& args, void* stream);
void layer_norm_bwd_cuda(const LayerNormBackward& args, void* stream);
#endif

}  // namespace cogview
