// SPDX-License-Identifier: Apache-2.0
// Queries go in tiles of up to 64, keys in tiles of 32. Every score tile is kept transposed, S[key, query]:
// what belongs to a query (maximum, sum, lse, delta) is then a vector along the row, nothing is ever summed
// across lanes, and each product finds its operands as the one before left them.
//
// The keys of a head are packed once, in slots: [0, Pp) the sorted pivots, [Pp, Pp + Tp) all positions, both
// padded to whole tiles. A query tile sees a prefix of the first and a stretch of the second.
//
//   forward   S = K Q^T,  P = 2^(c S + bias - m),  O^T = V^T P          4 D FLOPs a pair, one exponential
//   backward  S = K Q^T,  dP = V dO^T,  P = 2^(c S + bias - lse),  dS = P (dP - delta),
//             dV += P dO,  dK += dS Q,  dQ^T += K^T dS                  10 D FLOPs a pair, one exponential
// with c = |scale| log2(e); a negative scale is put into Q.
#include <algorithm>

#include "common/parallel.h"
#include "common/dropout.h"
#include "common/vec.h"
#include "common/workspace.h"
#include "three_region_attention/matmul.h"
#include "three_region_attention/pack.h"
#include "three_region_attention/three_region_attention.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int64_t kQueries = 64;       // of a tile
constexpr int64_t kTile = 32;          // keys
constexpr int64_t kNowhere = 1 << 30;  // the position of a padding slot

inline int64_t round_down(int64_t n, int64_t to) {
    return n / to * to;
}
inline int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// 2^x for x < 128, 0 from -127 down, NaN for NaN; to 2^-13 where the result is rounded to bfloat16, else to 1
// ulp. As exp2 of vec.h, less what attention does not need: -127 itself gives exactly 0, for its exponent
// field is 0. (Not by vscalefps: it takes 100 times as long where the result underflows, and every masked
// score does.)
template <bool kBf16>
inline VecF weight(VecF x) {
    x = maximum(broadcast(-127.0f), x);         // of a NaN maximum() gives its second operand
    const VecF magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const VecF shifted = x + magic;
    const VecF f = x - (shifted - magic);
    VecF p;
    if (kBf16) {
        p = broadcast(0.05500892922282219f);
        p = p * f + 0.2422109693288803f;
        p = p * f + 0.6932829022407532f;
    } else {
        p = broadcast(0.00015461444854736328f);
        p = p * f + 0.0013400427997112274f;
        p = p * f + 0.009618056938052177f;
        p = p * f + 0.05550327152013779f;
        p = p * f + 0.24022650718688965f;
        p = p * f + 0.6931471824645996f;
    }
    p = p * f + 1.0f;
    return bitcast<VecF>(bitcast<VecI>(p) + (bitcast<VecI>(shifted) << 23));
}

// Exponents in powers of 2, factor * score + shift, of a column of scores. In float they are carried to twice
// the precision where it matters: an error of the last bit of a logit of 16 is one of 16 ulps in its weight.
template <bool kBf16>
struct Exponent {
    VecF factor, factor_low, shift, shift_low;
    VecF operator()(VecF score) const {
        const VecF high = multiply_add<false>(score, factor, shift);
        if (kBf16) return high;
        // Where nothing is seen, -inf: its low part would be NaN.
        const VecF low = multiply_add<false>(score, factor_low, shift_low);
        return score == -kInf ? score : high + low;
    }
};

// What all tiles of a call share.
template <bool kBf16>
struct Plan {
    AttentionShape a;
    int64_t Dp, Du;     // head size padded, and in units
    int64_t Pp, Tp, S;  // padded pivots, positions, both: the slots of a head
    int64_t tiles, group;
    bool negate;
    float factor, factor_low;  // logits in powers of 2: (factor + factor_low) * (q k)
    float bias;

    explicit Plan(const AttentionShape& shape) : a(shape) {
        Dp = round_up(a.D, Compute<kBf16>::kAlign);
        Du = Dp / Compute<kBf16>::kPack;
        Pp = round_up(a.P, kTile);
        Tp = round_up(a.T, kTile);
        S = Pp + Tp;
        tiles = (a.T + kQueries - 1) / kQueries;
        group = a.H / a.Hkv;
        negate = a.scale < 0;
        const double wanted = (negate ? -double(a.scale) : double(a.scale)) * kLog2e;
        factor = float(wanted);
        factor_low = float(wanted - factor);
        bias = float(a.bias * kLog2e);
    }
    // For shift = (far ? bias : 0) - subtract - subtract_low.
    Exponent<kBf16> exponent(bool far, VecF subtract, VecF subtract_low) const {
        const float add = far ? bias : 0.0f;
        const VecF shift = add - subtract;
        return {broadcast(factor), broadcast(factor_low), shift, add - (shift + subtract) - subtract_low};
    }
    int64_t window_start(int64_t query) const { return std::max<int64_t>(0, (query / a.w - a.W + 1) * a.w); }
};

