// SPDX-License-Identifier: Apache-2.0
// Attention of the last few positions of each sequence over a cache of fixed shape.
//
// Letters: B batch, H query heads, Hkv key heads, Tq new queries, S cache length, D head size, P pivots a
// sample, w block size, W window blocks. Query t of sample b stands at lengths[b] - Tq + t.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogview {

struct DecodeAttention {
    int B, H, Hkv, Tq, S, D, P, w, W;  // w = 0: no layout, every key up to the query's own
    int chunk, splits;                 // CUDA: keys of a block; blocks that share a row's keys
    float bias, scale;
    // [B, H, Tq, D] and [B, Hkv, S, D], last stride 1, the others in elements; CUDA: rows of q and of the
    // caches begin at multiples of eight elements.
    const void *q, *k, *v;
    void* out;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
    const void* lengths;  // [B] of integers of length_bytes bytes
    int length_bytes;
    const void* pivots;  // [B, P] of integers of pivot_bytes bytes, contiguous, any order; -1 pads
    int pivot_bytes;
    float* partial;  // CUDA: [B, H, Tq, splits, D + 2], written here: maximum, sum, unscaled output
    DType dtype;
};

COGVIEW_DECLARE_PER_ISA(void decode_attention_cpu(const DecodeAttention& args, int threads);)

// The number of keys, pivots included, that a call may have to look at: chunk * splits must reach it.
int64_t decode_attention_keys(const DecodeAttention& args);

// D is a multiple of 8 up to 256. `stream` is a cudaStream_t; can be captured in a CUDA graph. Throws
// std::runtime_error with the kernel's name on a CUDA error.
void decode_attention_cuda(const DecodeAttention& args, void* stream);

}  // namespace cogview
