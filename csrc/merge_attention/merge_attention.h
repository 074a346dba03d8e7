// SPDX-License-Identifier: Apache-2.0
// The joint softmax of several attentions of the same queries to different keys.
//
//   w_i = exp(lse_i - lse),  lse = log(sum_i exp(lse_i)),  out = sum_i w_i out_i
//
// Letters: B batch, H heads, T queries, D head size.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided.h"

namespace cogview {

constexpr int kMostMerged = 4;

// What both directions take. An lse of -inf is that of a query which saw no key.
struct MergeAttention {
    int64_t B, H, T, D, count;  // count: how many are merged, 1 to kMostMerged
    DType dtype;
    StridedInput outputs[kMostMerged];  // [B, H, T, D]
    const float* lses[kMostMerged];     // [B, H, T]
};

struct MergeAttentionForward {
    MergeAttention common;
    StridedOutput out;
    float* lse;
};

struct MergeAttentionBackward {
    MergeAttention common;
    StridedInput dout;
    const float* dlse;  // nullptr for none
    StridedOutput doutputs[kMostMerged];
    float* dlses[kMostMerged];
};

COGVIEW_DECLARE_PER_ISA(void merge_attention_fwd_cpu(const MergeAttentionForward& args, int threads);
                        void merge_attention_bwd_cpu(const MergeAttentionBackward& args, int threads);)

}  // namespace cogview
