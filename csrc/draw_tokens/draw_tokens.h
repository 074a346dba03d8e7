// SPDX-License-Identifier: Apache-2.0
// One token a row from its logits: the first to arrive where token i arrives at rate exp(logits_i /
// temperature), after noise that is a pure function of seed, position and i (cogview/generation/sampling.py
// has the formulas).
//
// Letters: N rows, T of them with a seed in common, V logits of each. Bytes: the logits, N V elements, once.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"

namespace cogview {

struct DrawTokens {
    const void* logits;  // [N, V], contiguous
    int64_t N, T, V;
    DType dtype;               // of the logits
    const int64_t* seeds;      // [N / T]
    const int64_t* positions;  // [N], to which `first` is added
    int64_t first;
    float temperature;  // 0: the likeliest token, the first of several
    int64_t top_k;      // logits below the top_k-th largest of their row are left out; 0 keeps all
    int64_t* drawn;     // [N], each in [0, V), whatever the logits are
    float* total;  // the sum of all logits is added to it, which tells of one that is not finite; or nullptr
};

COGVIEW_DECLARE_PER_ISA(void draw_tokens_cpu(const DrawTokens& args, int threads);)

}  // namespace cogview
