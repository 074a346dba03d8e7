// SPDX-License-Identifier: Apache-2.0
// The softmax part of linear cross-entropy; the matrix products around it are PyTorch's.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogview {

// A row for each of v ids, `stride` elements apart, and in it a column for each of n tokens.
struct Logits {
    void* data;
    int64_t stride, v, n;
    DType dtype;
};

// logit_max = max over ids, total = sum over ids of exp(logit - logit_max).
struct LinearCrossEntropyReduce {
    Logits logits;
    float* logit_max;  // [n]
    float* total;      // [n]
};

// In place of the logits: coefficient * (exp(logit - logit_max) / total - onehot(target)); 0 where
// coefficient is 0.
struct LinearCrossEntropyGradient {
    Logits logits;
    int64_t first;             // the id of the first row
    const int64_t* target;     // [n]
    const float* coefficient;  // [n]
    const float* logit_max;    // [n]
    const float* total;        // [n]
};

COGVIEW_DECLARE_PER_ISA(void linear_cross_entropy_reduce_cpu(const LinearCrossEntropyReduce& args,
                                                             int threads);
                        void linear_cross_entropy_gradient_cpu(const LinearCrossEntropyGradient& args,
                                                               int threads);)

}  // namespace cogview
