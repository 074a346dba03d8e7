// SPDX-License-Identifier: Apache-2.0
#include "common/norm_launch.h"
#include "sandwich_layer_norm/sandwich_layer_norm_kernels.cuh"

namespace cogview {

void sandwich_layer_norm_fwd_cuda(const SandwichForward& a, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool vector = norm_vector(a.C, {a.branch, a.residual, a.residual_out, a.normed});
    const int threads = norm_threads(a.C);
    COGVIEW_DISPATCH_DTYPE(a.dtype, {
        using T = CudaType<scalar_t>::type;
        if (a.pb_relax == PbRelax::kTensor) {
            norm_peaks_kernel<T><<<unsigned(a.blocks), threads, 0, s>>>(
                static_cast<const T*>(a.branch), a.peaks, a.rows, int(a.C), a.dropout, vector);
            check_launch("norm_peaks_kernel");
            sandwich_layer_norm_fwd_kernel<T, true, false><<<unsigned(a.blocks), threads, 0, s>>>(a, vector);
            check_launch("sandwich_layer_norm_fwd_kernel");
            sandwich_layer_norm_fwd_kernel<T, false, true><<<unsigned(a.blocks), threads, 0, s>>>(a, vector);
        } else {
            sandwich_layer_norm_fwd_kernel<T, true, true><<<unsigned(a.blocks), threads, 0, s>>>(a, vector);
        }
    });
    check_launch("sandwich_layer_norm_fwd_kernel");
}

void sandwich_layer_norm_bwd_cuda(const SandwichBackward& a, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool vector =
        norm_vector(a.C, {a.dresidual_out, a.dnormed, a.branch, a.residual_out, a.dbranch, a.dresidual});
    COGVIEW_DISPATCH_DTYPE(a.dtype, {
        using T = CudaType<scalar_t>::type;
        sandwich_layer_norm_bwd_kernel<T><<<unsigned(a.blocks), norm_threads(a.C), 0, s>>>(a, vector);
    });
    check_launch("sandwich_layer_norm_bwd_kernel");
    const ParameterGradients to = {{a.dpost_weight, a.dpost_bias, a.dpre_weight, a.dpre_bias}};
    launch_reduce_partials(a.partials, a.blocks, 4, a.C, to, s);
}

}  // namespace cogview
