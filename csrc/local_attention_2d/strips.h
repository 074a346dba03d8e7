// SPDX-License-Identifier: Apache-2.0
// How the forward in bfloat16 is divided for processors that multiply it. Internal linkage: see common/vec.h.
//
// Queries go in panels of 16, a patch of the raster: the rows of one tile register. What a column of panels
// sees are some neighbouring columns of the grid of keys, a strip. Each strip is packed apart, row after row,
// so that the keys of a panel are one piece of it, and no product meets keys far from its queries. Strips
// overlap: a key is packed for each that holds it, once for a whole group of query heads.
//
// Keys are packed in blocks of 32, which lie in one order for a head: the extra keys, then strip by strip. A
// block of keys is a B operand of S = Q K^T, units [Du, 32]; one of values that of O = P V, units [16, Dp].
#pragma once

#include "common/pack.h"
#include "local_attention_2d/call.h"

namespace cogview {
namespace {

constexpr int64_t kPanelQueries = 16;
constexpr int64_t kBlock = 32;

// A patch of queries, and the blocks of its strip that some of them see.
struct Panel {
    int64_t y, x, height, width;  // the queries that exist
    int64_t strip;
    Range blocks;
};

struct StripPlan : Call {
    int64_t Du;  // units of a row
    int64_t panel_height, panel_width, panels_down, panels_across;
    int64_t width;  // columns of a strip, a multiple of 16
    int64_t strip_blocks, extra_blocks;
    int64_t head_blocks;  // of a head, all strips

    explicit StripPlan(const LocalAttention& args) : Call(args, kBlock) {
        Du = Dp / 2;
        panel_width = cheapest_width(kPanelQueries, [this](int64_t wide) { return cost_of(wide); });
        panel_height = kPanelQueries / panel_width;
        panels_down = parts(query_height, panel_height);
        panels_across = parts(query_width, panel_width);
        width = strip_width(panel_width);
        strip_blocks = parts(window.height * width, kBlock);
        extra_blocks = parts(E, kBlock);
        head_blocks = extra_blocks + panels_across * strip_blocks;
    }

    // Columns of keys that panels so wide may see.
    int64_t strip_width(int64_t wide) const { return round_up(columns_seen(most_cells(wide)), 16); }

    // How many cells so many neighbouring queries may lie in.
    int64_t most_cells(int64_t queries) const {
        return (queries + window.query_scale - 2) / window.query_scale + 1;
    }

    // How often a key meets a panel, 16 pairs at a time. To pack a key takes about as long as three of these.
    double cost_of(int64_t wide) const {
        const int64_t high = kPanelQueries / wide, across = parts(query_width, wide);
        const int64_t columns = strip_width(wide);
        const int64_t seen = rows_seen(most_cells(high)) * columns;
        const int64_t multiplied = round_up(seen, kBlock) + round_up(E, kBlock);
        return double(across) * (double(parts(query_height, high) * multiplied * group) +
                                 3.0 * double(window.height * columns));
    }

    // The first column of a strip. Its last ones may lie beyond the grid.
    int64_t first_column(int64_t strip) const {
        return std::max<int64_t>(0, strip * panel_width / window.query_scale - window.column_radius);
    }

    Panel panel(int64_t index) const {
        Panel p;
        // Down a strip, so that neighbours find its keys in the caches.
        p.strip = index / panels_down;
        p.y = index % panels_down * panel_height;
        p.x = p.strip * panel_width;
        p.height = std::min(panel_height, query_height - p.y);
        p.width = std::min(panel_width, query_width - p.x);
        const Range rows = key_rows(p.y, p.y + p.height - 1);
        p.blocks = {rows.begin * width / kBlock, parts(rows.end * width, kBlock)};
        return p;
    }

    int64_t strip_block(int64_t strip, int64_t block) const {
        return extra_blocks + strip * strip_blocks + block;
    }

    // A place in a strip as row and column of the grid; the row may be past the last one.
    int64_t row_of(int64_t place) const { return place / width; }
    int64_t column_of(int64_t strip, int64_t place) const { return first_column(strip) + place % width; }

    // Calls body(lane, query) for the queries of a panel; `query` is its place in the raster.
    template <typename Body>
    void for_each_query(const Panel& p, const Body& body) const {
        for (int64_t y = 0; y < p.height; ++y)
            for (int64_t x = 0; x < p.width; ++x)
                body(y * panel_width + x, (p.y + y) * query_width + p.x + x);
    }

