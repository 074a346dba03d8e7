// SPDX-License-Identifier: Apache-2.0
// A block per row, the row in registers: see norms/block.cuh. Bytes: forward reads and writes a row
// (reads it twice under pb_relax="tensor"), backward reads two and writes one.
#pragma once

#include "norms/block.cuh"
#include "norms/single.h"

namespace cogview {
namespace {

template <NormKind kKind, typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_kernel(NormForward a, bool vector) {
    const int C = int(a.shape.C);
    const T* x = static_cast<const T*>(a.x);
    T* y = static_cast<T*>(a.y);
    BlockReduction reduction;
    const Row weight = load_weight<kKind>(a.affine.weight, C, a.options.weight_offset);
    const Row bias = kKind == NormKind::kLayer ? load_parameter(a.affine.bias, C, 0.0f) : Row{};
    const float abs_max =
        a.options.pb_relax == PbRelax::kTensor ? load_abs_max(a.workspace.data, gridDim.x, reduction) : 8.0f;
    for (int64_t r = blockIdx.x; r < a.shape.rows; r += gridDim.x) {
        Row row = load_row(x + r * C, C, vector);
        const Statistics s = normalise<kKind>(row, C, a.options.pb_relax, abs_max, a.options.eps, reduction);
        row = affine<kKind, T>(row, weight, bias, a.options.round_before_weight);
        store_row(y + r * C, row, C, vector);
        if (threadIdx.x == 0) save_statistics<kKind>(a.stats, 0, a.shape.rows, r, s);
    }
}

template <NormKind kKind, typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_bwd_kernel(NormBackward a, bool vector) {
    const int C = int(a.shape.C);
    const T* x = static_cast<const T*>(a.x);
    const T* dy = static_cast<const T*>(a.dy);
    T* dx = static_cast<T*>(a.dx);
    BlockReduction reduction;
    const Row weight = load_weight<kKind>(a.weight, C, a.weight_offset);
    Row dweight = {}, dbias = {};
    for (int64_t r = blockIdx.x; r < a.shape.rows; r += gridDim.x) {
        Row d = load_row(dy + r * C, C, vector);
        const Row row = load_row(x + r * C, C, vector);
        gradient_through<kKind>(d, row, read_statistics<kKind>(a.stats, 0, a.shape.rows, r), weight, C,
                                dweight, dbias, reduction);
        store_row(dx + r * C, d, C, vector);
    }
    constexpr int kSlots = parameters_of(kKind);
    float* partial = a.workspace.data + int64_t(blockIdx.x) * kSlots * C;
    store_partial(partial, dweight, C);
    if (kKind == NormKind::kLayer) store_partial(partial + C, dbias, C);
}

}  // namespace
}  // namespace cogview
