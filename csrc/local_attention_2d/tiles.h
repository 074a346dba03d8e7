// SPDX-License-Identifier: Apache-2.0
// How the CPU divides a call into tiles, for both directions. Internal linkage: see common/vec.h.
//
// Queries go in tiles of 64, a patch of the raster; its keys are the rows of the patch and of the windows
// around it. Score tiles are kept transposed, S[key, query]: what belongs to a query (maximum, sum, lse,
// delta) is a vector along the row, nothing is ever summed across lanes, and each product finds its operands
// as the one before left them.
//
// The queries of a tile are worked on in panels of 16. A row of keys is multiplied with the panels that see
// it alone, and a panel with its rows of keys alone: the others of the tile, up to half, cost nothing.
//
// The keys of a head are converted to float once, in slots: the grid in raster order, then the extra keys.
#pragma once

#include "common/pack.h"
#include "local_attention_2d/call.h"

namespace cogview {
namespace {

constexpr int64_t kQueries = 64;  // lanes of a tile
constexpr int64_t kPanelLanes = 16;
constexpr int64_t kPanels = kQueries / kPanelLanes;
constexpr int kPanelVectors = int(kPanelLanes) / kLanes;
constexpr int64_t kRun = 128;  // keys of a score tile, at most

// A patch of queries, and the keys that some of them see.
struct Tile {
    int64_t y, x, height, width;  // the queries that exist
    Range rows, columns;          // of the grid of keys
    int64_t panels;               // those that hold queries
    Range panel_rows[kPanels];    // of keys, by panel
};

// The tiles of a call.
struct Plan : Call {
    int64_t tile_height, tile_width, tiles_down, tiles_across;

    explicit Plan(const LocalAttention& args) : Call(args, 16) {
        tile_width = cheapest_width(kQueries, [this](int64_t wide) { return cost_of(wide); });
        tile_height = kQueries / tile_width;
        tiles_down = parts(query_height, tile_height);
        tiles_across = parts(query_width, tile_width);
    }

    // Key lanes that tiles of this width multiply in all.
    double cost_of(int64_t wide) const {
        const int64_t panel_high = std::max<int64_t>(1, kPanelLanes / wide);
        const int64_t keys =
            rows_seen(parts(panel_high, window.query_scale)) * columns_seen(parts(wide, window.query_scale));
        const int64_t across = parts(query_width, wide);
        // A panel is used whole where one of its rows exists.
        const int64_t down = parts(query_height, panel_high);
        const int64_t panels = panel_high == 1 ? parts(wide, kPanelLanes) : 1;
        return double(across) * double(down) * double(panels) * double(keys + E);
    }

    Tile tile(int64_t index) const {
        Tile t;
        t.y = index / tiles_across * tile_height;
        t.x = index % tiles_across * tile_width;
        t.height = std::min(tile_height, query_height - t.y);
        t.width = std::min(tile_width, query_width - t.x);
        t.rows = key_rows(t.y, t.y + t.height - 1);
        const int64_t first = t.x / window.query_scale, last = (t.x + t.width - 1) / window.query_scale;
        t.columns = {std::max<int64_t>(0, first - window.column_radius),
                     std::min<int64_t>(window.width, last + window.column_radius + 1)};
        t.panels = (t.height * tile_width + kPanelLanes - 1) / kPanelLanes;
        for (int64_t p = 0; p < t.panels; ++p) {
            const int64_t above = p * kPanelLanes / tile_width;
            const int64_t below = ((p + 1) * kPanelLanes - 1) / tile_width;
            t.panel_rows[p] = key_rows(t.y + above, t.y + std::min(below, t.height - 1));
        }
        return t;
    }
};

// The keys of a score tile: of each of some rows of the grid the same columns, or extra keys, as one row.
struct Run {
    bool extra;
    Range rows, columns;

