// SPDX-License-Identifier: Apache-2.0
// Backward of local attention in two dimensions, in the tiles of tiles.h:
//
//   S = K Q^T,  dP = V dO^T,  P = 2^(c S - lse),  dS = P (dP - delta),
//   dV += P dO,  dK += dS Q,  dQ^T += K^T dS                  10 D FLOPs a pair, one exponential
//
// with c = |scale| log2(e); a negative scale is put into Q.
//
// The rows of tiles of a head are dealt to `parts`, each of which sums dK and dV of the keys it sees by
// itself; then every key adds up what the parts hold, always in one order. So neither atomics nor a second
// computation of the scores is needed, and the result does not depend on the threads.
#include "common/parallel.h"
#include "common/workspace.h"
#include "local_attention_2d/tiles.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// The rows of tiles [first, end) of a head, and the keys that they see.
struct HeadPart {
    int64_t first, end;
    Range rows;  // of the grid of keys

    // Where a part keeps its sum for the first key of a slot's row.
    int64_t place(const Plan& plan, int64_t slot) const {
        if (slot >= plan.grid) return (rows.end - rows.begin) * plan.window.width + slot - plan.grid;
        return slot - rows.begin * plan.window.width;
    }
    int64_t keys(const Plan& plan) const { return place(plan, plan.slots); }
};

inline int64_t part_count(const Plan& plan) {
    const int64_t heads = plan.B * plan.Hkv;
    return std::max<int64_t>(1, std::min((32 + heads - 1) / heads, plan.tiles_down / 2));
}

inline HeadPart part_of(const Plan& plan, int64_t parts, int64_t index) {
    HeadPart p;
    p.first = plan.tiles_down * index / parts;
    p.end = plan.tiles_down * (index + 1) / parts;
    p.rows =
        plan.key_rows(p.first * plan.tile_height, std::min(plan.query_height, p.end * plan.tile_height) - 1);
    return p;
}

// Where a tile keeps what it works on.
struct TileMemory {
    float *q_rows, *q_columns, *dout_rows, *dout_columns, *dq, *work;  // [kQueries, Dp], [Dp, kQueries]
    float *scores, *dscores;                                           // [kRun, kQueries]

    static int64_t floats(int64_t Dp) { return (2 * kRun + 6 * Dp) * kQueries; }
    TileMemory(float* memory, int64_t Dp) {
        for (float** p : {&q_rows, &q_columns, &dout_rows, &dout_columns, &dq, &work}) {
            *p = memory;
            memory += Dp * kQueries;
        }
        scores = memory;
        dscores = memory + kRun * kQueries;
    }
};

// What is read and written of one key head.
struct HeadMemory {
    float *keys, *values, *sums;  // [slots, Dp]; of each part dK, then dV, [keys, Dp]
};

template <typename T>
struct Backward {
    const LocalAttentionBackward& args;
    const Plan plan;
    const int64_t parts = part_count(plan);
    int64_t part_floats = 0, head_floats = 0;  // of what a part and a head need

    void run(int threads) {
        for (int64_t i = 0; i < parts; ++i)
            part_floats = std::max(part_floats, 2 * part_of(plan, parts, i).keys(plan) * plan.Dp);
        head_floats = 2 * plan.slots * plan.Dp + parts * part_floats;
        const int64_t heads = plan.B * plan.Hkv;
        // Where there are heads enough, each is the work of one thread: no thread waits for another, and
        // there is memory for as many heads as threads.
        if (heads >= (parts == 1 ? 1 : 4) * threads) {
            parallel_for(heads, 1, threads, [&](int64_t first, int64_t) { compute_heads(first, 1, 1); });
            return;
        }
        const int64_t turn = plan.heads_of_a_turn(head_floats, parts, threads);
        for (int64_t first = 0; first < heads; first += turn)
            compute_heads(first, std::min(turn, heads - first), threads);
    }

