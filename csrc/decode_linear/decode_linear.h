// SPDX-License-Identifier: Apache-2.0
// A linear layer of decoding: y = activation(x W^T + bias) of few rows x.
//
// Letters: N rows, K inputs, O outputs. Bytes: W once, O * K elements; FLOPs 2 N O K. So few rows take the
// time of reading W, and the row that is read serves all of them.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogview {

struct DecodeLinear {
    const void* x;       // [N, K], contiguous
    const void* weight;  // [O, K], rows contiguous and `weight_stride` elements apart
    const void* bias;    // [O], or nullptr
    void* y;             // [N, O], contiguous
    int64_t N, K, O, weight_stride;
    bool gelu;    // tanh-approximated, else no activation
    DType dtype;  // of all four
};

COGVIEW_DECLARE_PER_ISA_WITH_BF16(void decode_linear_cpu(const DecodeLinear& args, int threads);)

}  // namespace cogview
