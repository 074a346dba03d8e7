// SPDX-License-Identifier: Apache-2.0
// How the CPU divides a call into tiles, for both directions. Internal linkage: see common/vec.h.
//
// Queries go in tiles of up to 64, keys in tiles of 32. Every score tile is kept transposed, S[key, query]:
// what belongs to a query (maximum, sum, lse, delta) is then a vector along the row, nothing is ever summed
// across lanes, and each product finds its operands as the one before left them.
//
// The keys of a head are packed once, in slots: [0, Pp) the sorted pivots, [Pp, Pp + Tp) all positions, both
// padded to whole tiles. A query tile sees a prefix of the first, a suffix too where the layout is not
// causal, and a stretch of the second.
#pragma once

#include <algorithm>

#include "common/pack.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "common/weights.h"
#include "three_region_attention/three_region_attention.h"

namespace cogview {
namespace {

constexpr int64_t kQueries = 64;  // of a tile
constexpr int64_t kTile = 32;     // keys

// A run has a multiple of this many slots: products of bfloat16 take whole tiles.
template <bool kBf16>
constexpr int64_t kGrain = kBf16 ? kTile : 2;
// On the diagonal a run has at most this many, and leaves out the queries before them, which see none.
template <bool kBf16>
constexpr int64_t kPiece = Compute<kBf16>::kAlign;

// What all tiles of a call share.
template <bool kBf16>
struct Plan {
    const Attention& args;
    const SortedPivots& sorted_pivots;
    int64_t B, H, Hkv, T, D, P;
    int64_t Dp, Du;            // head size padded, and in units
    int64_t Pp, Tp, S;         // padded pivots, positions, both: the slots of a head
    int64_t tiles;             // of queries
    int64_t group;             // query heads of a key head
    bool negate;               // a negative scale is put into Q
    float factor, factor_low;  // logits in powers of 2: (factor + factor_low) * (q k)
    float bias;

    Plan(const Attention& args, const SortedPivots& sorted_pivots)
        : args(args), sorted_pivots(sorted_pivots) {
        const AttentionShape& shape = args.shape;
        B = shape.B, H = shape.H, Hkv = shape.Hkv, T = shape.T, D = shape.D, P = args.layout.P;
        Dp = round_up(D, Compute<kBf16>::kAlign);
        Du = Dp / Compute<kBf16>::kPack;
        Pp = round_up(P, kTile);
        Tp = round_up(T, kTile);
        S = Pp + Tp;
        tiles = (T + kQueries - 1) / kQueries;
        group = H / Hkv;
        negate = args.scale < 0;
        const double wanted = (negate ? -double(args.scale) : double(args.scale)) * kLog2e;
        factor = float(wanted);
        factor_low = float(wanted - factor);
        bias = float(args.layout.pivot_bias * kLog2e);
    }

    // For shift = (far ? bias : 0) - subtract - subtract_low.
    Exponent<kBf16> exponent(bool far, VecF subtract, VecF subtract_low) const {
        const float add = far ? bias : 0.0f;
        const VecF shift = add - subtract;
        return {broadcast(factor), broadcast(factor_low), shift, add - (shift + subtract) - subtract_low};
    }

    // The first position of a sample.
    int64_t origin_of(int64_t b) const { return args.layout.origin_of(int(b), int(T)); }
    int64_t window_start(int64_t query, int64_t origin) const {
        return args.layout.window_start(int(query), int(origin));
    }
    int64_t window_last(int64_t query, int64_t origin) const {
        return args.layout.window_last(int(query), int(origin), int(T), args.layout.causal);
    }

    int32_t slot_position(int64_t b, int64_t slot) const {
        if (slot >= Pp) return int32_t(slot - Pp);
        return slot < sorted_pivots.counts[b] ? sorted_pivots.positions[b * P + slot] : kNowhere;
    }