    int64_t width() const { return columns.end - columns.begin; }
    // Where the keys of a row of the grid begin in the score tile.
    int64_t first_key(int64_t row) const { return (row - rows.begin) * width(); }
    // Which of the rows a panel sees.
    Range rows_of(const Range& panel) const {
        if (extra) return rows;
        return {std::max(rows.begin, panel.begin), std::min(rows.end, panel.end)};
    }
};

template <typename Body>
inline void for_each_run(const Plan& plan, const Tile& t, const Body& body) {
    for (int64_t e = 0; e < plan.E; e += kRun) body(Run{true, {0, 1}, {e, std::min(plan.E, e + kRun)}});
    for (int64_t x = t.columns.begin; x < t.columns.end; x += kRun) {
        const Range columns = {x, std::min(t.columns.end, x + kRun)};
        const int64_t high = std::max<int64_t>(1, kRun / (columns.end - columns.begin));
        for (int64_t y = t.rows.begin; y < t.rows.end; y += high)
            body(Run{false, {y, std::min(t.rows.end, y + high)}, columns});
    }
}

// The slot of the first key of a row of a run, and from one row to the next.
inline int64_t first_slot(const Plan& plan, const Run& run, int64_t row) {
    return run.extra ? plan.grid + run.columns.begin : plan.slot(row, run.columns.begin);
}

// Calls body(row, lanes) for each row of keys, with the lanes of the panels that see it.
template <typename Body>
inline void for_each_row(const Tile& t, const Run& run, const Body& body) {
    for (int64_t row = run.rows.begin; row < run.rows.end; ++row) {
        int64_t first = 0, end = t.panels;
        if (!run.extra) {
            while (first < end && row >= t.panel_rows[first].end) ++first;
            while (end > first && row < t.panel_rows[end - 1].begin) --end;
        }
        if (first < end) body(row, Range{first * kPanelLanes, end * kPanelLanes});
    }
}

// What belongs to the queries of a tile, a lane each.
struct Lanes {
    alignas(64) int32_t row[kQueries], column[kQueries];  // of the query's cell
    alignas(64) uint32_t r0[kQueries], r1[kQueries];      // dropout
    alignas(64) float row_max[kQueries], sum[kQueries];   // forward
    // Backward; lse in powers of 2, as a sum of two.
    alignas(64) float lse[kQueries], lse_low[kQueries], delta[kQueries];
};

// Calls body(lane, query) for the queries of a tile; `query` is its place in the raster.
template <typename Body>
inline void for_each_query(const Plan& plan, const Tile& t, const Body& body) {
    for (int64_t y = 0; y < t.height; ++y)
        for (int64_t x = 0; x < t.width; ++x)
            body(y * plan.tile_width + x, (t.y + y) * plan.query_width + t.x + x);
}

inline void start_lanes(const Plan& plan, const Tile& t, int64_t b, int64_t h, Lanes& lanes) {
    const Dropout& dropout = plan.args.dropout;
    for (int64_t lane = 0; lane < kQueries; ++lane) {
        lanes.row[lane] = lanes.column[lane] = kNoRow;
        lanes.r0[lane] = lanes.r1[lane] = 0;
        lanes.row_max[lane] = -kInf;
        lanes.sum[lane] = 0.0f;
        lanes.lse[lane] = lanes.lse_low[lane] = lanes.delta[lane] = 0.0f;
    }
    for_each_query(plan, t, [&](int64_t lane, int64_t query) {
        lanes.row[lane] = int32_t(query / plan.query_width / plan.window.query_scale);
        lanes.column[lane] = int32_t(query % plan.query_width / plan.window.query_scale);
        if (dropout.drops()) {
            const RowWords words = philox(dropout.seed, uint32_t(query), uint32_t(h), uint32_t(b));
            lanes.r0[lane] = words.r0;
            lanes.r1[lane] = words.r1;
        }
    });
}

// Which of the queries from `lane` on keep the key in `slot`.
inline auto keeps(const Plan& plan, int64_t slot, const Lanes& lanes, int64_t lane) {
    return keep_mask(lane_vector<VecU>(lanes.r0 + lane), lane_vector<VecU>(lanes.r1 + lane),
                     VecU{} + uint32_t(slot), plan.args.dropout.keep_threshold);
}

// scores = -inf where a query of a panel does not see a key, for the given rows of a run.
inline void mask_scores(const Plan& plan, const Run& run, const Range& rows, int64_t b, const Lanes& lanes,
                        int64_t lane, float* scores) {
    if (run.extra) {
        if (plan.args.extra_mask == nullptr) return;
        const uint8_t* seen = plan.args.extra_mask + b * plan.E;
        for (int64_t e = run.columns.begin; e < run.columns.end; ++e)
            for (int i = 0; i < kPanelVectors && seen[e] == 0; ++i)
                store(scores + (e - run.columns.begin) * kQueries + lane + i * kLanes, broadcast(-kInf));
        return;
    }
    const Window& window = plan.window;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        for (int i = 0; i < kPanelVectors; ++i) {
            const VecI own_row = lane_vector<VecI>(lanes.row + lane + i * kLanes);
            const VecI own_column = lane_vector<VecI>(lanes.column + lane + i * kLanes);
            const VecI down = int32_t(row) - own_row;
            VecI near = (down <= window.row_radius) & (down >= -window.row_radius);
            VecI last = own_column + window.column_radius;
            if (window.causal) {
                near &= down <= 0;
                last = down == 0 ? own_column : last;
            }
            const VecI first = own_column - window.column_radius;
            float* p = scores + run.first_key(row) * kQueries + lane + i * kLanes;
            for (int64_t x = run.columns.begin; x < run.columns.end; ++x, p += kQueries) {
                const VecI column = VecI{} + int32_t(x);
                store(p, near & (column >= first) & (column <= last) ? load(p) : broadcast(-kInf));
            }
        }
    }
}

// ---- rows of tensors into float, and back

// Rows of tensor x of the grid and of tensor `extra` as floats, in the order of slots [begin, end).
template <typename T>
void convert_slots(const Plan& plan, const StridedInput& x, const StridedInput& extra, int64_t b, int64_t h,
                   const Range& slots, float* to) {
    for (int64_t slot = slots.begin; slot < slots.end; ++slot)
        stage_row(slot < plan.grid ? x.row<T>(b, h, slot) : extra.row<T>(b, h, slot - plan.grid), plan.D,
                  plan.Dp, false, to + slot * plan.Dp);
}

// The queries of a tile, [kQueries, Dp], and transposed. Lanes without a query are zero.
template <typename T>
void load_tile(const Plan& plan, const StridedInput& x, int64_t b, int64_t h, const Tile& t, bool negate,
               float* rows, float* transposed) {
    std::memset(rows, 0, kQueries * plan.Dp * sizeof(float));
    for_each_query(plan, t, [&](int64_t lane, int64_t query) {
        stage_row(x.row<T>(b, h, query), plan.D, plan.Dp, negate, rows + lane * plan.Dp);
    });
    pack_b_transposed<false>(rows, kQueries, plan.Dp, transposed);
}

template <typename T>
inline void store_row(const float* from, float factor, int64_t D, T* to) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) store(to + d, load(from + d) * factor);
    for (; d < D; ++d) from_float(from[d] * factor, &to[d]);
}

