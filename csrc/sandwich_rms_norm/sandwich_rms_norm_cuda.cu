// SPDX-License-Identifier: Apache-2.0
#include "norms/launch.h"
#include "sandwich_rms_norm/sandwich_rms_norm.h"

namespace cogview {

void sandwich_rms_norm_fwd_cuda(const SandwichForward& args, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    if (args.shape.dtype == DType::kFloat32) {
        COGVIEW_DISPATCH_DTYPE(args.branch_dtype, {
            launch_sandwich_forward<NormKind::kRms, CudaType<scalar_t>::type, float>(args, s);
        });
    } else {
        COGVIEW_DISPATCH_DTYPE(args.shape.dtype, {
            using T = CudaType<scalar_t>::type;
            launch_sandwich_forward<NormKind::kRms, T, T>(args, s);
        });
    }
}

void sandwich_rms_norm_bwd_cuda(const SandwichBackward& args, void* stream) {
    const cudaStream_t s = static_cast<cudaStream_t>(stream);
    if (args.shape.dtype == DType::kFloat32) {
        COGVIEW_DISPATCH_DTYPE(args.branch_dtype, {
            launch_sandwich_backward<NormKind::kRms, CudaType<scalar_t>::type, float>(args, s);
        });
    } else {
        COGVIEW_DISPATCH_DTYPE(args.shape.dtype, {
            using T = CudaType<scalar_t>::type;
            launch_sandwich_backward<NormKind::kRms, T, T>(args, s);
        });
    }
}

}  // namespace cogview
