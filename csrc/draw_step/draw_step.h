// SPDX-License-Identifier: Apache-2.0
// A whole step of drawing tokens one by one: the embedding of each row's last token, all layers and the
// logits (decode_step), the next token (draw_tokens), and what is kept of it. From Python the parts between
// the layers would take as long as those of a small model.
//
// Letters as in decode_step.h, with one new token a row; W tokens that a row has room for.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/isa.h"
#include "decode_step/decode_step.h"
#include "draw_tokens/draw_tokens.h"

namespace cogview {

// x[b] = words[tokens[b]] + positions[at[b]], all [.., C] and contiguous.
struct EmbedTokens {
    const void *words, *positions;
    const int64_t *tokens, *at;
    void* x;
    int64_t B, C;
    DType dtype;
};

COGVIEW_DECLARE_PER_ISA(void embed_tokens_cpu(const EmbedTokens& args);)

struct DrawStep {
    DecodeStep step;                // its x, y and lengths are filled in here
    DrawTokens draw;                // its logits, positions and drawn are, too
    const void *words, *positions;  // tables of num_words and num_positions rows
    int64_t num_words, num_positions;
    const int64_t* restart;  // [B] the place from which on a row's positions begin at 0 again, or nullptr
    int64_t* lengths;        // [B] tokens that are cached: one more afterwards
    int64_t* last;           // [B] the token that is not, and then the drawn one
    int64_t* tokens;         // [B, W], where the drawn one is put
    int64_t* done;           // [B] at this place, which is one more afterwards
    int64_t W;
};

// Throws before anything is written: std::out_of_range if a token or a position is not in its table or a row
// of tokens is full, std::invalid_argument as decode_step_cpu does.
void draw_step_cpu(const DrawStep& args, int threads);

}  // namespace cogview
