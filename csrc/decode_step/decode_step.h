// SPDX-License-Identifier: Apache-2.0
// All layers of a decoding step: the new tokens of each row go through a transformer with Sandwich-LN whose
// earlier keys and values are cached.
//
// Letters: L layers, B rows, T new tokens of each, C width, H heads, D = C / H, S tokens that the cache has
// room for, F width inside the MLP, V logits. Bytes: the weights, L * (4 C^2 + 2 C F) elements, and the
// cached keys and values that are seen, once each.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/regions.h"
#include "norms/norm.h"

namespace cogview {

// Of the step's dtype, contiguous: [outputs, inputs] and [outputs].
struct LinearWeights {
    const void *weight, *bias;
};

// In the order in which a step meets them.
struct DecodeStepLayer {
    Affine attention_pre;
    LinearWeights qkv, attention_out;
    Affine attention_post, mlp_pre;
    LinearWeights mlp_up, mlp_down;
    Affine mlp_post;
};

struct DecodeStep {
    const void* x;  // [B, T, C], contiguous
    void* y;        // contiguous: [B, T, C], the trunk behind the last layer, normalised, or [B, T, V] logits
    const DecodeStepLayer* layers;  // [L]
    Affine final_norm;
    const void* head;  // [V, C], rows contiguous and `head_stride` elements apart, or nullptr: no logits
    int64_t V, head_stride;
    void* cache;          // [L, 2, B, H, S, D], contiguous: keys, values
    IntegerList lengths;  // [B] tokens that are cached; the new ones are written behind them
    int64_t L, B, T, C, H, S, F;
    Layout layout;
    NormOptions norms;
    DType dtype;  // of all but the lengths
};

// Throws std::invalid_argument, before anything is written, if the cache has no room for the new tokens.
void decode_step_cpu(const DecodeStep& args, int threads);

}  // namespace cogview
