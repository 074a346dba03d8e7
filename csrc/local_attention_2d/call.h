// SPDX-License-Identifier: Apache-2.0
// What a call on the CPU is, however it is divided. Internal linkage: see common/vec.h.
#pragma once

#include <algorithm>

#include "common/vec.h"
#include "common/weights.h"
#include "local_attention_2d/local_attention_2d.h"

namespace cogview {
namespace {

constexpr int32_t kNoRow = -(1 << 30);  // the row of a lane that has no query

struct Range {
    int64_t begin, end;
};

inline int64_t parts(int64_t whole, int64_t part) {
    return (whole + part - 1) / part;
}

struct Call {
    const LocalAttention& args;
    const Window window;
    int64_t B, H, Hkv, D, E, T;
    int64_t Dp;     // head size padded
    int64_t grid;   // keys of the grid
    int64_t slots;  // and the extra ones
    int64_t group;  // query heads of a key head
    int64_t query_height, query_width;
    bool negate;               // a negative scale is put into Q
    float factor, factor_low;  // logits in powers of 2: (factor + factor_low) * (q k)

    Call(const LocalAttention& args, int64_t align) : args(args), window(args.window) {
        B = args.B, H = args.H, Hkv = args.Hkv, D = args.D, E = args.E;
        Dp = parts(D, align) * align;
        grid = int64_t(window.height) * window.width;
        slots = grid + E;
        group = H / Hkv;
        query_height = int64_t(window.height) * window.query_scale;
        query_width = int64_t(window.width) * window.query_scale;
        T = query_height * query_width;
        negate = args.scale < 0;
        const double wanted = (negate ? -double(args.scale) : double(args.scale)) * kLog2e;
        factor = float(wanted);
        factor_low = float(wanted - factor);
    }

    // The rows of keys that queries of the rows [first, last] see.
    Range key_rows(int64_t first, int64_t last) const {
        const int64_t below = window.causal ? 0 : window.row_radius;
        return {std::max<int64_t>(0, first / window.query_scale - window.row_radius),
                std::min<int64_t>(window.height, last / window.query_scale + below + 1)};
    }

    // How many rows or columns of keys the queries of so many neighbouring cells see.
    int64_t rows_seen(int64_t cells) const {
        const int64_t below = window.causal ? 0 : window.row_radius;
        return std::min<int64_t>(window.height, cells + window.row_radius + below);
    }
    int64_t columns_seen(int64_t cells) const {
        return std::min<int64_t>(window.width, cells + 2 * window.column_radius);
    }

    // The width, a power of 2 up to `most`, of least cost; the widest of them.
    template <typename Cost>
    static int64_t cheapest_width(int64_t most, const Cost& cost) {
        int64_t best = most;
        double least = cost(most);
        for (int64_t wide = most / 2; wide >= 1; wide /= 2) {
            const double its = cost(wide);
            if (its < least) best = wide, least = its;
        }
        return best;
    }

    // The exponent of a logit less what is subtracted, in powers of 2.
    template <bool kBf16 = false>
    Exponent<kBf16> exponent(VecF subtract, VecF subtract_low) const {
        return {broadcast(factor), broadcast(factor_low), -subtract, -subtract_low};
    }

    int64_t slot(int64_t row, int64_t column) const { return row * window.width + column; }

    // How many key heads are worked on at a time: what they need stays within about 4 MB, but there are tasks
    // enough for every thread, and the last turn is about as long as the others.
    int64_t heads_of_a_turn(int64_t floats_of_a_head, int64_t tasks_of_a_head, int threads) const {
        const int64_t most =
            std::max((int64_t(1) << 20) / floats_of_a_head, parts(int64_t(4) * threads, tasks_of_a_head));
        return parts(B * Hkv, parts(B * Hkv, most));
    }
};

}  // namespace
}  // namespace cogview
