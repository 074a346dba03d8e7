// SPDX-License-Identifier: Apache-2.0
// Backward of three-region attention, in the tiles of plan.h:
//
//   S = K Q^T,  dP = V dO^T,  P = 2^(c S + bias - lse),  dS = P (dP - delta),
//   dV += P dO,  dK += dS Q,  dQ^T += K^T dS                  10 D FLOPs a pair, one exponential
//
// with c = |scale| log2(e); a negative scale is put into Q.
//
// Query tiles of a head are dealt to `parts`, each of which sums dK and dV of the slots it sees by itself;
// then every key adds up what the parts and its pivot slot hold, always in one order. So neither atomics nor
// a second computation of the scores is needed, and the result does not depend on the threads.
#include "common/parallel.h"
#include "common/workspace.h"
#include "three_region_attention/tile_rows.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int64_t kRun = 128;  // slots of a score tile, at most

// The query tiles [first_tile, last_tile) of a head, and the slots that they see.
struct Part {
    int64_t first_tile, last_tile;
    int64_t begin, end;  // window positions, whole tiles
    int64_t slots;       // Pp + end - begin
};

template <bool kBf16>
int64_t part_count(const Plan<kBf16>& plan) {
    const int64_t heads = plan.B * plan.Hkv;
    return std::max<int64_t>(1, std::min((32 + heads - 1) / heads, plan.tiles / 4));
}

template <bool kBf16>
Part part_of(const Plan<kBf16>& plan, int64_t parts, int64_t index, int64_t b) {
    const int64_t origin = plan.origin_of(b);
    Part p;
    p.first_tile = plan.tiles * index / parts;
    p.last_tile = plan.tiles * (index + 1) / parts;
    const int64_t last = std::min(plan.T, p.last_tile * kQueries) - 1;
    p.begin = round_down(plan.window_start(p.first_tile * kQueries, origin), kTile);
    p.end = std::max(p.begin, round_up(plan.window_last(last, origin) + 1, kTile));
    p.slots = plan.Pp + p.end - p.begin;
    return p;
}

// Where a query tile keeps what it works on, N columns wide.
struct TileMemory {
    float *stage, *q_columns, *q_rows, *dout_columns, *dout_rows, *dq;  // [Dp, N]
    float *scores, *dscores;                                            // [kRun, N]
    // As bfloat16: pairs of queries (A operands) and of keys (a B operand).
    float *p_pairs, *ds_pairs, *ds_rows;  // [kRun / 2, N]

    static int64_t floats(int64_t Dp, int64_t N) { return (4 * kRun + 6 * Dp) * N; }
    TileMemory(float* memory, int64_t Dp, int64_t N) {
        const auto take = [&memory](int64_t n) {
            float* here = memory;
            memory += n;
            return here;
        };
        for (float** p : {&stage, &q_columns, &q_rows, &dout_columns, &dout_rows, &dq}) *p = take(Dp * N);
        for (float** p : {&scores, &dscores}) *p = take(kRun * N);
        for (float** p : {&p_pairs, &ds_pairs, &ds_rows}) *p = take(kRun * N / 2);
    }
};

template <bool kBf16, typename T>
struct Backward {
    using E = typename Compute<kBf16>::type;
    static constexpr int64_t kPack = Compute<kBf16>::kPack;
    static constexpr int64_t kTileUnits = kTile / kPack;

    const AttentionBackward& args;
    const Plan<kBf16> plan;
    const int64_t parts = part_count(plan);

    bool wants_dq() const { return args.dq.data != nullptr; }
    bool wants_dk() const { return args.dk.data != nullptr; }
    bool wants_dv() const { return args.dv.data != nullptr; }

