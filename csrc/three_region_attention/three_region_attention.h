// SPDX-License-Identifier: Apache-2.0
// Attention over a block window and gathered pivot keys, under one softmax.
//
// Letters: B batch, H query heads, Hkv key heads, T sequence length, D head size, P pivots a sample. Which
// keys a query sees is told in common/regions.h. logit = scale q_i k_j, + layout.pivot_bias where j is a far
// key.
#pragma once

#include <cstdint>

#include "common/dropout.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/regions.h"
#include "common/strided.h"

namespace cogview {

struct AttentionShape {
    int B, H, Hkv, T, D;
};

// What both directions take.
struct Attention {
    AttentionShape shape;
    Layout layout;
    Dropout dropout;
    float scale;
    DType dtype;
    StridedInput q, k, v;
    int32_t* sorted_pivots;  // CUDA: [B, P], written here: ascending, padded with T
};

struct AttentionForward {
    Attention common;
    StridedOutput out;
    float* lse;  // [B, H, T]: log of the softmax's denominator
};

struct AttentionBackward {
    Attention common;
    StridedInput out, dout;
    const float* lse;
    const float* dlse;  // [B, H, T], nullptr for none
    // A nullptr stands for a gradient that nobody wants; on CUDA, dk and dv are wanted both or neither.
    StridedOutput dq, dk, dv;
    // CUDA, written here:
    float* delta;   // [B, H, T]: sum over D of out * dout, less dlse
    float* dk_far;  // [B, Hkv, P, D]: gradients of the sorted pivots as far keys
    float* dv_far;
};

// ---- CPU

// The pivots of every sample in ascending order, checked: std::invalid_argument for one outside [-1, T) or
// given twice.
struct SortedPivots {
    int32_t* positions;      // [B, P]; the first counts[b] of a sample are set
    int32_t* rank_of_pivot;  // [B, T]: where a position stands in `positions`, -1 for no pivot
    int32_t* counts;         // [B]
    SortedPivots(const AttentionShape& shape, const Layout& layout);
    ~SortedPivots();
    SortedPivots(const SortedPivots&) = delete;
    SortedPivots& operator=(const SortedPivots&) = delete;
};

COGVIEW_DECLARE_PER_ISA_WITH_BF16(void three_region_attention_fwd_cpu(const AttentionForward& args,
                                                                      const SortedPivots& sorted_pivots,
                                                                      int threads);
                                  void three_region_attention_bwd_cpu(const AttentionBackward& args,
                                                                      const SortedPivots& sorted_pivots,
                                                                      int threads);)

// ---- CUDA

// Tensors are fp16, and their rows begin at multiples of 16 bytes; D is 32, 64, 80, 96 or 128. `stream` is a
// cudaStream_t. Throws std::runtime_error with the kernel's name on a CUDA error.
void three_region_attention_fwd_cuda(const AttentionForward& args, void* stream);
void three_region_attention_bwd_cuda(const AttentionBackward& args, void* stream);

// ---- CUDA for Hopper alone, compute capability 9.0 (sm_90a); beside the Triton kernels, whose index of the
// pivots it takes and for whose backward it leaves the peaks of rows

// Causal, without starts and dropout; D is 64, in 16 bits; rows begin at multiples of 16 bytes.
struct AttentionForwardSm90 {
    AttentionShape shape;
    DType dtype;
    StridedInput q, k, v;
    StridedOutput out;
    float* lse;            // [B, H, T]
    int32_t* residuals;    // [B, index_stride], see index_triton.py; then [B, H, 2, T], see forward_triton.py
    int padded_pivots;     // of a sample's index
    int64_t index_stride;  // 0 where no key is far
    int block_size, window_blocks;
    float factor, bias;  // of log2
};

// Throws std::runtime_error with the kernel's name on a CUDA error.
void three_region_attention_fwd_sm90(const AttentionForwardSm90& args, void* stream);

}  // namespace cogview