// The packed keys or values of one key head, in slots.
struct PackedHead {
    float* rows;        // [S, Du]: A operand
    float* transposed;  // [S / 32, Dp, 32 / kPack]: A operand, keys contracted
};

// What pack_tile() works in, times Dp.
constexpr int64_t kPackFloats = 2 * kTile;

template <bool kBf16, typename T>
void pack_tile(const Plan<kBf16>& plan, const AttentionInput& x, const SortedPivots& pivots, int64_t b,
               int64_t head, int64_t tile, const PackedHead& to, bool rows, bool transposed, float* work) {
    using E = typename Compute<kBf16>::type;
    const AttentionShape& a = plan.a;
    E* stage = rows ? reinterpret_cast<E*>(to.rows + tile * kTile * plan.Du) : reinterpret_cast<E*>(work);
    const T* base = static_cast<const T*>(x.data) + b * x.stride[0] + head * x.stride[1];
    for (int64_t r = 0; r < kTile; ++r) {
        const int64_t slot = tile * kTile + r;
        int64_t position = slot - plan.Pp;
        if (slot < plan.Pp) position = slot < pivots.counts[b] ? pivots.positions[b * a.P + slot] : a.T;
        stage_row(position < a.T ? base + position * x.stride[2] : nullptr, a.D, plan.Dp, false,
                  stage + r * plan.Dp);
    }
    if (transposed)
        pack_a_transposed(stage, plan.Dp, to.transposed + tile * kTile * plan.Du, work + kTile * plan.Dp);
}

// Which slots a query tile sees, and from where on they must be masked.
struct Sight {
    int64_t first, queries, columns;  // queries of the tile; `columns` counts padding too
    int64_t far, far_unmasked;        // slots [0, far), of which the first are seen by all queries
    int64_t begin, end;               // window positions, whole tiles
    int64_t unmasked_begin, unmasked_end;
};

template <bool kBf16>
Sight sight(const Plan<kBf16>& plan, const SortedPivots& pivots, int64_t b, int64_t tile) {
    const AttentionShape& a = plan.a;
    Sight s;
    s.first = tile * kQueries;
    s.queries = std::min(kQueries, a.T - s.first);
    s.columns = round_up(s.queries, Compute<kBf16>::kAlign);
    const int64_t low = plan.window_start(s.first), high = plan.window_start(s.first + s.queries - 1);
    const int32_t* positions = pivots.positions + b * a.P;
    const auto before = [&](int64_t position) {
        int64_t from = 0, to = pivots.counts[b];
        while (from < to) {
            const int64_t middle = (from + to) / 2;
            if (positions[middle] < position)
                from = middle + 1;
            else
                to = middle;
        }
        return from;
    };
    s.far = round_up(before(high), kTile);
    s.far_unmasked = before(low);
    s.begin = round_down(low, kTile);
    s.end = round_up(s.first + s.queries, kTile);
    s.unmasked_begin = high;
    s.unmasked_end = s.first;
    return s;
}

// What belongs to the queries of a tile, a lane each.
struct Lanes {
    alignas(64) int32_t position[kQueries];
    alignas(64) int32_t window_start[kQueries];
    alignas(64) uint32_t r0[kQueries], r1[kQueries];  // dropout
    alignas(64) float max[kQueries], sum[kQueries];   // forward
    // Backward; lse in powers of 2, as a sum of two.
    alignas(64) float lse[kQueries], lse_low[kQueries], delta[kQueries];
};

template <bool kBf16>
void start_lanes(const Plan<kBf16>& plan, const Sight& s, int64_t b, int64_t h, Lanes& lanes) {
    for (int64_t c = 0; c < s.columns; ++c) {
        const int64_t query = s.first + c;
        lanes.position[c] = int32_t(query);
        lanes.window_start[c] = int32_t(plan.window_start(query));
        lanes.max[c] = -kInf;
        lanes.sum[c] = 0.0f;
        lanes.lse[c] = lanes.lse_low[c] = lanes.delta[c] = 0.0f;
        if (plan.a.drop_below != 0) {
            const RowWords words = philox(plan.a.seed, uint32_t(query), uint32_t(h), uint32_t(b));
            lanes.r0[c] = words.r0;
            lanes.r1[c] = words.r1;
        }
    }
}

