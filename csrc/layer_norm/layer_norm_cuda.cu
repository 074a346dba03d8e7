// SPDX-License-Identifier: Apache-2.0
#include "common/norm_launch.h"
#include "layer_norm/layer_norm_kernels.cuh"

namespace cogview {

void layer_norm_fwd_cuda(const LayerNormForward& a, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool vector = norm_vector(a.C, {a.x, a.y});
    const int threads = norm_threads(a.C);
    COGVIEW_DISPATCH_DTYPE(a.dtype, {
        using T = CudaType<scalar_t>::type;
        if (a.pb_relax == PbRelax::kTensor) {
            norm_peaks_kernel<T><<<unsigned(a.blocks), threads, 0, s>>>(static_cast<const T*>(a.x), a.peaks,
                                                                        a.rows, int(a.C), Dropout{}, vector);
            check_launch("norm_peaks_kernel");
        }
        layer_norm_fwd_kernel<T><<<unsigned(a.blocks), threads, 0, s>>>(a, vector);
    });
    check_launch("layer_norm_fwd_kernel");
}

void layer_norm_bwd_cuda(const LayerNormBackward& a, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    const bool vector = norm_vector(a.C, {a.x, a.dy, a.dx});
    COGVIEW_DISPATCH_DTYPE(a.dtype, {
        using T = CudaType<scalar_t>::type;
        layer_norm_bwd_kernel<T><<<unsigned(a.blocks), norm_threads(a.C), 0, s>>>(a, vector);
    });
    check_launch("layer_norm_bwd_kernel");
    launch_reduce_partials(a.partials, a.blocks, 2, a.C, {{a.dweight, a.dbias}}, s);
}

}  // namespace cogview
