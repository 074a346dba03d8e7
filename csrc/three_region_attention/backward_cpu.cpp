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

constexpr int64_t kRun = 128;       // slots of a score tile, at most
constexpr int64_t kMostParts = 32;  // of a head

// The query tiles [first_tile, last_tile) of a head, and the slots that they see.
struct HeadPart {
    int64_t first_tile, last_tile;
    int64_t begin, end;  // window positions, whole tiles
    int64_t slots;       // Pp + end - begin
};

template <bool kBf16>
int64_t part_count(const Plan<kBf16>& plan) {
    const int64_t heads = plan.B * plan.Hkv;
    return std::max<int64_t>(1, std::min((kMostParts + heads - 1) / heads, plan.tiles / 4));
}

template <bool kBf16>
HeadPart part_of(const Plan<kBf16>& plan, int64_t parts, int64_t index, int64_t b) {
    const int64_t origin = plan.origin_of(b);
    HeadPart p;
    p.first_tile = plan.tiles * index / parts;
    p.last_tile = plan.tiles * (index + 1) / parts;
    const int64_t last = std::min(plan.T, p.last_tile * kQueries) - 1;
    p.begin = round_down(plan.window_start(p.first_tile * kQueries, origin), kTile);
    p.end = std::max(p.begin, round_up(plan.window_last(last, origin) + 1, kTile));
    p.slots = plan.Pp + p.end - p.begin;
    return p;
}

// The packed keys and values of a head, as rows, and the keys in the order for contraction.
struct PackedHead {
    float *keys, *values, *contracted;
};

// What a run is worked on in, N columns wide.
struct RunMemory {
    float *scores, *dscores;  // [kRun, N]
    // As bfloat16: pairs of queries (A operands) and of keys (a B operand).
    float *p_pairs, *ds_pairs, *ds_rows;  // [kRun / 2, N]
};

// Where a query tile keeps what it works on, N columns wide.
template <bool kBf16>
struct TileMemory {
    // Products of a run are made beside the exponentials of the next one, or of the one before.
    static constexpr int kBuffers = Product<kBf16>::kSteps ? 2 : 1;
    float *stage, *q_columns, *q_rows, *dout_columns, *dout_rows, *dq;  // [Dp, N]
    RunMemory runs[kBuffers];

    static int64_t floats(int64_t Dp, int64_t N) {
        return (kBuffers * (kBf16 ? 7 * kRun / 2 : 2 * kRun) + 6 * Dp) * N;
    }
    TileMemory(float* memory, int64_t Dp, int64_t N) {
        const auto take = [&memory](int64_t n) {
            float* here = memory;
            memory += n;
            return here;
        };
        for (float** p : {&stage, &q_columns, &q_rows, &dout_columns, &dout_rows, &dq}) *p = take(Dp * N);
        for (RunMemory& run : runs) {
            run = {};
            for (float** p : {&run.scores, &run.dscores}) *p = take(kRun * N);
            if (kBf16)
                for (float** p : {&run.p_pairs, &run.ds_pairs, &run.ds_rows}) *p = take(kRun * N / 2);
        }
    }
    const RunMemory& of_run(int64_t i) const { return runs[i % kBuffers]; }
};

template <bool kBf16, typename T>
struct Backward {
    using E = typename Compute<kBf16>::type;
    static constexpr bool kOverlaps = Product<kBf16>::kSteps;
    static constexpr int64_t kPack = Compute<kBf16>::kPack;

    const AttentionBackward& args;
    const Plan<kBf16> plan;
    const int64_t parts = part_count(plan);
    const int64_t sums_floats = part_floats();  // of a part

    bool wants_dq() const { return args.dq.data != nullptr; }
    bool wants_dk() const { return args.dk.data != nullptr; }
    bool wants_dv() const { return args.dv.data != nullptr; }

    void run(int threads) {
        const int64_t heads = plan.B * plan.Hkv;
        // So many heads at a time that their packed keys and partial sums stay within about 64 MB, but enough
        // for every thread.
        const int64_t most = std::max((int64_t(16) << 20) / head_floats(), (4 * threads + parts - 1) / parts);
        for_each_head(heads, std::max<int64_t>(1, std::min(heads, most)), threads,
                      [&](int64_t first, int64_t count, int own) { some_heads(first, count, own); });
    }

    int64_t part_floats() const {
        int64_t slots = 0;
        for (int64_t i = 0; i < plan.B * parts; ++i)
            slots = std::max(slots, part_of(plan, parts, i % parts, i / parts).slots);
        return 2 * slots * plan.Dp;
    }
    int64_t head_floats() const { return (kBf16 ? 3 : 2) * plan.S * plan.Du + parts * sums_floats; }