template <typename V, typename E>
inline V lane_vector(const E* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

template <int kN>
struct Count {
    static constexpr int value = kN;
};

// A run of slots that are all far or all of the window: the rows of one score tile.
struct Run {
    int64_t slot, rows;
    bool far;
    int64_t begin, end;  // rows that need no mask
};

// Calls body(run) for runs of at most `most` slots, far ones first.
template <bool kBf16, typename Body>
inline void for_each_run(const Plan<kBf16>& plan, const Sight& s, int64_t most, const Body& body) {
    const auto clamp = [](int64_t x, int64_t rows) { return std::min(std::max<int64_t>(x, 0), rows); };
    for (int64_t from = 0; from < s.far; from += most) {
        const int64_t rows = std::min(most, s.far - from);
        body(Run{from, rows, true, 0, clamp(s.far_unmasked - from, rows)});
    }
    for (int64_t from = s.begin; from < s.end; from += most) {
        const int64_t rows = std::min(most, s.end - from);
        body(Run{plan.Pp + from, rows, false, clamp(s.unmasked_begin - from, rows),
                 clamp(s.unmasked_end - from, rows)});
    }
}

template <bool kBf16>
inline int32_t slot_position(const Plan<kBf16>& plan, const SortedPivots& pivots, int64_t b, int64_t slot) {
    if (slot >= plan.Pp) return int32_t(slot - plan.Pp);
    return slot < pivots.counts[b] ? pivots.positions[b * plan.a.P + slot] : int32_t(kNowhere);
}

// scores = -inf where a query does not see a key.
template <bool kBf16>
void mask_scores(const Plan<kBf16>& plan, const SortedPivots& pivots, const Run& run, int64_t b,
                 const Lanes& lanes, int64_t columns, float* scores) {
    for (int64_t r = 0; r < run.rows; ++r) {
        if (r >= run.begin && r < run.end) continue;
        const VecI key = VecI{} + slot_position(plan, pivots, b, run.slot + r);
        for (int64_t c = 0; c < columns; c += kLanes) {
            const VecI start = lane_vector<VecI>(lanes.window_start + c);
            const VecI last = lane_vector<VecI>(lanes.position + c);
            const VecI seen = run.far ? VecI(key < start) : VecI((key >= start) & (key <= last));
            float* p = scores + r * columns + c;
            store(p, seen ? load(p) : broadcast(-kInf));
        }
    }
}

// ---- forward

// Raises the maxima to what a new score tile needs. The old ones do while no score passes them by more than
// 2^8: sums and products stay far below overflow, and the rare change rescales what is summed.
template <int kVectors>
bool raise_max(const float* scores, int64_t rows, int64_t columns, float factor, float bias, int64_t c,
               Lanes& lanes, float* rescale) {
    VecF top[kVectors];
    for (int i = 0; i < kVectors; ++i) top[i] = broadcast(-kInf);
    for (int64_t r = 0; r < rows; ++r)
        for (int i = 0; i < kVectors; ++i)
            top[i] = maximum(load(scores + r * columns + c + i * kLanes), top[i]);
    VecI changed = VecI{};
    for (int i = 0; i < kVectors; ++i) {
        const int64_t at = c + i * kLanes;
        const VecF wanted = top[i] * factor + bias, old = load(lanes.max + at);
        const VecI raise = wanted > old + 8.0f;
        // From -inf (nothing seen yet) the factor is 0, and there is nothing to rescale.
        store(rescale + at, raise ? exp2(old - wanted) : broadcast(1.0f));
        store(lanes.max + at, raise ? wanted : old);
        changed |= raise;
    }
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= changed[i];
    return any != 0;
}

// Scores become weights 2^(exponent - max), in the order of a B operand with keys contracted.
template <bool kBf16, bool kDropout, int kVectors>
void exponentiate(const Plan<kBf16>& plan, const SortedPivots& pivots, const Run& run, int64_t b,
                  int64_t columns, int64_t c, Lanes& lanes, float* scores) {
    Exponent<kBf16> exponent[kVectors];
    VecF sum[kVectors];
    for (int i = 0; i < kVectors; ++i) {
        const VecF max = load(lanes.max + c + i * kLanes);
        exponent[i] = plan.exponent(run.far, max == -kInf ? VecF{} : max, VecF{});
        sum[i] = load(lanes.sum + c + i * kLanes);
    }
    const auto kept = [&](VecF p, int64_t r, int i) {
        if (!kDropout) return p;
        const VecU key = VecU{} + uint32_t(slot_position(plan, pivots, b, run.slot + r));
        const VecU r0 = lane_vector<VecU>(lanes.r0 + c + i * kLanes);
        const VecU r1 = lane_vector<VecU>(lanes.r1 + c + i * kLanes);
        return keep_mask(r0, r1, key, plan.a.drop_below) ? p : VecF{};
    };
    for (int64_t r = 0; r < run.rows; r += 2) {
        float* first = scores + r * columns + c;
        float* second = first + columns;
        float* pairs = scores + r / 2 * columns + c;
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            const VecF p0 = weight<kBf16>(exponent[i](load(first + i * kLanes)));
            const VecF p1 = weight<kBf16>(exponent[i](load(second + i * kLanes)));
            sum[i] += p0 + p1;
            if constexpr (kBf16) {
                store(pairs + i * kLanes, pair(kept(p0, r, i), kept(p1, r + 1, i)));
            } else {
                store(first + i * kLanes, kept(p0, r, i));
                store(second + i * kLanes, kept(p1, r + 1, i));
            }
        }
    }
    for (int i = 0; i < kVectors; ++i) store(lanes.sum + c + i * kLanes, sum[i]);
}

