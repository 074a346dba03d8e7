// SPDX-License-Identifier: Apache-2.0
#include "common/vec.h"
#include "draw_step/draw_step.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <typename T>
void embed(const EmbedTokens& a) {
    for (int64_t b = 0; b < a.B; ++b) {
        const T* word = static_cast<const T*>(a.words) + a.tokens[b] * a.C;
        const T* position = static_cast<const T*>(a.positions) + a.at[b] * a.C;
        T* x = static_cast<T*>(a.x) + b * a.C;
        for_each_vector(a.C, [&](int64_t c, auto tag) {
            store(x + c, load(word + c, tag) + load(position + c, tag), tag);
        });
    }
}

}  // namespace

void embed_tokens_cpu(const EmbedTokens& args) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, embed<scalar_t>(args));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
