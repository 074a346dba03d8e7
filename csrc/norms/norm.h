// SPDX-License-Identifier: Apache-2.0
// What the interfaces of the norms share.
#pragma once

#include "common/dropout.h"
#include "common/dtype.h"

namespace cogview {

// LayerNorm subtracts the mean and has a bias, RMSNorm has neither. All kernels are templates of the kind.
enum class NormKind { kLayer, kRms };

// Numbers that a norm keeps of a row: mean and rstd, or rstd alone.
COGVIEW_HOST_DEVICE constexpr int stats_of(NormKind kind) {
    return kind == NormKind::kLayer ? 2 : 1;
}
// Parameters that may have a gradient: weight and bias, or the weight alone.
COGVIEW_HOST_DEVICE constexpr int parameters_of(NormKind kind) {
    return kind == NormKind::kLayer ? 2 : 1;
}

// Whose absolute maximum turns eps into eps * (abs_max / 8)^2: no one's, the row's, the whole tensor's.
enum class PbRelax : int { kNone = 0, kRow = 1, kTensor = 2 };

// CUDA: the widest row that a block holds in registers; GPU_MAX_WIDTH in cogview_kernels/_norms/rows.py.
constexpr int64_t kMaxWidth = 4096;

struct NormOptions {
    float eps;
    PbRelax pb_relax;
    // Of RMSNorm alone: what is added to weights, and whether a normalised row is rounded to its dtype before
    // it is multiplied by them.
    float weight_offset;
    bool round_before_weight;
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

// Of a row. RMSNorm has no mean.
struct Statistics {
    float mean, rstd;
};

// CUDA: the number of persistent blocks, and room for what they leave to each other. Unused on the CPU.
struct BlockWorkspace {
    float* data;
    int64_t blocks;
};

namespace {

// Of row r in the first (0) or second (1) norm of [norms * stats_of(kind), rows] statistics.
template <NormKind kKind>
COGVIEW_HOST_DEVICE void save_statistics(float* stats, int norm, int64_t rows, int64_t r, Statistics s) {
    if (kKind == NormKind::kLayer) {
        stats[2 * norm * rows + r] = s.mean;
        stats[(2 * norm + 1) * rows + r] = s.rstd;
    } else {
        stats[norm * rows + r] = s.rstd;
    }
}
template <NormKind kKind>
COGVIEW_HOST_DEVICE Statistics read_statistics(const float* stats, int norm, int64_t rows, int64_t r) {
    if (kKind == NormKind::kLayer) return {stats[2 * norm * rows + r], stats[(2 * norm + 1) * rows + r]};
    return {0.0f, stats[norm * rows + r]};
}

}  // namespace
}  // namespace cogview