// Writes the queries of a tile, given transposed as [Dp, kQueries], times `factor`. `work` holds as much.
template <typename T>
void store_tile(const Plan& plan, const float* transposed, const StridedOutput& x, int64_t b, int64_t h,
                const Tile& t, float factor, float* work) {
    transpose(transposed, plan.Dp, kQueries, kQueries, work, plan.Dp);
    for_each_query(plan, t, [&](int64_t lane, int64_t query) {
        store_row(work + lane * plan.Dp, factor, plan.D, x.row<T>(b, h, query));
    });
}

// product[Dp, lanes of a panel] (+)= X^T weights, X the keys or values of the given rows of a run, in slots.
inline void multiply_keys(const Plan& plan, const Run& run, const Range& rows, const float* x,
                          const float* weights, int64_t lane, float* product, bool accumulate) {
    const TransposedA a = {x + first_slot(plan, run, rows.begin) * plan.Dp, plan.Dp, run.width(),
                           int64_t(plan.window.width) * plan.Dp};
    matmul<false>(plan.Dp, kPanelLanes, (rows.end - rows.begin) * run.width(), a,
                  weights + run.first_key(rows.begin) * kQueries + lane, kQueries, product + lane, kQueries,
                  accumulate);
}

}  // namespace
}  // namespace cogview
