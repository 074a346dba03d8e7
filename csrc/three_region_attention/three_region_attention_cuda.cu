// SPDX-License-Identifier: Apache-2.0
// Launches; the kernels are in sort.cuh, forward.cuh and backward.cuh.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/cuda_check.h"
#include "three_region_attention/backward.cuh"
#include "three_region_attention/forward.cuh"
#include "three_region_attention/sort.cuh"
#include "three_region_attention/three_region_attention.h"

namespace cogview {
namespace {

template <typename Args>
void launch(const char* name, void (*kernel)(Args), int64_t blocks, int threads, int shared, const Args& args,
            void* stream) {
    const unsigned grid = grid_of(name, blocks);
    // Past 48 KB shared memory is had on request alone.
    if (shared > 48 * 1024) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    check_launch(name);
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(args);
    check_launch(name);
}

int64_t tiles(int64_t length, int64_t tile) {
    return (length + tile - 1) / tile;
}

// Sorts the pivots, unless every window reaches the first position: then there are no far keys.
void prepare(Attention& a, void* stream) {
    Layout& layout = a.layout;
    if (int64_t(layout.block_size) * layout.window_blocks >= a.shape.T) layout.P = 0;
    if (layout.P == 0) return;
    launch("three_region_attention_sort_kernel", three_region_attention_sort_kernel,
           tiles(layout.P, kSortThreads) * a.shape.B, kSortThreads, 0, a, stream);
}

template <int D, bool DROPOUT, bool CAUSAL>
void forward(const AttentionForward& args, void* stream) {
    using Shape = ForwardShape<D>;
    const AttentionShape& shape = args.common.shape;
    launch("three_region_attention_fwd_kernel", three_region_attention_fwd_kernel<D, DROPOUT, CAUSAL>,
           tiles(shape.T, Shape::kQueries) * shape.H * shape.B, Shape::kThreads, Shape::kShared, args,
           stream);
}

template <int D, bool DROPOUT, bool CAUSAL>
void backward(const AttentionBackward& args, void* stream) {
    const AttentionShape& shape = args.common.shape;
    launch("three_region_attention_bwd_delta_kernel", three_region_attention_bwd_delta_kernel<D>,
           tiles(int64_t(shape.B) * shape.H * shape.T, kBackwardWarps), kBackwardThreads, 0, args, stream);
    if (args.dq.data != nullptr)
        launch("three_region_attention_bwd_dq_kernel",
               three_region_attention_bwd_dq_kernel<D, DROPOUT, CAUSAL>,
               tiles(shape.T, kBackwardRows) * shape.H * shape.B, kBackwardThreads,
               QueryGradientShape<D, CAUSAL>::kShared, args, stream);
    // These make both or none.
    if (args.dk.data == nullptr || args.dv.data == nullptr) return;
    if (args.common.layout.P > 0)
        launch("three_region_attention_bwd_dkv_kernel (pivots)",
               three_region_attention_bwd_dkv_kernel<D, DROPOUT, true, CAUSAL>,
               tiles(args.common.layout.P, kBackwardRows) * shape.Hkv * shape.B, kBackwardThreads,
               KeyGradientShape<D, CAUSAL>::kShared, args, stream);
    launch("three_region_attention_bwd_dkv_kernel (window)",
           three_region_attention_bwd_dkv_kernel<D, DROPOUT, false, CAUSAL>,
           tiles(shape.T, kBackwardRows) * shape.Hkv * shape.B, kBackwardThreads,
           KeyGradientShape<D, CAUSAL>::kShared, args, stream);
}

template <int D, bool DROPOUT, bool CAUSAL, typename Args>
void run(const Args& args, void* stream) {
    if constexpr (std::is_same_v<Args, AttentionForward>)
        forward<D, DROPOUT, CAUSAL>(args, stream);
    else
        backward<D, DROPOUT, CAUSAL>(args, stream);
}

template <int D, typename Args>
void dispatch_flags(const Args& args, void* stream) {
    const bool dropout = args.common.dropout.drops();
    if (args.common.layout.causal)
        dropout ? run<D, true, true>(args, stream) : run<D, false, true>(args, stream);
    else
        dropout ? run<D, true, false>(args, stream) : run<D, false, false>(args, stream);
}

template <typename Args>
void dispatch(Args args, void* stream) {
    const AttentionShape& shape = args.common.shape;
    if (shape.B == 0 || shape.H == 0 || shape.T == 0) return;
    prepare(args.common, stream);
    switch (shape.D) {
        case 32:
            return dispatch_flags<32>(args, stream);
        case 64:
            return dispatch_flags<64>(args, stream);
        case 80:
            return dispatch_flags<80>(args, stream);
        case 96:
            return dispatch_flags<96>(args, stream);
        case 128:
            return dispatch_flags<128>(args, stream);
    }
    throw std::invalid_argument("three_region_attention: no CUDA kernel for a head size of " +
                                std::to_string(shape.D));
}

}  // namespace

void three_region_attention_fwd_cuda(const AttentionForward& args, void* stream) {
    dispatch(args, stream);
}

void three_region_attention_bwd_cuda(const AttentionBackward& args, void* stream) {
    dispatch(args, stream);
}

}  // namespace cogview