    void run(int threads) {
        const int64_t heads = plan.B * plan.Hkv, head_units = plan.S * plan.Du, tiles = plan.S / kTile;
        int64_t part_slots = 0;
        for (int64_t i = 0; i < plan.B * parts; ++i)
            part_slots = std::max(part_slots, part_of(plan, parts, i % parts, i / parts).slots);
        const int64_t part_floats = 2 * part_slots * plan.Dp;
        // So many heads at a time that their packed keys and partial sums stay within about 64 MB, but enough
        // for every thread.
        const int64_t head_floats = 3 * head_units + parts * part_floats;
        const int64_t wanted = std::max((int64_t(16) << 20) / head_floats, (4 * threads + parts - 1) / parts);
        const int64_t batch = std::max<int64_t>(1, std::min(heads, wanted));
        const Workspace memory(batch * head_floats);
        for (int64_t done = 0; done < heads; done += batch) {
            const int64_t now = std::min(batch, heads - done);
            const auto at = [&](int64_t i) { return memory.data + i * head_floats; };
            const auto keys = [&](int64_t i) { return PackedHead{at(i), at(i) + head_units}; };
            const auto values = [&](int64_t i) { return PackedHead{at(i) + 2 * head_units, nullptr}; };
            const auto sums = [&](int64_t i) { return at(i) + 3 * head_units; };
            const auto sample = [&](int64_t i) { return (done + i) / plan.Hkv; };
            const auto head = [&](int64_t i) { return (done + i) % plan.Hkv; };
            parallel_for(now * tiles, 16, threads, [&](int64_t begin, int64_t end) {
                const Workspace work(kPackFloats * plan.Dp);
                for (int64_t j = begin; j < end; ++j) {
                    const int64_t i = j / tiles;
                    pack_tile<kBf16, T>(plan, args.common.k, sample(i), head(i), j % tiles, keys(i),
                                        Order::kBoth, work.data);
                    pack_tile<kBf16, T>(plan, args.common.v, sample(i), head(i), j % tiles, values(i),
                                        Order::kRows, work.data);
                }
            });
            parallel_for(now * parts, 1, threads, [&](int64_t j, int64_t) {
                const TileScope scope;
                const int64_t i = j / parts, last = parts - 1 - j % parts;
                compute_part(sample(i), head(i), part_of(plan, parts, last, sample(i)), keys(i), values(i),
                             sums(i) + last * part_floats);
            });
            if (!wants_dk() && !wants_dv()) continue;
            const int64_t blocks = (plan.T + 127) / 128;
            parallel_for(now * blocks, 1, threads, [&](int64_t j, int64_t) {
                const int64_t i = j / blocks, block = j % blocks;
                for (int64_t t = block * 128; t < std::min(plan.T, (block + 1) * 128); ++t)
                    write_key(sample(i), head(i), t, sums(i), part_floats);
            });
        }
    }

    // Sums of dK, then of dV, over the queries of a part: [slots, Dp] each.
    void compute_part(int64_t b, int64_t hkv, const Part& part, const PackedHead& keys,
                      const PackedHead& values, float* sums) {
        std::memset(sums, 0, 2 * part.slots * plan.Dp * sizeof(float));
        const Workspace memory(TileMemory::floats(plan.Dp, kQueries));
        for (int64_t h = hkv * plan.group; h < (hkv + 1) * plan.group; ++h)
            for (int64_t t = part.first_tile; t < part.last_tile; ++t)
                tile(b, h, t, part, keys, values, sums, memory.data);
    }

