// SPDX-License-Identifier: Apache-2.0
// The softmax part of linear cross-entropy. The matrix products around it are PyTorch's, but for those that
// product_cpu.cpp makes faster.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogview {

// A row for each of v ids, `stride` elements apart, and in it a column for each of n tokens: products alone.
// What the softmax sees is softcap * tanh((product + bias) / softcap).
struct Logits {
    void* data;
    int64_t stride, v, n;
    int64_t first;      // the id of the first row
    const float* bias;  // [v] or null
    float softcap;      // 0: none
    DType dtype;
};

// Of each token, [n], over the ids before these logits and those of these logits: the largest logit, the sum
// of exp(logit - logit_max), and the logit of the target, -inf where that is no id. Where `first` is 0,
// nothing is known before.
struct LinearCrossEntropyReduce {
    Logits logits;
    const int64_t* target;
    float* logit_max;
    float* total;
    float* picked;
    float* sum;          // of logit - logit_max; or null
    int64_t* predicted;  // the first id of the largest logit; or null
};

// In place of the logits: coefficient * (p * (1 + 2 z_loss lse) - target_share * onehot(target) - id_share),
// where p = exp(logit - logit_max) / total, times the derivative of the cap; 0 where coefficient is 0.
struct LinearCrossEntropyGradient {
    Logits logits;
    float z_loss, id_share, target_share;
    const int64_t* target;     // [n]
    const float* coefficient;  // [n]
    const float* logit_max;    // [n]
    const float* total;        // [n]
    float* dbias;              // [v], added to; or null
};

// out[M, N] (+)= a b, rounded once, in float32 or bfloat16. `a_m` is the distance of two rows of a, and so
// on. Rows of out are contiguous, and so are rows or columns of a and of b; b has rows where a has columns.
//
// With `low` (bfloat16, rows of a), out is no result but the upper half of a sum in float32, and low, [M, N],
// the byte below it, until the `last` product rounds the sum to out: so a sum of many products is rounded
// to bfloat16 once, and to 24 bits each time.
struct LinearCrossEntropyProduct {
    int64_t M, N, K;
    const void* a;
    int64_t a_m, a_k;
    const void* b;
    int64_t b_k, b_n;
    void* out;
    int64_t out_m;
    bool add;
    uint8_t* low;
    bool last;
    DType dtype;
};

COGVIEW_DECLARE_PER_ISA_WITH_BF16(
    void linear_cross_entropy_reduce_cpu(const LinearCrossEntropyReduce& args, int threads);
    void linear_cross_entropy_gradient_cpu(const LinearCrossEntropyGradient& args, int threads);
    // bfloat16 is for avx512bf16 and amx, and on amx for columns of a alone.
    void linear_cross_entropy_product_cpu(const LinearCrossEntropyProduct& args, int threads);)

}  // namespace cogview
