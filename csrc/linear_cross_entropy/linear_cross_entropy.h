// SPDX-License-Identifier: Apache-2.0
// The softmax part of linear cross-entropy, on logits held with a row per id and a column per token; the
// matrix products around it are PyTorch's. Letters: V (or v) ids, n tokens.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogview {

// peak = max over ids, total = sum over ids of exp(logit - peak).
struct LinearCrossEntropyReduce {
    const void* logits;  // [V, n], rows `stride` elements apart
    int64_t stride, V, n;
    float* peak;   // [n]
    float* total;  // [n]
    DType dtype;
};

// In place of the logits: coefficient * (exp(logit - peak) / total - onehot(target)); 0 where coefficient is
// 0.
struct LinearCrossEntropyGradient {
    void* logits;  // [v, n], rows `stride` elements apart
    int64_t stride, v, n;
    int64_t first;             // the id of the first row
    const int64_t* target;     // [n]
    const float* coefficient;  // [n]
    const float* peak;         // [n]
    const float* total;        // [n]
    DType dtype;
};

COGVIEW_DECLARE_PER_ISA(void linear_cross_entropy_reduce_cpu(const LinearCrossEntropyReduce& args,
                                                             int threads);
                        void linear_cross_entropy_gradient_cpu(const LinearCrossEntropyGradient& args,
                                                               int threads);)

}  // namespace cogview
