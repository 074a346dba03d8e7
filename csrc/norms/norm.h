// SPDX-License-Identifier: Apache-2.0
// What the interfaces of the norms share.
#pragma once

#include "common/dropout.h"
#include "common/dtype.h"

namespace cogview {

// Whose absolute maximum turns eps into eps * (abs_max / 8)^2: no one's, the row's, the whole tensor's.
enum class PbRelax : int { kNone = 0, kRow = 1, kTensor = 2 };

// CUDA: the widest row that a block holds in registers; GPU_MAX_WIDTH in cogview_kernels/_norms/rows.py.
constexpr int64_t kMaxWidth = 4096;

struct NormOptions {
    float eps;
    PbRelax pb_relax;
};

// Of every tensor of activations: contiguous [rows, C] of `dtype`.
struct RowShape {
    int64_t rows, C;
    DType dtype;
};

// A weight or bias of C elements, or its gradient; `data` is nullptr where there is none.
struct Parameter {
    void* data;
    DType dtype;
};

// Weight and bias of one norm, or their gradients.
struct Affine {
    Parameter weight, bias;
};

// CUDA: the number of persistent blocks, and room for what they leave to each other. Unused on the CPU.
struct BlockWorkspace {
    float* data;
    int64_t blocks;
};

}  // namespace cogview
