// SPDX-License-Identifier: Apache-2.0
// probs = softmax(alpha * (scale * scores - max(scale * scores))) over rows; masked keys give 0, a row with
// no key gives zeros. Letters: [A, B, T, N] with rows of N.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogview {

struct SoftmaxForward {
    const void* scores;   // [A, B, T, N], last stride 1
    const uint8_t* mask;  // [A, B, T, N] of bool, nullptr for none, any strides (0 where broadcast)
    void* probs;          // [A, B, T, N], contiguous
    int64_t A, B, T, N;
    int64_t scores_stride[3];
    int64_t mask_stride[4];
    float alpha, scale;
    bool causal;  // row t sees key n iff n <= t
    DType dtype;
};

// dscores = alpha * scale * probs * (dprobs - sum(dprobs * probs)); all three contiguous [rows, N].
struct SoftmaxBackward {
    const void* dprobs;
    const void* probs;
    void* dscores;
    int64_t rows, N;
    float factor;  // alpha * scale
    DType dtype;
};

COGVIEW_DECLARE_PER_ISA(void stable_softmax_fwd_cpu(const SoftmaxForward& args, int threads);
                        void stable_softmax_bwd_cpu(const SoftmaxBackward& args, int threads);)

#if COGVIEW_HAS_CUDA
// `stream` is a cudaStream_t. Throws std::runtime_error with the kernel's name on a CUDA error.
void stable_softmax_fwd_cuda(const SoftmaxForward& args, void* stream);
void stable_softmax_bwd_cuda(const SoftmaxBackward& args, void* stream);
#endif

}  // namespace cogview
