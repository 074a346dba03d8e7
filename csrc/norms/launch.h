// SPDX-License-Identifier: Apache-2.0
// Launchers of the norms, for either kind.
#pragma once

#include <initializer_list>

#include "common/cuda_check.h"
#include "norms/sandwich.cuh"
#include "norms/single.cuh"

namespace cogview {
namespace {

inline int norm_threads(int64_t C) {
    return int((C + kColumns - 1) / kColumns + 31) / 32 * 32;
}

// Whether rows can be read 16 bytes at a time.
inline bool norm_vector(int64_t C, std::initializer_list<const void*> tensors) {
    bool aligned = C % kColumns == 0;
    for (const void* x : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    return aligned;
}

// Adds up what the blocks of a backward pass left: `slots` rows of C sums each.
inline void launch_reduce_partials(const BlockWorkspace& partials, int slots, int64_t C,
                                   const ParameterGradients& to, cudaStream_t stream) {
    bool any = false;
    for (const Parameter& p : to.of) any = any || p.data != nullptr;
    if (!any) return;
    norm_reduce_partials_kernel<<<dim3(unsigned((C + 127) / 128), slots), 128, 0, stream>>>(
        partials.data, partials.blocks, slots, int(C), to);
    check_launch("norm_reduce_partials_kernel");
}

template <typename T>
inline void launch_abs_max(const void* x, float* abs_maxima, const RowShape& shape, int64_t blocks,
                           const Dropout& dropout, bool vector, cudaStream_t stream) {
    norm_abs_max_kernel<T><<<unsigned(blocks), norm_threads(shape.C), 0, stream>>>(
        static_cast<const T*>(x), abs_maxima, shape.rows, int(shape.C), dropout, vector);
    check_launch("norm_abs_max_kernel");
}

// ---- one norm

template <NormKind kKind>
void launch_norm_forward(const NormForward& a, cudaStream_t stream) {
    const bool vector = norm_vector(a.shape.C, {a.x, a.y});
    const int64_t blocks = a.workspace.blocks;
    COGVIEW_DISPATCH_DTYPE(a.shape.dtype, {
        using T = CudaType<scalar_t>::type;
        if (a.options.pb_relax == PbRelax::kTensor)
            launch_abs_max<T>(a.x, a.workspace.data, a.shape, blocks, Dropout{}, vector, stream);
        norm_fwd_kernel<kKind, T><<<unsigned(blocks), norm_threads(a.shape.C), 0, stream>>>(a, vector);
    });
    check_launch("norm_fwd_kernel");
}

template <NormKind kKind>
void launch_norm_backward(const NormBackward& a, cudaStream_t stream) {
    const bool vector = norm_vector(a.shape.C, {a.x, a.dy, a.dx});
    COGVIEW_DISPATCH_DTYPE(a.shape.dtype, {
        using T = CudaType<scalar_t>::type;
        norm_bwd_kernel<kKind, T>
            <<<unsigned(a.workspace.blocks), norm_threads(a.shape.C), 0, stream>>>(a, vector);
    });
    check_launch("norm_bwd_kernel");
    launch_reduce_partials(a.workspace, parameters_of(kKind), a.shape.C,
                           {{a.gradients.weight, a.gradients.bias}}, stream);
}

// ---- the sandwich; B: the dtype of branch, T: that of the trunk, N: that of normed

template <NormKind kKind, typename B, typename T, typename N>
void launch_sandwich_forward(const SandwichForward& a, cudaStream_t stream) {
    const bool vector = norm_vector(a.shape.C, {a.branch, a.residual, a.residual_out, a.normed});
    const unsigned blocks = unsigned(a.workspace.blocks);
    const int threads = norm_threads(a.shape.C);
    const bool by_tensor = a.options.pb_relax == PbRelax::kTensor, has_pre = a.normed != nullptr;
    if (by_tensor) launch_abs_max<B>(a.branch, a.workspace.data, a.shape, blocks, a.dropout, vector, stream);
    // Of two kernels the first writes no normed, and the second reads no branch.
    if (by_tensor || !has_pre) {
        sandwich_fwd_kernel<kKind, B, T, T, true, false><<<blocks, threads, 0, stream>>>(a, vector);
        check_launch("sandwich_fwd_kernel");
        if (has_pre)
            sandwich_fwd_kernel<kKind, T, T, N, false, true><<<blocks, threads, 0, stream>>>(a, vector);
    } else {
        sandwich_fwd_kernel<kKind, B, T, N, true, true><<<blocks, threads, 0, stream>>>(a, vector);
    }
    check_launch("sandwich_fwd_kernel");
}

template <NormKind kKind, typename B, typename T, typename N>
void launch_sandwich_backward(const SandwichBackward& a, cudaStream_t stream) {
    const bool vector = norm_vector(
        a.shape.C, {a.dresidual_out, a.dnormed, a.branch, a.residual_out, a.dbranch, a.dresidual});
    sandwich_bwd_kernel<kKind, B, T, N>
        <<<unsigned(a.workspace.blocks), norm_threads(a.shape.C), 0, stream>>>(a, vector);
    check_launch("sandwich_bwd_kernel");
    const ParameterGradients to =
        kKind == NormKind::kLayer
            ? ParameterGradients{{a.dpost.weight, a.dpost.bias, a.dpre.weight, a.dpre.bias}}
            : ParameterGradients{{a.dpost.weight, a.dpre.weight}};
    launch_reduce_partials(a.workspace, 2 * parameters_of(kKind), a.shape.C, to, stream);
}

template <typename Scalar>
using CudaTypeOf = typename CudaType<Scalar>::type;

template <NormKind kKind>
void launch_sandwich_forward(const SandwichForward& a, cudaStream_t stream) {
    with_row_types(a, [&](auto b, auto t, auto n) {
        launch_sandwich_forward<kKind, CudaTypeOf<decltype(b)>, CudaTypeOf<decltype(t)>,
                                CudaTypeOf<decltype(n)>>(a, stream);
    });
}

template <NormKind kKind>
void launch_sandwich_backward(const SandwichBackward& a, cudaStream_t stream) {
    with_row_types(a, [&](auto b, auto t, auto n) {
        launch_sandwich_backward<kKind, CudaTypeOf<decltype(b)>, CudaTypeOf<decltype(t)>,
                                 CudaTypeOf<decltype(n)>>(a, stream);
    });
}

}  // namespace
}  // namespace cogview