    // The rows of tensor x, or of tensor `extra`, that a block of a head holds, as [32, Dp]; zero where there
    // is none.
    void stage(const StridedInput& x, const StridedInput& extra, int64_t b, int64_t h, int64_t block,
               BFloat16* to) const {
        const int64_t strip = (block - extra_blocks) / strip_blocks;
        const int64_t first =
            block < extra_blocks ? block * kBlock : (block - strip_block(strip, 0)) * kBlock;
        for (int64_t i = first; i < first + kBlock; ++i, to += Dp) {
            const BFloat16* row = nullptr;
            if (block < extra_blocks) {
                if (i < E) row = extra.row<BFloat16>(b, h, i);
            } else if (row_of(i) < window.height && column_of(strip, i) < window.width) {
                row = x.row<BFloat16>(b, h, slot(row_of(i), column_of(strip, i)));
            }
            stage_row(row, D, Dp, false, to);
        }
    }
};

// ---- products of a panel

#if defined(__AMX_BF16__)

// scores[16, 32] = queries[16, Du] keys[Du, 32]
inline void score_block(const float* queries, int64_t Du, const float* keys, float* scores, int64_t ld) {
    tile_zero<0>();
    tile_zero<1>();
    for (int64_t d = 0; d < Du; d += 16, keys += 16 * kBlock) {
        tile_load<4>(queries + d, Du);
        tile_load<6>(keys, kBlock);
        tile_load<7>(keys + 16, kBlock);
        tile_multiply_add<0, 4, 6>();
        tile_multiply_add<1, 4, 7>();
    }
    tile_store<0>(scores, ld);
    tile_store<1>(scores + 16, ld);
}

template <int kTile>
inline void begin_sum(const float* sum, int64_t ld, bool accumulate) {
    if (accumulate)
        tile_load<kTile>(sum, ld);
    else
        tile_zero<kTile>();
}

// out[16, 32 kPairs] (+)= weights[16, 16 blocks] values[16 blocks, 32 kPairs]
template <int kPairs>
inline void weigh_columns(const float* weights, int64_t ld, int64_t blocks, const float* values, int64_t Dp,
                          float* out, bool accumulate) {
    begin_sum<0>(out, Dp, accumulate);
    begin_sum<1>(out + 16, Dp, accumulate);
    if constexpr (kPairs == 2) {
        begin_sum<2>(out + 32, Dp, accumulate);
        begin_sum<3>(out + 48, Dp, accumulate);
    }
    for (int64_t i = 0; i < blocks; ++i, weights += 16, values += 16 * Dp) {
        tile_load<4>(weights, ld);
        tile_load<5>(values, Dp);
        tile_load<6>(values + 16, Dp);
        tile_multiply_add<0, 4, 5>();
        tile_multiply_add<1, 4, 6>();
        if constexpr (kPairs == 2) {
            tile_load<7>(values + 32, Dp);
            tile_multiply_add<2, 4, 7>();
            tile_load<5>(values + 48, Dp);
            tile_multiply_add<3, 4, 5>();
        }
    }
    tile_store<0>(out, Dp);
    tile_store<1>(out + 16, Dp);
    if constexpr (kPairs == 2) {
        tile_store<2>(out + 32, Dp);
        tile_store<3>(out + 48, Dp);
    }
}

// out[16, Dp] (+)= weights[16, 16 blocks] values[16 blocks, Dp]
inline void weigh_blocks(const float* weights, int64_t ld, int64_t blocks, const float* values, int64_t Dp,
                         float* out, bool accumulate) {
    int64_t d = 0;
    for (; d + 64 <= Dp; d += 64) weigh_columns<2>(weights, ld, blocks, values + d, Dp, out + d, accumulate);
    if (d < Dp) weigh_columns<1>(weights, ld, blocks, values + d, Dp, out + d, accumulate);
}

#else

inline void score_block(const float* queries, int64_t Du, const float* keys, float* scores, int64_t ld) {
    matmul<true>(kPanelQueries, kBlock, Du, MatmulA{queries, Du, Du, 0}, keys, kBlock, scores, ld, false);
}

inline void weigh_blocks(const float* weights, int64_t ld, int64_t blocks, const float* values, int64_t Dp,
                         float* out, bool accumulate) {
    const int64_t units = 16 * blocks;
    matmul<true>(kPanelQueries, Dp, units, MatmulA{weights, ld, units, 0}, values, Dp, out, Dp, accumulate);
}

#endif

}  // namespace
}  // namespace cogview
