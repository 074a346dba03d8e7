// SPDX-License-Identifier: Apache-2.0
// Arguments of the CUDA kernels. Letters as in three_region_attention.py: B batch, H query heads, Hkv key
// heads, T sequence length, D head size, P pivots a sample, w block size, W window blocks.
#pragma once

#include <cstdint>

namespace cogview {

// [B, heads, T, D] of fp16, last stride 1, the others in elements; rows begin at multiples of 16 bytes.
struct CudaInput {
    const void* data;
    int64_t stride[3];
};
struct CudaOutput {
    void* data;
    int64_t stride[3];
};

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
    CudaInput q, k, v;
};

struct CudaAttentionForward {
    CudaAttention common;
    CudaOutput out;
    float* lse;  // [B, H, T]: log of the softmax's denominator
};

struct CudaAttentionBackward {
    CudaAttention common;
    CudaInput out, dout;
    const float* lse;
    const float* dlse;  // [B, H, T], nullptr for none
    CudaOutput dq, dk, dv;
    float* delta;   // [B, H, T], written here: sum over D of out * dout, less dlse
    float* dk_far;  // [B, Hkv, P, D], written here: gradients of the sorted pivots as far keys
    float* dv_far;
};

// D is 32, 64, 80, 96 or 128. `stream` is a cudaStream_t. Throws std::runtime_error with the kernel's name on
// a CUDA error.
void three_region_attention_fwd_cuda(CudaAttentionForward args, void* stream);
void three_region_attention_bwd_cuda(CudaAttentionBackward args, void* stream);

}  // namespace cogview