// Calls body(column, vectors) over a tile's columns, kPanel vectors at a time while there are so many.
template <typename Body>
inline void for_each_column(int64_t columns, const Body& body) {
    int64_t c = 0;
    for (; c + kPanel * kLanes <= columns; c += kPanel * kLanes) body(c, Count<kPanel>{});
    for (; c < columns; c += kLanes) body(c, Count<1>{});
}

// Writes [columns, Dp] floats, given transposed, as rows of T.
template <typename T>
void store_rows(const float* transposed, int64_t queries, int64_t columns, int64_t D, int64_t Dp,
                float factor, float* work, T* to, int64_t stride) {
    transpose(transposed, Dp, columns, columns, work, Dp);
    for (int64_t r = 0; r < queries; ++r) {
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) store(to + r * stride + d, load(work + r * Dp + d) * factor);
        for (; d < D; ++d) from_float(work[r * Dp + d] * factor, &to[r * stride + d]);
    }
}

template <bool kBf16, typename T>
void stage_queries(const Plan<kBf16>& plan, const AttentionInput& x, int64_t b, int64_t h, const Sight& s,
                   bool negate, typename Compute<kBf16>::type* stage) {
    const T* base = static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1];
    for (int64_t c = 0; c < s.columns; ++c)
        stage_row(c < s.queries ? base + (s.first + c) * x.stride[2] : nullptr, plan.a.D, plan.Dp, negate,
                  stage + c * plan.Dp);
}

template <bool kBf16, typename T>
struct Forward {
    using E = typename Compute<kBf16>::type;
    static constexpr int64_t kRun = kBf16 ? 256 : 128;
    static constexpr int64_t kTileUnits = kTile / Compute<kBf16>::kPack;

    const AttentionForward& args;
    const SortedPivots& pivots;
    const Plan<kBf16> plan;

