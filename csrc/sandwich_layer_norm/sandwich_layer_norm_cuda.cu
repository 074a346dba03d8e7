// SPDX-License-Identifier: Apache-2.0
#include "norms/launch.h"
#include "sandwich_layer_norm/sandwich_layer_norm_kernels.cuh"

namespace cogview {

void sandwich_layer_norm_fwd_cuda(const SandwichForward& a, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool vector = norm_vector(a.shape.C, {a.branch, a.residual, a.residual_out, a.normed});
    const int threads = norm_threads(a.shape.C);
    COGVIEW_DISPATCH_DTYPE(a.shape.dtype, {
        using T = CudaType<scalar_t>::type;
        if (a.options.pb_relax == PbRelax::kTensor) {
            norm_abs_max_kernel<T><<<unsigned(a.workspace.blocks), threads, 0, s>>>(
                static_cast<const T*>(a.branch), a.workspace.data, a.shape.rows, int(a.shape.C), a.dropout,
                vector);
            check_launch("norm_abs_max_kernel");
            sandwich_layer_norm_fwd_kernel<T, true, false>
                <<<unsigned(a.workspace.blocks), threads, 0, s>>>(a, vector);
            check_launch("sandwich_layer_norm_fwd_kernel");
            sandwich_layer_norm_fwd_kernel<T, false, true>
                <<<unsigned(a.workspace.blocks), threads, 0, s>>>(a, vector);
        } else {
            sandwich_layer_norm_fwd_kernel<T, true, true>
                <<<unsigned(a.workspace.blocks), threads, 0, s>>>(a, vector);
        }
    });
    check_launch("sandwich_layer_norm_fwd_kernel");
}

void sandwich_layer_norm_bwd_cuda(const SandwichBackward& a, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool vector = norm_vector(
        a.shape.C, {a.dresidual_out, a.dnormed, a.branch, a.residual_out, a.dbranch, a.dresidual});
    COGVIEW_DISPATCH_DTYPE(a.shape.dtype, {
        using T = CudaType<scalar_t>::type;
        sandwich_layer_norm_bwd_kernel<T>
            <<<unsigned(a.workspace.blocks), norm_threads(a.shape.C), 0, s>>>(a, vector);
    });
    check_launch("sandwich_layer_norm_bwd_kernel");
    const ParameterGradients to = {{a.dpost.weight, a.dpost.bias, a.dpre.weight, a.dpre.bias}};
    launch_reduce_partials(a.workspace, 4, a.shape.C, to, s);
}

}  // namespace cogview
