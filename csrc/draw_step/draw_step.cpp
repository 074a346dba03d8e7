// SPDX-License-Identifier: Apache-2.0
#include "draw_step/draw_step.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "common/workspace.h"

namespace cogview {
namespace {

void check_below(int64_t index, int64_t size, const char* what) {
    if (index < 0 || index >= size)
        throw std::out_of_range("draw_step: " + std::string(what) + " must lie in [0, " +
                                std::to_string(size) + "), got " + std::to_string(index));
}

}  // namespace

void draw_step_cpu(const DrawStep& args, int threads) {
    DrawStep a = args;
    const int64_t B = a.step.B;
    std::vector<int64_t> at(B), drawn(B);
    for (int64_t b = 0; b < B; ++b) {
        const bool again = a.restart != nullptr && a.lengths[b] >= a.restart[b];
        at[b] = again ? a.lengths[b] - a.restart[b] : a.lengths[b];
        check_below(at[b], a.num_positions, "a position");
        check_below(a.last[b], a.num_words, "a token");
        check_below(a.done[b], a.W, "the place of a token");
    }
    const Workspace x(B * a.step.C), logits(B * a.step.V);
    const EmbedTokens embedding = {a.words, a.positions, a.last,   at.data(),
                                   x.data,  B,           a.step.C, a.step.dtype};
    COGVIEW_PICK_ISA(embed_tokens_cpu)(embedding);
    a.step.x = x.data;
    a.step.y = logits.data;
    a.step.lengths = {a.lengths, sizeof(int64_t)};
    decode_step_cpu(a.step, threads);
    a.draw.logits = logits.data;
    a.draw.positions = a.done;
    a.draw.drawn = drawn.data();
    COGVIEW_PICK_ISA(draw_tokens_cpu)(a.draw, threads);
    for (int64_t b = 0; b < B; ++b) {
        a.last[b] = drawn[b];
        a.tokens[b * a.W + a.done[b]] = a.last[b];
        ++a.done[b];
        ++a.lengths[b];
    }
}

}  // namespace cogview
