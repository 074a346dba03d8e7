// SPDX-License-Identifier: Apache-2.0
// One norm over rows of C: the arguments of layer_norm and rms_norm.
//
// LayerNorm: y = (x - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps * (abs_max / 8)^2).
// RMSNorm:   y = x * rstd * (offset + weight), rstd = 1 / sqrt(mean of squares + eps * (abs_max / 8)^2).
#pragma once

#include <cstdint>

#include "norms/norm.h"

namespace cogview {

struct NormForward {
    const void* x;
    void* y;
    Affine affine;
    float* stats;  // [stats_of(kind), rows]; CPU: nullptr where no backward pass follows
    RowShape shape;
    NormOptions options;
    BlockWorkspace workspace;  // with kTensor a float a block: maxima
};

// With xhat = (x - mean) * rstd and g = dy * weight:
// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), dweight = sum(dy * xhat), dbias = sum(dy) over rows.
// RMSNorm: the same without mean and mean(g).
struct NormBackward {
    const void* dy;
    const void* x;
    void* dx;
    Parameter weight;
    float weight_offset;
    Affine gradients;
    const float* stats;
    RowShape shape;
    BlockWorkspace workspace;  // parameters_of(kind) * C floats a block: sums over its rows
};

}  // namespace cogview