    // How many pivots of sample b lie left of `position`.
    int64_t pivots_before(int64_t b, int64_t position) const {
        return cogview::pivots_before(sorted_pivots.positions + b * P, sorted_pivots.counts[b],
                                      int(position));
    }
};

// Which slots a query tile sees, and from where on they must be masked.
struct Sight {
    int64_t first, queries, columns;  // queries of the tile; `columns` counts padding too
    int64_t blind;                    // how many of the first queries see nothing: they are padding
    int64_t far, far_unmasked;        // slots [0, far), of which the first are seen by all queries
    int64_t after, after_end;         // slots of pivots after the window, multiples of kGrain
    int64_t after_unmasked, pivots;   // all queries see the slots from the one up to the other
    int64_t begin, end;               // window positions, multiples of kGrain
    int64_t unmasked_begin, unmasked_end;
    int64_t diagonal;  // the first kPiece queries see no position from here on
};

template <bool kBf16>
Sight sight(const Plan<kBf16>& plan, int64_t b, int64_t tile) {
    Sight s = {};
    s.first = tile * kQueries;
    s.queries = std::min(kQueries, plan.T - s.first);
    s.columns = round_up(s.queries, Compute<kBf16>::kAlign);
    const int64_t last = s.first + s.queries - 1, origin = plan.origin_of(b);
    s.blind = std::min(std::max<int64_t>(origin - s.first, 0), s.queries);
    if (s.blind == s.queries) return s;
    const int64_t start = plan.window_start(s.first, origin);
    const int64_t start_of_last = plan.window_start(last, origin);
    const int64_t stop = plan.window_last(s.first, origin) + 1;
    const int64_t stop_of_last = plan.window_last(last, origin) + 1;
    constexpr int64_t grain = kGrain<kBf16>;
    s.far = round_up(plan.pivots_before(b, start_of_last), grain);
    s.far_unmasked = plan.pivots_before(b, start);
    if (!plan.args.layout.causal) {
        s.pivots = plan.sorted_pivots.counts[b];
        // No slot twice, where the windows of the queries lie apart.
        s.after = std::max(s.far, round_down(plan.pivots_before(b, stop), grain));
        s.after_end = round_up(s.pivots, grain);
        s.after_unmasked = plan.pivots_before(b, stop_of_last);
    }
    s.begin = round_down(start, grain);
    s.end = round_up(stop_of_last, grain);
    s.unmasked_begin = start_of_last;
    s.unmasked_end = stop;
    s.diagonal = plan.args.layout.causal ? std::min(s.first + kPiece<kBf16>, s.end) : s.end;
    return s;
}

// A run of slots that are all far or all of the window: the rows of one score tile.
struct Run {
    int64_t slot, rows;
    bool far;
    int64_t begin, end;  // rows that need no mask
    int64_t column;      // queries before it see none of the rows; 0 in the first run of a tile
};

// The slots that a query tile sees, in runs of at most `most`, far ones first.
template <bool kBf16>
class Runs {
  public:
    Runs(const Plan<kBf16>& plan, const Sight& sight, int64_t most) : plan_(plan), s_(sight), most_(most) {}

    bool next(Run& run) {
        if (kind_ == kBefore && from_ >= s_.far) begin(kAfter, s_.after);
        if (kind_ == kAfter && from_ >= s_.after_end) begin(kWindow, s_.begin);
        const int64_t from = from_;
        const bool on_diagonal = kind_ == kWindow && from >= s_.diagonal;
        const int64_t end = kind_ == kBefore  ? s_.far
                            : kind_ == kAfter ? s_.after_end
                            : on_diagonal     ? s_.end
                                              : s_.diagonal;
        const int64_t rows = std::min(on_diagonal ? kPiece<kBf16> : most_, end - from);
        if (rows <= 0) return false;
        const auto clamp = [rows](int64_t x) { return std::min(std::max<int64_t>(x, 0), rows); };
        if (kind_ == kBefore)
            run = {from, rows, true, 0, clamp(s_.far_unmasked - from), 0};
        else if (kind_ == kAfter)
            run = {from, rows, true, clamp(s_.after_unmasked - from), clamp(s_.pivots - from), 0};
        else
            run = {plan_.Pp + from,
                   rows,
                   false,
                   clamp(s_.unmasked_begin - from),
                   clamp(s_.unmasked_end - from),
                   0};
        if (on_diagonal && begun_) run.column = round_down(from - s_.first, kPiece<kBf16>);
        begun_ = true;
        from_ += rows;
        return true;
    }

