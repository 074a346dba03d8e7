// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "common/cuda_check.h"
#include "stable_softmax/stable_softmax_kernels.cuh"

namespace cogview {

namespace {

// A warp for short rows, up to 1,024 threads for long ones.
int block_size(int64_t N) {
    return int(std::min<int64_t>(1024, std::max<int64_t>(32, (N / 4 + 31) / 32 * 32)));
}

}  // namespace

void stable_softmax_fwd_cuda(const SoftmaxForward& args, void* stream) {
    const int64_t rows = args.A * args.B * args.T;
    if (rows == 0 || args.N == 0) return;
    const char* name = "stable_softmax_fwd_kernel";
    const unsigned grid = grid_of(name, rows);
    COGVIEW_DISPATCH_DTYPE(args.dtype, {
        using T = CudaType<scalar_t>::type;
        stable_softmax_fwd_kernel<T>
            <<<grid, block_size(args.N), 0, static_cast<cudaStream_t>(stream)>>>(args);
    });
    check_launch(name);
}

void stable_softmax_bwd_cuda(const SoftmaxBackward& args, void* stream) {
    if (args.rows == 0 || args.N == 0) return;
    const char* name = "stable_softmax_bwd_kernel";
    const unsigned grid = grid_of(name, args.rows);
    COGVIEW_DISPATCH_DTYPE(args.dtype, {
        using T = CudaType<scalar_t>::type;
        stable_softmax_bwd_kernel<T>
            <<<grid, block_size(args.N), 0, static_cast<cudaStream_t>(stream)>>>(args);
    });
    check_launch(name);
}

}  // namespace cogview
