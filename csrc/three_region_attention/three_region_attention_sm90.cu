// SPDX-License-Identifier: Apache-2.0
// Launch of the kernel in forward_sm90.cuh. It is compiled for sm_90a alone (setup.py): the instructions
// exist on no other chip.
#include <cuda_runtime.h>

#include <stdexcept>

#include "common/cuda_check.h"
#include "three_region_attention/forward_sm90.cuh"

namespace cogview {
namespace {

template <typename T>
void launch(const AttentionForwardSm90& args, void* stream) {
    const char* name = "three_region_attention_fwd_sm90_kernel";
    const int64_t tiles = (int64_t(args.shape.T) + Sm90Shape::kQueries - 1) / Sm90Shape::kQueries;
    const int64_t blocks = tiles * args.shape.H * args.shape.B;
    if (blocks == 0) return;
    const unsigned grid = grid_of(name, blocks);
    // Past 48 KB shared memory is had on request alone, and on each device anew.
    cudaFuncSetAttribute(three_region_attention_fwd_sm90_kernel<T>,
                         cudaFuncAttributeMaxDynamicSharedMemorySize, Sm90Shape::kShared);
    check_launch(name);
    three_region_attention_fwd_sm90_kernel<T>
        <<<grid, Sm90Shape::kThreads, Sm90Shape::kShared, static_cast<cudaStream_t>(stream)>>>(args);
    check_launch(name);
}

}  // namespace

void three_region_attention_fwd_sm90(const AttentionForwardSm90& args, void* stream) {
    if (args.shape.D != 64 || args.dtype == DType::kFloat32)
        throw std::invalid_argument("three_region_attention_fwd_sm90: heads of 64 in 16 bits");
    args.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(args, stream) : launch<__half>(args, stream);
}

}  // namespace cogview
