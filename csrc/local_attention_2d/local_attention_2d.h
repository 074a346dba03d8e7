// SPDX-License-Identifier: Apache-2.0
// Attention of a raster of queries to windows of a raster of keys, and to extra keys, under one softmax: the
// rule of cogview_kernels/local_attention_2d/window.py.
//
// Letters: B batch, H query heads, Hkv key heads, D head size, E extra keys. The grid of keys has `height`
// rows of `width` cells, that of queries is `query_scale` times finer each way.
#pragma once

#include <cstdint>

#include "common/dropout.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/strided.h"

namespace cogview {

// Query (y, x) sees the keys up to row_radius rows and column_radius columns away from its cell
// (y / query_scale, x / query_scale); if causal, of these only those up to the cell itself in raster order.
struct Window {
    int height, width, row_radius, column_radius, query_scale;
    bool causal;
};

// What both directions take.
struct LocalAttention {
    int B, H, Hkv, D, E;
    Window window;
    Dropout dropout;
    float scale;
    DType dtype;
    // [B, H, queries, D]; [B, Hkv, height * width, D]; [B, Hkv, E, D]
    StridedInput q, k, v, extra_k, extra_v;
    const uint8_t* extra_mask;  // [B, E], 0 where an extra key is not seen; nullptr: all are
};

struct LocalAttentionForward {
    LocalAttention common;
    StridedOutput out;
    float* lse;  // [B, H, queries]: log of the softmax's denominator
};

struct LocalAttentionBackward {
    LocalAttention common;
    StridedInput out, dout;
    const float* lse;
    const float* dlse;  // [B, H, queries], nullptr for none
    StridedOutput dq, dk, dv, dextra_k, dextra_v;
};

COGVIEW_DECLARE_PER_ISA_WITH_BF16(void local_attention_2d_fwd_cpu(const LocalAttentionForward& args,
                                                                  int threads);)
COGVIEW_DECLARE_PER_ISA(void local_attention_2d_bwd_cpu(const LocalAttentionBackward& args, int threads);)

}  // namespace cogview