    void tile(int64_t b, int64_t h, int64_t index, const Part& part, const PackedHead& keys,
              const PackedHead& values, float* sums, float* memory) {
        const Sight s = sight(plan, b, index);
        const int64_t N = s.columns, Dp = plan.Dp, Nu = N / kPack;
        const TileMemory m(memory, Dp, N);
        Lanes lanes;
        load_queries(b, h, s, m, lanes);
        float *dk = sums, *dv = sums + part.slots * Dp;

        bool first = true;
        for_each_run(plan, s, kRun, [&](const Run& run) {
            matmul<kBf16>(run.rows, N, plan.Du, {keys.rows + run.slot * plan.Du, plan.Du, plan.Du, 0},
                          m.q_columns, N, m.scores, N, false);
            if (wants_dq() || wants_dk())
                matmul<kBf16>(run.rows, N, plan.Du, {values.rows + run.slot * plan.Du, plan.Du, plan.Du, 0},
                              m.dout_columns, N, m.dscores, N, false);
            mask_scores(plan, run, b, lanes, N, m.scores);
            for_each_column(N, [&](int64_t c, auto vectors) {
                constexpr int n = vectors.value;
                if (args.common.dropout.drops())
                    differentiate<true, n>(run, b, lanes, N, c, m);
                else
                    differentiate<false, n>(run, b, lanes, N, c, m);
            });
            const int64_t slot = run.far ? run.slot : run.slot - part.begin;
            const float* p_a = kBf16 ? m.p_pairs : m.scores;
            const float* ds_a = kBf16 ? m.ds_pairs : m.dscores;
            const float* ds_b = kBf16 ? m.ds_rows : m.dscores;
            if (wants_dv())
                matmul<kBf16>(run.rows, Dp, Nu, {p_a, Nu, Nu, 0}, m.dout_rows, Dp, dv + slot * Dp, Dp, true);
            if (wants_dk())
                matmul<kBf16>(run.rows, Dp, Nu, {ds_a, Nu, Nu, 0}, m.q_rows, Dp, dk + slot * Dp, Dp, true);
            if (wants_dq())
                matmul<kBf16>(Dp, N, run.rows / kPack,
                              {keys.transposed + run.slot * plan.Du, kTileUnits, kTileUnits, Dp * kTileUnits},
                              ds_b, N, m.dq, N, !first);
            first = false;
        });
        if (first) std::memset(m.dq, 0, Dp * N * sizeof(float));
        if (wants_dq()) store_queries<kBf16, T>(plan, m.dq, args.dq, b, h, s, args.common.scale, m.stage);
    }

    // What a tile needs of its queries: q and dout in both orders, lse and delta.
    void load_queries(int64_t b, int64_t h, const Sight& s, const TileMemory& m, Lanes& lanes) const {
        const int64_t N = s.columns, Dp = plan.Dp;
        start_lanes(plan, s, b, h, lanes);
        E* staged = reinterpret_cast<E*>(m.stage);
        stage_queries<kBf16, T>(plan, args.common.q, b, h, s, plan.negate, staged);
        pack_b_transposed<kBf16>(staged, N, Dp, m.q_columns);
        pack_b(staged, N, Dp, m.q_rows);
        stage_queries<kBf16, T>(plan, args.dout, b, h, s, false, staged);
        pack_b_transposed<kBf16>(staged, N, Dp, m.dout_columns);
        pack_b(staged, N, Dp, m.dout_rows);
        const int64_t row = (b * plan.H + h) * plan.T + s.first;
        for (int64_t c = 0; c < s.queries; ++c) {
            // -inf where nothing is seen: all probabilities are then to be 0.
            const double lse = c < s.blind ? std::numeric_limits<float>::max() : args.lse[row + c] * kLog2e;
            lanes.lse[c] = float(lse);
            lanes.lse_low[c] = float(lse - lanes.lse[c]);
            const T* out = args.out.row<T>(b, h, s.first + c);
            lanes.delta[c] = dot(out, args.dout.row<T>(b, h, s.first + c), plan.D) -
                             (args.dlse == nullptr ? 0.0f : args.dlse[row + c]);
        }
    }

