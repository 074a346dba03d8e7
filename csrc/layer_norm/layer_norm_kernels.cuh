// SPDX-License-Identifier: Apache-2.0
// A block per row, the row in registers: see norms/block.cuh. Bytes: forward reads and writes a row
// (reads it twice under pb_relax="tensor"), backward reads two and writes one.
#pragma once

#include "layer_norm/layer_norm.h"
#include "norms/block.cuh"

namespace cogview {
namespace {

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_fwd_kernel(LayerNormForward a, bool vector) {
    const int C = int(a.shape.C);
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    BlockReduction reduction;
    const Row weight = load_parameter(a.affine.weight, C, 1.0f),
              bias = load_parameter(a.affine.bias, C, 0.0f);
    const float abs_max =
        a.options.pb_relax == PbRelax::kTensor ? load_abs_max(a.workspace.data, gridDim.x, reduction) : 8.0f;
    for (int64_t r = blockIdx.x; r < a.shape.rows; r += gridDim.x) {
        Row row = load_row(x + r * C, C, vector);
        const Statistics s = normalise(row, C, a.options.pb_relax, abs_max, a.options.eps, reduction);
        store_row(y + r * C, affine(row, weight, bias), C, vector);
        if (threadIdx.x == 0) {
            a.stats[r] = s.mean;
            a.stats[a.shape.rows + r] = s.rstd;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_bwd_kernel(LayerNormBackward a, bool vector) {
    const int C = int(a.shape.C);
    const T* x = static_cast<const T*>(a.x);
    const T* dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    BlockReduction reduction;
    const Row weight = load_parameter(a.weight, C, 1.0f);
    Row dweight = {}, dbias = {};
    for (int64_t r = blockIdx.x; r < a.shape.rows; r += gridDim.x) {
        Row d = load_row(dy + r * C, C, vector);
        const Row row = load_row(x + r * C, C, vector);
        gradient_through(d, row, {a.stats[r], a.stats[a.shape.rows + r]}, weight, C, dweight, dbias,
                         reduction);
        store_row(dx + r * C, d, C, vector);
    }
    store_partial(a.workspace.data + int64_t(blockIdx.x) * 2 * C, dweight, C);
    store_partial(a.workspace.data + (int64_t(blockIdx.x) * 2 + 1) * C, dbias, C);
}

}  // namespace
}  // namespace cogview