    void run(int threads) {
        const AttentionShape& a = plan.a;
        const int64_t heads = a.B * a.Hkv, head_units = plan.S * plan.Du;
        const Workspace keys(heads * head_units), values(heads * head_units);
        const int64_t tiles = plan.S / kTile;
        const auto packed = [&](int64_t head) {
            return PackedHead{keys.data + head * head_units, values.data + head * head_units};
        };
        parallel_for(heads * tiles, 16, threads, [&](int64_t begin, int64_t end) {
            const Workspace work(kPackFloats * plan.Dp);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t head = i / tiles, b = head / a.Hkv, h = head % a.Hkv;
                pack_tile<kBf16, T>(plan, args.k, pivots, b, h, i % tiles, packed(head), true, false,
                                    work.data);
                pack_tile<kBf16, T>(plan, args.v, pivots, b, h, i % tiles, packed(head), false, true,
                                    work.data);
            }
        });
        parallel_for(a.B * a.H * plan.tiles, 1, threads, [&](int64_t i, int64_t) {
            const TileScope scope;
            const int64_t b = i / plan.tiles / a.H, h = i / plan.tiles % a.H;
            // Long tiles first, so that threads end together.
            tile(b, h, plan.tiles - 1 - i % plan.tiles, packed(b * a.Hkv + h / plan.group));
        });
    }

    void tile(int64_t b, int64_t h, int64_t index, const PackedHead& head) {
        const AttentionShape& a = plan.a;
        const Sight s = sight(plan, pivots, b, index);
        const int64_t N = s.columns, Dp = plan.Dp;
        const Workspace memory((kRun + 3 * Dp) * N);
        float* scores = memory.data;
        float* queries = scores + kRun * N;
        float* out = queries + Dp * N;
        float* work = out + Dp * N;
        Lanes lanes;
        start_lanes(plan, s, b, h, lanes);
        stage_queries<kBf16, T>(plan, args.q, b, h, s, plan.negate, reinterpret_cast<E*>(work));
        pack_b_transposed<kBf16>(reinterpret_cast<E*>(work), N, Dp, queries);

        bool first = true;
        for_each_run(plan, s, kRun, [&](const Run& run) {
            matmul<kBf16>(run.rows, N, plan.Du, {head.rows + run.slot * plan.Du, plan.Du, plan.Du, 0},
                          queries, N, scores, N, false);
            mask_scores(plan, pivots, run, b, lanes, N, scores);
            alignas(64) float rescale[kQueries];
            const float bias = run.far ? plan.bias : 0.0f;
            bool raised = false;
            for_each_column(N, [&](int64_t c, auto vectors) {
                raised |= raise_max<vectors.value>(scores, run.rows, N, plan.factor, bias, c, lanes, rescale);
            });
            if (raised && !first) {
                for (int64_t c = 0; c < N; c += kLanes) {
                    const VecF by = load(rescale + c);
                    store(lanes.sum + c, load(lanes.sum + c) * by);
                    for (int64_t d = 0; d < Dp; ++d) store(out + d * N + c, load(out + d * N + c) * by);
                }
            }
            for_each_column(N, [&](int64_t c, auto vectors) {
                if (a.drop_below != 0)
                    exponentiate<kBf16, true, vectors.value>(plan, pivots, run, b, N, c, lanes, scores);
                else
                    exponentiate<kBf16, false, vectors.value>(plan, pivots, run, b, N, c, lanes, scores);
            });
            matmul<kBf16>(Dp, N, run.rows / Compute<kBf16>::kPack,
                          {head.transposed + run.slot * plan.Du, kTileUnits, kTileUnits, Dp * kTileUnits},
                          scores, N, out, N, !first);
            first = false;
        });

        for (int64_t c = 0; c < N; c += kLanes) {
            const VecF inverse = 1.0f / (load(lanes.sum + c) * (1.0f - a.dropout_p));
            for (int64_t d = 0; d < Dp; ++d) store(out + d * N + c, load(out + d * N + c) * inverse);
        }
        const AttentionOutput& o = args.out;
        T* to = static_cast<T*>(o.data) + b * o.stride[0] + h * o.stride[1] + s.first * o.stride[2];
        store_rows(out, s.queries, N, a.D, Dp, 1.0f, work, to, o.stride[2]);
        float* lse = args.lse + (b * a.H + h) * a.T + s.first;
        for (int64_t c = 0; c < s.queries; ++c)
            lse[c] = float(lanes.max[c] * kLn2 + std::log(double(lanes.sum[c])));
    }
};

// ---- backward

// Query tiles of a head are dealt to `parts`, each of which sums dK and dV of the slots it sees by itself;
// then every key adds up what the parts and its pivot slot hold, always in one order. So neither atomics nor
// a second computation of the scores is needed, and the result does not depend on the threads.
template <bool kBf16, typename T>
struct Backward {
    using E = typename Compute<kBf16>::type;
    static constexpr int64_t kRun = 128;
    static constexpr int64_t kPack = Compute<kBf16>::kPack;
    static constexpr int64_t kTileUnits = kTile / kPack;

    const AttentionBackward& args;
    const SortedPivots& pivots;
    const Plan<kBf16> plan;

    struct Part {
        int64_t first_tile, last_tile;
        int64_t begin, end;  // window positions, whole tiles
        int64_t slots;       // Pp + end - begin
    };

    int64_t parts() const {
        const int64_t heads = plan.a.B * plan.a.Hkv;
        return std::max<int64_t>(1, std::min((32 + heads - 1) / heads, plan.tiles / 4));
    }

    Part part(int64_t index) const {
        Part p;
        p.first_tile = plan.tiles * index / parts();
        p.last_tile = plan.tiles * (index + 1) / parts();
        p.begin = round_down(plan.window_start(p.first_tile * kQueries), kTile);
        p.end = round_up(std::min(plan.a.T, p.last_tile * kQueries), kTile);
        p.slots = plan.Pp + p.end - p.begin;
        return p;
    }