    // Scores become P, dP becomes dS; as floats in place, as bfloat16 in the orders that the products read.
    template <bool kDropout, int kVectors>
    void differentiate(const Run& run, int64_t b, const Lanes& lanes, int64_t N, int64_t c,
                       const TileMemory& m) const {
        Exponent<kBf16> exponent[kVectors];
        VecF delta[kVectors];
        for (int i = 0; i < kVectors; ++i) {
            const int64_t at = c + i * kLanes;
            exponent[i] = plan.exponent(run.far, load(lanes.lse + at), load(lanes.lse_low + at));
            delta[i] = load(lanes.delta + at);
        }
        const auto element = [&](int64_t r, int i, VecF& p, VecF& ds) {
            const int64_t at = r * N + c + i * kLanes;
            p = weight<kBf16>(exponent[i](load(m.scores + at)));
            VecF dp = load(m.dscores + at), dropped = p;
            if (kDropout) {
                const VecF scale = broadcast(args.common.dropout.keep_scale);
                const VecF by = keeps(plan, run, r, b, lanes, c + i * kLanes) ? scale : VecF{};
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
                    BFloat16* p = reinterpret_cast<BFloat16*>(m.p_pairs) + at;
                    BFloat16* ds = reinterpret_cast<BFloat16*>(m.ds_pairs) + at;
                    store_narrow(p, p0);
                    store_narrow(p + N, p1);
                    store_narrow(ds, ds0);
                    store_narrow(ds + N, ds1);
                    store(m.ds_rows + r / 2 * N + c + i * kLanes, pair(ds0, ds1));
                } else {
                    store(m.scores + at, p0);
                    store(m.scores + at + N, p1);
                    store(m.dscores + at, ds0);
                    store(m.dscores + at + N, ds1);
                }
            }
        }
    }

    // dk and dv of position t: what the parts hold of its window slot and, for a pivot, of its far slot.
    void write_key(int64_t b, int64_t hkv, int64_t t, const float* sums, int64_t part_floats) const {
        const int64_t rank = plan.sorted_pivots.rank_of_pivot[b * plan.T + t], Dp = plan.Dp;
        // Padding of D is summed too: whole vectors.
        alignas(64) float total[2][256 + 32];
        for (int64_t d = 0; d < Dp; d += kLanes) {
            VecF sum_k = VecF{}, sum_v = VecF{};
            for (int64_t i = 0; i < parts; ++i) {
                const Part p = part_of(plan, parts, i, b);
                const float* part_k = sums + i * part_floats;
                const float* part_v = part_k + p.slots * Dp;
                if (rank >= 0) {
                    sum_k += load(part_k + rank * Dp + d);
                    sum_v += load(part_v + rank * Dp + d);
                }
                if (t >= p.begin && t < p.end) {
                    const int64_t slot = plan.Pp + t - p.begin;
                    sum_k += load(part_k + slot * Dp + d);
                    sum_v += load(part_v + slot * Dp + d);
                }
            }
            const float scale = plan.negate ? -args.common.scale : args.common.scale;  // the sign is in Q
            store(total[0] + d, sum_k * scale);
            store(total[1] + d, sum_v);
        }
        const auto write = [&](const float* from, T* to) {
            for (int64_t d = 0; d < plan.D; ++d) from_float(from[d], to + d);
        };
        if (wants_dk()) write(total[0], args.dk.row<T>(b, hkv, t));
        if (wants_dv()) write(total[1], args.dv.row<T>(b, hkv, t));
    }
};

template <bool kBf16, typename T>
void run(const AttentionBackward& args, const SortedPivots& sorted_pivots, int threads) {
    Backward<kBf16, T>{args, Plan<kBf16>(args.common, sorted_pivots)}.run(threads);
}

}  // namespace

void three_region_attention_bwd_cpu(const AttentionBackward& args, const SortedPivots& sorted_pivots,
                                    int threads) {
    if constexpr (kHasBf16) {
        if (args.common.dtype == DType::kBFloat16) return run<true, BFloat16>(args, sorted_pivots, threads);
    }
    COGVIEW_DISPATCH_DTYPE(args.common.dtype, run<false, scalar_t>(args, sorted_pivots, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
