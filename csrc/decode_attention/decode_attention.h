// SPDX-License-Identifier: Apache-2.0
// Attention of the last few positions of each sequence over a cache of fixed shape.
//
// Letters: B batch, H query heads, Hkv key heads, Tq new queries, S cache length, D head size, P pivots a
// sample. Query t of sample b stands at position lengths[b] - Tq + t; which keys it sees is told in
// common/regions.h, for a causal layout.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/regions.h"
#include "common/strided.h"

namespace cogview {

struct DecodeShape {
    int B, H, Hkv, Tq, S, D;
};

struct DecodeAttention {
    DecodeShape shape;
    Layout layout;
    float scale;
    DType dtype;
    // [B, H, Tq, D] and [B, Hkv, S, D]; CUDA: rows of q and of the caches begin at multiples of eight
    // elements.
    StridedInput q, k, v;
    StridedOutput out;
    IntegerList lengths;  // [B]
    // CUDA: keys of a block, blocks that share a row's keys, and what these leave for the last of them,
    // written here: [B, H, Tq, splits, D + 2] of maximum, sum, unscaled output. With several splits, a
    // counter for each query and no fewer: zero before and after, and not of a launch that may run at the
    // same time.
    int chunk, splits;
    float* partial;
    int* counters;
};

COGVIEW_DECLARE_PER_ISA_WITH_BF16(void decode_attention_cpu(const DecodeAttention& args, int threads);)

// D is a multiple of 8 up to 256; chunk * splits reaches all keys, pivots included. `stream` is a
// cudaStream_t; the launch can be captured in a CUDA graph. Throws std::runtime_error with the kernel's name
// on a CUDA error.
void decode_attention_cuda(const DecodeAttention& args, void* stream);

}  // namespace cogview