    // Gradients of `count` key heads, and of the queries that read them.
    void compute_heads(int64_t first, int64_t count, int threads) const {
        const Workspace memory(count * head_floats);
        const int64_t slot_floats = plan.slots * plan.Dp, blocks = (plan.slots + 127) / 128;
        const auto sample = [&](int64_t i) { return (first + i) / plan.Hkv; };
        const auto head = [&](int64_t i) { return (first + i) % plan.Hkv; };
        const auto at = [&](int64_t i) {
            float* own = memory.data + i * head_floats;
            return HeadMemory{own, own + slot_floats, own + 2 * slot_floats};
        };
        const auto block = [&](int64_t j) {
            return Range{j % blocks * 128, std::min(plan.slots, (j % blocks + 1) * 128)};
        };
        parallel_for(count * blocks, 1, threads, [&](int64_t j, int64_t) {
            const int64_t i = j / blocks, b = sample(i), h = head(i);
            convert_slots<T>(plan, args.common.k, args.common.extra_k, b, h, block(j), at(i).keys);
            convert_slots<T>(plan, args.common.v, args.common.extra_v, b, h, block(j), at(i).values);
        });
        parallel_for(count * parts, 1, threads, [&](int64_t j, int64_t) {
            HeadMemory of_part = at(j / parts);
            of_part.sums += j % parts * part_floats;
            compute_part(sample(j / parts), head(j / parts), part_of(plan, parts, j % parts), of_part);
        });
        parallel_for(count * blocks, 1, threads, [&](int64_t j, int64_t) {
            const int64_t i = j / blocks;
            for (int64_t slot = block(j).begin; slot < block(j).end; ++slot)
                write_key(sample(i), head(i), slot, at(i).sums, part_floats);
        });
    }

    // Sums of dK, then of dV, over the queries of a part.
    void compute_part(int64_t b, int64_t hkv, const HeadPart& part, const HeadMemory& head) const {
        std::memset(head.sums, 0, 2 * part.keys(plan) * plan.Dp * sizeof(float));
        const Workspace memory(TileMemory::floats(plan.Dp));
        const TileMemory m(memory.data, plan.Dp);
        for (int64_t h = hkv * plan.group; h < (hkv + 1) * plan.group; ++h)
            for (int64_t i = part.first * plan.tiles_across; i < part.end * plan.tiles_across; ++i)
                tile(b, h, plan.tile(i), part, head, m);
    }

    void tile(int64_t b, int64_t h, const Tile& t, const HeadPart& part, const HeadMemory& head,
              const TileMemory& m) const {
        const int64_t Dp = plan.Dp;
        Lanes lanes;
        load_queries(b, h, t, m, lanes);
        bool begun[kPanels] = {};
        float *dk = head.sums, *dv = head.sums + part.keys(plan) * Dp;
        for_each_run(plan, t, [&](const Run& run) {
            for_each_row(t, run, [&](int64_t row, const Range& seeing) {
                const int64_t slot = first_slot(plan, run, row);
                const int64_t at = run.first_key(row) * kQueries + seeing.begin;
                const int64_t N = seeing.end - seeing.begin;
                matmul<false>(run.width(), N, Dp, {head.keys + slot * Dp, Dp, Dp, 0},
                              m.q_columns + seeing.begin, kQueries, m.scores + at, kQueries, false);
                matmul<false>(run.width(), N, Dp, {head.values + slot * Dp, Dp, Dp, 0},
                              m.dout_columns + seeing.begin, kQueries, m.dscores + at, kQueries, false);
            });
            for (int64_t p = 0; p < t.panels; ++p) {
                const Range rows = run.rows_of(t.panel_rows[p]);
                if (rows.begin >= rows.end) continue;
                mask_scores(plan, run, rows, b, lanes, p * kPanelLanes, m.scores);
                if (args.common.dropout.drops())
                    differentiate<true>(run, rows, lanes, p * kPanelLanes, m);
                else
                    differentiate<false>(run, rows, lanes, p * kPanelLanes, m);
                multiply_keys(plan, run, rows, head.keys, m.dscores, p * kPanelLanes, m.dq, begun[p]);
                begun[p] = true;
            }
            for_each_row(t, run, [&](int64_t row, const Range& seeing) {
                const int64_t place = part.place(plan, first_slot(plan, run, row)) * Dp;
                const int64_t at = run.first_key(row) * kQueries + seeing.begin;
                const int64_t N = seeing.end - seeing.begin;
                matmul<false>(run.width(), Dp, N, {m.scores + at, kQueries, N, 0},
                              m.dout_rows + seeing.begin * Dp, Dp, dv + place, Dp, true);
                matmul<false>(run.width(), Dp, N, {m.dscores + at, kQueries, N, 0},
                              m.q_rows + seeing.begin * Dp, Dp, dk + place, Dp, true);
            });
        });
        store_tile<T>(plan, m.dq, args.dq, b, h, t, args.common.scale, m.work);
    }