    void run(int threads) {
        const AttentionShape& a = plan.a;
        const int64_t heads = a.B * a.Hkv, head_units = plan.S * plan.Du, n = parts(), tiles = plan.S / kTile;
        int64_t part_slots = 0;
        for (int64_t i = 0; i < n; ++i) part_slots = std::max(part_slots, part(i).slots);
        const int64_t part_floats = 2 * part_slots * plan.Dp;
        // So many heads at a time that their packed keys and partial sums stay within about 64 MB, but enough
        // for every thread.
        const int64_t head_floats = 3 * head_units + n * part_floats;
        const int64_t wanted = std::max((int64_t(16) << 20) / head_floats, (4 * threads + n - 1) / n);
        const int64_t batch = std::max<int64_t>(1, std::min(heads, wanted));
        const Workspace memory(batch * head_floats);
        for (int64_t done = 0; done < heads; done += batch) {
            const int64_t now = std::min(batch, heads - done);
            const auto at = [&](int64_t i) { return memory.data + i * head_floats; };
            const auto keys = [&](int64_t i) { return PackedHead{at(i), at(i) + head_units}; };
            const auto values = [&](int64_t i) { return PackedHead{at(i) + 2 * head_units, nullptr}; };
            const auto sums = [&](int64_t i, int64_t p) { return at(i) + 3 * head_units + p * part_floats; };
            parallel_for(now * tiles, 16, threads, [&](int64_t begin, int64_t end) {
                const Workspace work(kPackFloats * plan.Dp);
                for (int64_t j = begin; j < end; ++j) {
                    const int64_t i = j / tiles, b = (done + i) / a.Hkv, h = (done + i) % a.Hkv;
                    pack_tile<kBf16, T>(plan, args.k, pivots, b, h, j % tiles, keys(i), true, true,
                                        work.data);
                    pack_tile<kBf16, T>(plan, args.v, pivots, b, h, j % tiles, values(i), true, false,
                                        work.data);
                }
            });
            parallel_for(now * n, 1, threads, [&](int64_t j, int64_t) {
                const TileScope scope;
                const int64_t i = j / n, b = (done + i) / a.Hkv, h = (done + i) % a.Hkv;
                compute_part(b, h, part(n - 1 - j % n), keys(i), values(i), sums(i, n - 1 - j % n));
            });
            const int64_t blocks = (a.T + 127) / 128;
            parallel_for(now * blocks, 1, threads, [&](int64_t j, int64_t) {
                const int64_t i = j / blocks;
                for (int64_t t = j % blocks * 128; t < std::min(a.T, (j % blocks + 1) * 128); ++t)
                    write_key((done + i) / a.Hkv, (done + i) % a.Hkv, t, n, sums(i, 0), part_floats);
            });
        }
    }

    // Sums of dK, then of dV, over the queries of a part: [slots, Dp] each.
    void compute_part(int64_t b, int64_t hkv, const Part& p, const PackedHead& keys, const PackedHead& values,
                      float* sums) {
        const int64_t Dp = plan.Dp;
        std::memset(sums, 0, 2 * p.slots * Dp * sizeof(float));
        const Workspace memory((4 * kRun + 8 * Dp) * kQueries);
        for (int64_t h = hkv * plan.group; h < (hkv + 1) * plan.group; ++h)
            for (int64_t t = p.first_tile; t < p.last_tile; ++t)
                tile(b, h, t, p, keys, values, sums, sums + p.slots * Dp, memory.data);
    }

