// SPDX-License-Identifier: Apache-2.0
// Causal attention over a block window and gathered pivot keys, under one softmax.
//
// Letters: B batch, H query heads, Hkv key heads, T sequence length, D head size, P pivots a sample, w block
// size, W window blocks. With b(i) = i / w, query i sees key j <= i iff b(j) > b(i) - W (window) or j is a
// pivot with b(j) <= b(i) - W (far). logit = scale q_i k_j, + bias where far.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogview {

struct AttentionShape {
    int64_t B, H, Hkv, T, D, P, w, W;
    float bias, scale, dropout_p;
    uint32_t drop_below;  // an element whose random word is below is dropped; 0: no dropout
    uint64_t seed;
    DType dtype;
    const int64_t* pivots;  // [B, P], contiguous; -1 pads
};

// [B, heads, T, D], last stride 1, the others in elements.
struct AttentionInput {
    const void* data;
    int64_t stride[3];
};
struct AttentionOutput {
    void* data;
    int64_t stride[3];
};

struct AttentionForward {
    AttentionShape shape;
    AttentionInput q, k, v;
    AttentionOutput out;
    float* lse;  // [B, H, T]: log of the softmax's denominator
};

struct AttentionBackward {
    AttentionShape shape;
    AttentionInput q, k, v, out, dout;
    const float* lse;
    const float* dlse;  // [B, H, T], nullptr for none
    AttentionOutput dq, dk, dv;
};

// The pivots of every sample in ascending order, checked: std::invalid_argument for one outside [-1, T) or
// given twice.
struct SortedPivots {
    int32_t* positions;  // [B, P]; the first counts[b] of a sample are set
    int32_t* slots;      // [B, T]: where a position stands in `positions`, -1 for no pivot
    int32_t* counts;     // [B]
    explicit SortedPivots(const AttentionShape& shape);
    ~SortedPivots();
    SortedPivots(const SortedPivots&) = delete;
    SortedPivots& operator=(const SortedPivots&) = delete;
};

COGVIEW_DECLARE_PER_ISA_WITH_BF16(void three_region_attention_fwd_cpu(const AttentionForward& args,
                                                                      const SortedPivots& pivots,
                                                                      int threads);
                                  void three_region_attention_bwd_cpu(const AttentionBackward& args,
                                                                      const SortedPivots& pivots,
                                                                      int threads);)

}  // namespace cogview