    // What a tile needs of its queries: q and dout in both orders, lse and delta.
    void load_queries(int64_t b, int64_t h, const Tile& t, const TileMemory& m, Lanes& lanes) const {
        start_lanes(plan, t, b, h, lanes);
        load_tile<T>(plan, args.common.q, b, h, t, plan.negate, m.q_rows, m.q_columns);
        load_tile<T>(plan, args.dout, b, h, t, false, m.dout_rows, m.dout_columns);
        const int64_t first = (b * plan.H + h) * plan.T;
        for_each_query(plan, t, [&](int64_t lane, int64_t query) {
            const double lse = args.lse[first + query] * kLog2e;
            lanes.lse[lane] = float(lse);
            lanes.lse_low[lane] = float(lse - lanes.lse[lane]);
            lanes.delta[lane] = dot(args.out.row<T>(b, h, query), args.dout.row<T>(b, h, query), plan.D) -
                                (args.dlse == nullptr ? 0.0f : args.dlse[first + query]);
        });
    }

    // Scores of a panel become P, dP becomes dS.
    template <bool kDropout>
    void differentiate(const Run& run, const Range& rows, const Lanes& lanes, int64_t lane,
                       const TileMemory& m) const {
        Exponent<false> exponent[kPanelVectors];
        VecF delta[kPanelVectors];
        for (int i = 0; i < kPanelVectors; ++i) {
            const int64_t at = lane + i * kLanes;
            exponent[i] = plan.exponent(load(lanes.lse + at), load(lanes.lse_low + at));
            delta[i] = load(lanes.delta + at);
        }
        const VecF keep_scale = broadcast(args.common.dropout.keep_scale);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            int64_t at = run.first_key(row) * kQueries + lane;
            const int64_t slot = first_slot(plan, run, row);
            for (int64_t k = 0; k < run.width(); ++k, at += kQueries) {
#pragma GCC unroll 4
                for (int i = 0; i < kPanelVectors; ++i) {
                    const VecF p = weight<false>(exponent[i](load(m.scores + at + i * kLanes)));
                    VecF dp = load(m.dscores + at + i * kLanes), dropped = p;
                    if (kDropout) {
                        const auto kept = keeps(plan, slot + k, lanes, lane + i * kLanes);
                        const VecF by = kept ? keep_scale : VecF{};
                        dp *= by;
                        dropped *= by;
                    }
                    store(m.scores + at + i * kLanes, dropped);
                    store(m.dscores + at + i * kLanes, p * (dp - delta[i]));
                }
            }
        }
    }

    // dK and dV of a slot: what the parts that see it hold.
    void write_key(int64_t b, int64_t h, int64_t slot, const float* sums, int64_t part_floats) const {
        const bool extra = slot >= plan.grid;
        const int64_t row = extra ? 0 : slot / plan.window.width, Dp = plan.Dp;
        alignas(64) float total[2][256] = {};
        for (int64_t i = 0; i < parts; ++i) {
            const HeadPart part = part_of(plan, parts, i);
            if (!extra && (row < part.rows.begin || row >= part.rows.end)) continue;
            const float* dk = sums + i * part_floats + part.place(plan, slot) * Dp;
            const float* dv = dk + part.keys(plan) * Dp;
            for (int64_t d = 0; d < Dp; d += kLanes) {
                store(total[0] + d, load(total[0] + d) + load(dk + d));
                store(total[1] + d, load(total[1] + d) + load(dv + d));
            }
        }
        const float scale = plan.negate ? -args.common.scale : args.common.scale;  // the sign is in Q
        const int64_t e = slot - plan.grid;
        store_row(total[0], scale, plan.D,
                  extra ? args.dextra_k.row<T>(b, h, e) : args.dk.row<T>(b, h, slot));
        store_row(total[1], 1.0f, plan.D, extra ? args.dextra_v.row<T>(b, h, e) : args.dv.row<T>(b, h, slot));
    }
};

template <typename T>
void run(const LocalAttentionBackward& args, int threads) {
    Backward<T>{args, Plan(args.common)}.run(threads);
}

}  // namespace

void local_attention_2d_bwd_cpu(const LocalAttentionBackward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.common.dtype, run<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