    void some_heads(int64_t first, int64_t count, int threads) {
        const int64_t head_units = plan.S * plan.Du, slot_tiles = plan.S / kTile;
        const int64_t tile_units = kTile * plan.Du;
        const Workspace memory(count * head_floats());
        const auto at = [&](int64_t i) { return memory.data + i * head_floats(); };
        const auto packed = [&](int64_t i) {
            float* keys = at(i) + head_units;
            return PackedHead{keys, at(i), kBf16 ? keys + head_units : keys};
        };
        const auto sums = [&](int64_t i) { return at(i) + (kBf16 ? 3 : 2) * head_units; };
        const auto sample = [&](int64_t i) { return (first + i) / plan.Hkv; };
        const auto head = [&](int64_t i) { return (first + i) % plan.Hkv; };
        parallel_for(count * slot_tiles, 16, threads, [&](int64_t begin, int64_t end) {
            const Workspace work(tile_units);
            for (int64_t j = begin; j < end; ++j) {
                const int64_t i = j / slot_tiles, tile = j % slot_tiles, from = tile * tile_units;
                const PackedHead to = packed(i);
                pack_rows<kBf16, T>(plan, args.common.k, sample(i), head(i), tile, to.keys + from);
                pack_rows<kBf16, T>(plan, args.common.v, sample(i), head(i), tile, to.values + from);
                if constexpr (kBf16) pack_contracted(plan, to.keys + from, to.contracted + from, work.data);
            }
        });
        parallel_for(count * parts, 1, threads, [&](int64_t j, int64_t) {
            const TileScope scope;
            const int64_t i = j / parts, last = parts - 1 - j % parts;
            compute_part(sample(i), head(i), part_of(plan, parts, last, sample(i)), packed(i),
                         sums(i) + last * sums_floats);
        });
        if (!wants_dk() && !wants_dv()) return;
        const int64_t blocks = (plan.T + 127) / 128;
        parallel_for(count * blocks, 1, threads, [&](int64_t j, int64_t) {
            const int64_t i = j / blocks, block = j % blocks;
            write_keys(sample(i), head(i), block * 128, std::min(plan.T, (block + 1) * 128), sums(i));
        });
    }

    // Sums of dK, then of dV, over the queries of a part: [slots, Dp] each.
    void compute_part(int64_t b, int64_t hkv, const HeadPart& part, const PackedHead& head, float* sums) {
        std::memset(sums, 0, 2 * part.slots * plan.Dp * sizeof(float));
        const Workspace memory(TileMemory<kBf16>::floats(plan.Dp, kQueries));
        for (int64_t h = hkv * plan.group; h < (hkv + 1) * plan.group; ++h)
            for (int64_t t = part.first_tile; t < part.last_tile; ++t)
                tile(b, h, t, part, head, sums, memory.data);
    }