    void tile(int64_t b, int64_t h, int64_t index, const Part& part, const PackedHead& keys,
              const PackedHead& values, float* dk, float* dv, float* memory) {
        const AttentionShape& a = plan.a;
        const Sight s = sight(plan, pivots, b, index);
        const int64_t N = s.columns, Dp = plan.Dp, Nu = N / kPack;
        const auto take = [&memory](int64_t n) {
            float* here = memory;
            memory += n;
            return here;
        };
        float* stage = take(Dp * N);
        float* q_columns = take(Dp * N);
        float* q_rows = take(Dp * N);
        float* dout_columns = take(Dp * N);
        float* dout_rows = take(Dp * N);
        float* dq = take(Dp * N);
        float* scores = take(kRun * N);
        float* dscores = take(kRun * N);
        float* p_pairs = take(kRun * N / 2);
        float* ds_pairs = take(kRun * N / 2);
        float* ds_rows = take(kRun * N / 2);

        Lanes lanes;
        start_lanes(plan, s, b, h, lanes);
        E* staged = reinterpret_cast<E*>(stage);
        stage_queries<kBf16, T>(plan, args.q, b, h, s, plan.negate, staged);
        pack_b_transposed<kBf16>(staged, N, Dp, q_columns);
        pack_b(staged, N, Dp, q_rows);
        stage_queries<kBf16, T>(plan, args.dout, b, h, s, false, staged);
        pack_b_transposed<kBf16>(staged, N, Dp, dout_columns);
        pack_b(staged, N, Dp, dout_rows);
        const AttentionInput &o = args.out, &g = args.dout;
        const T* out =
            static_cast<const T*>(o.data) + b * o.stride[0] + h * o.stride[1] + s.first * o.stride[2];
        const T* dout =
            static_cast<const T*>(g.data) + b * g.stride[0] + h * g.stride[1] + s.first * g.stride[2];
        const int64_t row = (b * a.H + h) * a.T + s.first;
        for (int64_t c = 0; c < s.queries; ++c) {
            const double lse = args.lse[row + c] * kLog2e;
            lanes.lse[c] = float(lse);
            lanes.lse_low[c] = float(lse - lanes.lse[c]);
            lanes.delta[c] = dot(out + c * o.stride[2], dout + c * g.stride[2]) -
                             (args.dlse == nullptr ? 0.0f : args.dlse[row + c]);
        }

        bool first = true;
        for_each_run(plan, s, kRun, [&](const Run& run) {
            matmul<kBf16>(run.rows, N, plan.Du, {keys.rows + run.slot * plan.Du, plan.Du, plan.Du, 0},
                          q_columns, N, scores, N, false);
            matmul<kBf16>(run.rows, N, plan.Du, {values.rows + run.slot * plan.Du, plan.Du, plan.Du, 0},
                          dout_columns, N, dscores, N, false);
            mask_scores(plan, pivots, run, b, lanes, N, scores);
            for_each_column(N, [&](int64_t c, auto vectors) {
                constexpr int n = vectors.value;
                if (a.drop_below != 0)
                    differentiate<true, n>(run, b, lanes, N, c, scores, dscores, p_pairs, ds_pairs, ds_rows);
                else
                    differentiate<false, n>(run, b, lanes, N, c, scores, dscores, p_pairs, ds_pairs, ds_rows);
            });
            const int64_t slot = run.far ? run.slot : run.slot - part.begin;
            const float* p_a = kBf16 ? p_pairs : scores;
            const float* ds_a = kBf16 ? ds_pairs : dscores;
            const float* ds_b = kBf16 ? ds_rows : dscores;
            matmul<kBf16>(run.rows, Dp, Nu, {p_a, Nu, Nu, 0}, dout_rows, Dp, dv + slot * Dp, Dp, true);
            matmul<kBf16>(run.rows, Dp, Nu, {ds_a, Nu, Nu, 0}, q_rows, Dp, dk + slot * Dp, Dp, true);
            matmul<kBf16>(Dp, N, run.rows / kPack,
                          {keys.transposed + run.slot * plan.Du, kTileUnits, kTileUnits, Dp * kTileUnits},
                          ds_b, N, dq, N, !first);
            first = false;
        });
        const AttentionOutput& d = args.dq;
        T* to = static_cast<T*>(d.data) + b * d.stride[0] + h * d.stride[1] + s.first * d.stride[2];
        store_rows(dq, s.queries, N, a.D, Dp, a.scale, stage, to, d.stride[2]);
    }

    float dot(const T* x, const T* y) const {
        VecF sum = VecF{};
        int64_t d = 0;
        for (; d + kLanes <= plan.a.D; d += kLanes) sum += load(x + d) * load(y + d);
        float total = reduce_sum(sum);
        for (; d < plan.a.D; ++d) total += to_float(x[d]) * to_float(y[d]);
        return total;
    }

