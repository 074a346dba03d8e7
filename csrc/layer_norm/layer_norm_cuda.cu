// SPDX-License-Identifier: Apache-2.0
#include "layer_norm/layer_norm_kernels.cuh"
#include "norms/launch.h"

namespace cogview {

void layer_norm_fwd_cuda(const LayerNormForward& a, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool vector = norm_vector(a.shape.C, {a.x, a.y});
    const int threads = norm_threads(a.shape.C);
    COGVIEW_DISPATCH_DTYPE(a.shape.dtype, {
        using T = CudaType<scalar_t>::type;
        if (a.options.pb_relax == PbRelax::kTensor) {
            norm_abs_max_kernel<T><<<unsigned(a.workspace.blocks), threads, 0, s>>>(
                static_cast<const T*>(a.x), a.workspace.data, a.shape.rows, int(a.shape.C), Dropout{},
                vector);
            check_launch("norm_abs_max_kernel");
        }
        layer_norm_fwd_kernel<T><<<unsigned(a.workspace.blocks), threads, 0, s>>>(a, vector);
    });
    check_launch("layer_norm_fwd_kernel");
}

void layer_norm_bwd_cuda(const LayerNormBackward& a, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool vector = norm_vector(a.shape.C, {a.x, a.dy, a.dx});
    COGVIEW_DISPATCH_DTYPE(a.shape.dtype, {
        using T = CudaType<scalar_t>::type;
        layer_norm_bwd_kernel<T><<<unsigned(a.workspace.blocks), norm_threads(a.shape.C), 0, s>>>(a, vector);
    });
    check_launch("layer_norm_bwd_kernel");
    launch_reduce_partials(a.workspace, 2, a.shape.C, {{a.gradients.weight, a.gradients.bias}}, s);
}

}  // namespace cogview
