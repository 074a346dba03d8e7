// SPDX-License-Identifier: Apache-2.0
// Arguments of the CUDA kernels; letters as in three_region_attention.h. Tensors are fp16, and their rows
// begin at multiples of 16 bytes.
#pragma once

#include <cstdint>

#include "three_region_attention/three_region_attention.h"

namespace cogview {

struct CudaAttention {
    int B, H, Hkv, T, D, P, w, W;
    float bias, scale;
    uint32_t drop_below;       // a key whose random word is below is dropped; 0: no dropout
    float keep_scale;          // 1 / (1 - dropout_p)
    uint64_t seed;             // of the dropout, where
    const int64_t* seed_data;  // this is nullptr; else it is read from the device
    const void* pivots;        // [B, P] of integers of pivot_bytes bytes, contiguous; -1 pads
    int pivot_bytes;
    int32_t* sorted;  // [B, P], written here: ascending, padded with T
    AttentionInput q, k, v;
};

struct CudaAttentionForward {
    CudaAttention common;
    AttentionOutput out;
    float* lse;  // [B, H, T]: log of the softmax's denominator
};

struct CudaAttentionBackward {
    CudaAttention common;
    AttentionInput out, dout;
    const float* lse;
    const float* dlse;  // [B, H, T], nullptr for none
    AttentionOutput dq, dk, dv;
    float* delta;   // [B, H, T], written here: sum over D of out * dout, less dlse
    float* dk_far;  // [B, Hkv, P, D], written here: gradients of the sorted pivots as far keys
    float* dv_far;
};

// D is 32, 64, 80, 96 or 128. `stream` is a cudaStream_t. Throws std::runtime_error with the kernel's name on
// a CUDA error.
void three_region_attention_fwd_cuda(const CudaAttentionForward& args, void* stream);
void three_region_attention_bwd_cuda(const CudaAttentionBackward& args, void* stream);

}  // namespace cogview