    // Scores become P, dP becomes dS; as floats in place, as bfloat16 in the orders that the products read:
    // pairs of queries (A operands) and pairs of keys (B operand).
    template <bool kDropout, int kVectors>
    void differentiate(const Run& run, int64_t b, const Lanes& lanes, int64_t N, int64_t c, float* scores,
                       float* dscores, float* p_pairs, float* ds_pairs, float* ds_rows) const {
        const float grow = 1.0f / (1.0f - plan.a.dropout_p);
        Exponent<kBf16> exponent[kVectors];
        VecF delta[kVectors];
        for (int i = 0; i < kVectors; ++i) {
            const int64_t at = c + i * kLanes;
            exponent[i] = plan.exponent(run.far, load(lanes.lse + at), load(lanes.lse_low + at));
            delta[i] = load(lanes.delta + at);
        }
        const auto element = [&](int64_t r, int i, VecF& p, VecF& ds) {
            const int64_t at = r * N + c + i * kLanes;
            p = weight<kBf16>(exponent[i](load(scores + at)));
            VecF dp = load(dscores + at), dropped = p;
            if (kDropout) {
                const VecU key = VecU{} + uint32_t(slot_position(plan, pivots, b, run.slot + r));
                const VecU r0 = lane_vector<VecU>(lanes.r0 + c + i * kLanes);
                const VecU r1 = lane_vector<VecU>(lanes.r1 + c + i * kLanes);
                const VecF by = keep_mask(r0, r1, key, plan.a.drop_below) ? broadcast(grow) : VecF{};
                dp *= by;
                dropped *= by;
            }
            ds = p * (dp - delta[i]);
            p = dropped;
        };
        for (int64_t r = 0; r < run.rows; r += 2) {
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) {
                const int64_t at = r * N + c + i * kLanes;
                VecF p0, p1, ds0, ds1;
                element(r, i, p0, ds0);
                element(r + 1, i, p1, ds1);
                if constexpr (kBf16) {
                    BFloat16* p = reinterpret_cast<BFloat16*>(p_pairs) + at;
                    BFloat16* ds = reinterpret_cast<BFloat16*>(ds_pairs) + at;
                    store_narrow(p, p0);
                    store_narrow(p + N, p1);
                    store_narrow(ds, ds0);
                    store_narrow(ds + N, ds1);
                    store(ds_rows + r / 2 * N + c + i * kLanes, pair(ds0, ds1));
                } else {
                    store(scores + at, p0);
                    store(scores + at + N, p1);
                    store(dscores + at, ds0);
                    store(dscores + at + N, ds1);
                }
            }
        }
    }

    void write_key(int64_t b, int64_t hkv, int64_t t, int64_t n, const float* sums,
                   int64_t part_floats) const {
        const AttentionShape& a = plan.a;
        const int64_t pivot = pivots.slots[b * a.T + t], Dp = plan.Dp;
        const AttentionOutput& x = args.dk;
        const AttentionOutput& y = args.dv;
        T* dk = static_cast<T*>(x.data) + b * x.stride[0] + hkv * x.stride[1] + t * x.stride[2];
        T* dv = static_cast<T*>(y.data) + b * y.stride[0] + hkv * y.stride[1] + t * y.stride[2];
        // Padding of D is summed too: whole vectors.
        alignas(64) float total[2][256 + 32];
        for (int64_t d = 0; d < Dp; d += kLanes) {
            VecF sum_k = VecF{}, sum_v = VecF{};
            for (int64_t i = 0; i < n; ++i) {
                const Part p = part(i);
                const float* part_k = sums + i * part_floats;
                const float* part_v = part_k + p.slots * Dp;
                if (pivot >= 0) {
                    sum_k += load(part_k + pivot * Dp + d);
                    sum_v += load(part_v + pivot * Dp + d);
                }
                if (t >= p.begin && t < p.end) {
                    const int64_t slot = plan.Pp + t - p.begin;
                    sum_k += load(part_k + slot * Dp + d);
                    sum_v += load(part_v + slot * Dp + d);
                }
            }
            const float scale = plan.negate ? -a.scale : a.scale;  // the sign is in Q
            store(total[0] + d, sum_k * scale);
            store(total[1] + d, sum_v);
        }
        for (int64_t d = 0; d < a.D; ++d) {
            from_float(total[0][d], dk + d);
            from_float(total[1][d], dv + d);
        }
    }
};

}  // namespace

void three_region_attention_fwd_cpu(const AttentionForward& args, const SortedPivots& pivots, int threads) {
    if constexpr (kHasBf16) {
        if (args.shape.dtype == DType::kBFloat16)
            return Forward<true, BFloat16>{args, pivots, Plan<true>(args.shape)}.run(threads);
    }
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype,
                           Forward<false, scalar_t>{args, pivots, Plan<false>(args.shape)}.run(threads));
}

void three_region_attention_bwd_cpu(const AttentionBackward& args, const SortedPivots& pivots, int threads) {
    if constexpr (kHasBf16) {
        if (args.shape.dtype == DType::kBFloat16)
            return Backward<true, BFloat16>{args, pivots, Plan<true>(args.shape)}.run(threads);
    }
    COGVIEW_DISPATCH_DTYPE(args.shape.dtype,
                           Backward<false, scalar_t>{args, pivots, Plan<false>(args.shape)}.run(threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