  private:
    enum Kind { kBefore, kAfter, kWindow };  // pivots before the window and after it, the window
    void begin(Kind kind, int64_t from) {
        kind_ = kind;
        from_ = from;
    }

    const Plan<kBf16>& plan_;
    const Sight& s_;
    int64_t most_, from_ = 0;
    bool begun_ = false;
    Kind kind_ = kBefore;
};

template <int kN>
struct Count {
    static constexpr int value = kN;
};

// Calls body(column, vectors) over columns [c, columns) of a tile, kPanel vectors at a time while there are
// so many.
template <typename Body>
inline void for_each_column(int64_t c, int64_t columns, const Body& body) {
    for (; c + kPanel * kLanes <= columns; c += kPanel * kLanes) body(c, Count<kPanel>{});
    if (c + 2 * kLanes <= columns) {
        body(c, Count<2>{});
        c += 2 * kLanes;
    }
    for (; c < columns; c += kLanes) body(c, Count<1>{});
}

// How often it calls.
inline int64_t column_groups(int64_t c, int64_t columns) {
    int64_t groups = 0;
    for_each_column(c, columns, [&groups](int64_t, auto) { ++groups; });
    return groups;
}

// What belongs to the queries of a tile, a lane each.
struct Lanes {
    alignas(64) int32_t window_start[kQueries];
    alignas(64) int32_t window_last[kQueries];
    alignas(64) uint32_t r0[kQueries], r1[kQueries];     // dropout
    alignas(64) float row_max[kQueries], sum[kQueries];  // forward
    // Backward; lse in powers of 2, as a sum of two.
    alignas(64) float lse[kQueries], lse_low[kQueries], delta[kQueries];
};

template <bool kBf16>
void start_lanes(const Plan<kBf16>& plan, const Sight& s, int64_t b, int64_t h, Lanes& lanes) {
    const Dropout& dropout = plan.args.dropout;
    const int64_t origin = plan.origin_of(b);
    for (int64_t c = 0; c < s.columns; ++c) {
        const int64_t query = s.first + c;
        lanes.window_start[c] = int32_t(plan.window_start(query, origin));
        lanes.window_last[c] = int32_t(plan.window_last(query, origin));
        lanes.row_max[c] = -kInf;
        lanes.sum[c] = 0.0f;
        // The probabilities of what is no query, or sees nothing, are 0.
        lanes.lse[c] = std::numeric_limits<float>::max();
        lanes.lse_low[c] = lanes.delta[c] = 0.0f;
        if (dropout.drops()) {
            const RowWords words = philox(dropout.seed, uint32_t(query), uint32_t(h), uint32_t(b));
            lanes.r0[c] = words.r0;
            lanes.r1[c] = words.r1;
        }
    }
}

// Which of the queries from column c on keep the key in row r of a run.
template <bool kBf16>
inline auto keeps(const Plan<kBf16>& plan, const Run& run, int64_t r, int64_t b, const Lanes& lanes,
                  int64_t c) {
    const VecU key = VecU{} + uint32_t(plan.slot_position(b, run.slot + r));
    return keep_mask(lane_vector<VecU>(lanes.r0 + c), lane_vector<VecU>(lanes.r1 + c), key,
                     plan.args.dropout.keep_threshold);
}

// scores = -inf where a query does not see a key.
template <bool kBf16>
void mask_scores(const Plan<kBf16>& plan, const Run& run, int64_t b, const Lanes& lanes, int64_t columns,
                 float* scores) {
    const bool causal = plan.args.layout.causal;
    for (int64_t r = 0; r < run.rows; ++r) {
        if (r >= run.begin && r < run.end) continue;
        const VecI key = VecI{} + plan.slot_position(b, run.slot + r);
        for (int64_t c = run.column; c < columns; c += kLanes) {
            const VecI start = lane_vector<VecI>(lanes.window_start + c);
            const VecI last = lane_vector<VecI>(lanes.window_last + c);
            float* p = scores + r * columns + c;
            store(p, sees(run.far, key, start, last, causal) ? load(p) : broadcast(-kInf));
        }
    }
}

}  // namespace
}  // namespace cogview