    void tile(int64_t b, int64_t h, int64_t index, const HeadPart& part, const PackedHead& head, float* sums,
              float* memory) {
        const Sight s = sight(plan, b, index);
        const int64_t N = s.columns, Dp = plan.Dp;
        const TileMemory<kBf16> m(memory, Dp, N);
        Lanes lanes;
        load_queries(b, h, s, m, lanes);
        float *dk = sums, *dv = sums + part.slots * Dp;

        // What is multiplied beside the exponentials of a run: first the sums over the run before, then the
        // scores of the run behind.
        Product<kBf16> pending[5];
        int all = 0;
        const auto score = [&](const Run& run, const RunMemory& to) {
            const int64_t c = run.column;
            const auto add = [&](const float* rows, const float* columns, float* product) {
                pending[all++] = {run.rows,    N - c, plan.Du, rows_of(plan, rows, run), columns + c, N,
                                  product + c, N,     false};
            };
            add(head.keys, m.q_columns, to.scores);
            if (wants_dq() || wants_dk()) add(head.values, m.dout_columns, to.dscores);
        };
        const auto sum = [&](const Run& run, const RunMemory& from, bool accumulate) {
            const int64_t slot = run.far ? run.slot : run.slot - part.begin;
            const int64_t c = run.column, cu = c / kPack, K = (N - c) / kPack;
            const auto add_rows = [&](const float* a, const float* rows, float* total) {
                const MatmulA columns = {a + cu, N / kPack, K, 0};
                pending[all++] = {run.rows, Dp, K, columns, rows + cu * Dp, Dp, total + slot * Dp, Dp, true};
            };
            if (wants_dv()) add_rows(kBf16 ? from.p_pairs : from.scores, m.dout_rows, dv);
            if (wants_dk()) add_rows(kBf16 ? from.ds_pairs : from.dscores, m.q_rows, dk);
            if (wants_dq())
                pending[all++] = {Dp,
                                  N - c,
                                  run.rows / kPack,
                                  contracted_of(plan, head.contracted, run),
                                  (kBf16 ? from.ds_rows : from.dscores) + c,
                                  N,
                                  m.dq + c,
                                  N,
                                  accumulate};
        };
        const auto finish = [&] {
            for (int i = 0; i < all; ++i) pending[i].finish();
            all = 0;
        };
        Runs<kBf16> runs(plan, s, kRun);
        Run run, next;
        bool more = runs.next(run);
        const bool blind = !more;
        if (more) score(run, m.of_run(0));
        if constexpr (kOverlaps) finish();
        for (int64_t i = 0; more; ++i) {
            const RunMemory& now = m.of_run(i);
            if constexpr (!kOverlaps) finish();
            more = runs.next(next);
            if (kOverlaps && more) score(next, m.of_run(i + 1));
            mask_scores(plan, run, b, lanes, N, now.scores);
            Spread<kBf16> products(pending, all, column_groups(run.column, N) * run.rows / 2);
            for_each_column(run.column, N, [&](int64_t c, auto vectors) {
                constexpr int n = vectors.value;
                if (args.common.dropout.drops())
                    differentiate<true, n>(run, b, lanes, N, c, now, products);
                else
                    differentiate<false, n>(run, b, lanes, N, c, now, products);
            });
            all = 0;
            sum(run, now, i > 0);
            if constexpr (!kOverlaps) {
                finish();
                if (more) score(next, now);
            }
            run = next;
        }
        finish();
        if (blind) std::memset(m.dq, 0, Dp * N * sizeof(float));
        if (wants_dq()) store_queries<kBf16, T>(plan, m.dq, args.dq, b, h, s, args.common.scale, m.stage);
    }

    // What a tile needs of its queries: q and dout in both orders, lse and delta.
    void load_queries(int64_t b, int64_t h, const Sight& s, const TileMemory<kBf16>& m, Lanes& lanes) const {
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
        for (int64_t c = s.blind; c < s.queries; ++c) {
            const double lse = args.lse[row + c] * kLog2e;
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
                       const RunMemory& m, Spread<kBf16>& products) const {
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
            products.turn();
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

    // What the parts of a head hold of the keys [begin, end): of their window slots and, for pivots, far
    // slots.
    void write_keys(int64_t b, int64_t hkv, int64_t begin, int64_t end, const float* sums) const {
        const int64_t Dp = plan.Dp;
        HeadPart all[kMostParts];
        for (int64_t i = 0; i < parts; ++i) all[i] = part_of(plan, parts, i, b);
        for (int64_t t = begin; t < end; ++t) {
            const int64_t rank = plan.sorted_pivots.rank_of_pivot[b * plan.T + t];
            const float *rows_k[2 * kMostParts], *rows_v[2 * kMostParts];
            int count = 0;
            for (int64_t i = 0; i < parts; ++i) {
                const float* part = sums + i * sums_floats;
                const auto add = [&](int64_t slot) {
                    rows_k[count] = part + slot * Dp;
                    rows_v[count++] = part + (all[i].slots + slot) * Dp;
                };
                if (rank >= 0) add(rank);
                if (t >= all[i].begin && t < all[i].end) add(plan.Pp + t - all[i].begin);
            }
            const float scale = plan.negate ? -args.common.scale : args.common.scale;  // the sign is in Q
            if (wants_dk()) write_sum(rows_k, count, scale, args.dk.row<T>(b, hkv, t));
            if (wants_dv()) write_sum(rows_v, count, 1.0f, args.dv.row<T>(b, hkv, t));
        }
    }

    void write_sum(const float* const* rows, int count, float factor, T* to) const {
        for (int64_t d = 0; d < plan.D; d += kLanes) {
            VecF sum = VecF{};
            for (int i = 0; i < count; ++i) sum += load(rows[i] + d);
            sum *= factor;
            if (d + kLanes <= plan.D)
                store(to + d, sum);
            else
                for (int64_t i = 0; i < plan.D - d; ++i) from_float(sum[i], to + d + i);
        }
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
