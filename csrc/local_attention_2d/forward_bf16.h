// SPDX-License-Identifier: Apache-2.0
// Forward of local attention in bfloat16, in the panels of strips.h:
//
//   S = Q K^T,  P = 2^(c S - m),  O = P V          4 D FLOPs a pair, one exponential
//
// with c = |scale| log2(e); a negative scale is put into Q. Sums are in float, P is rounded to bfloat16.
//
// Bytes: q and out once; k and v by each strip that holds them, and from there by each panel, out of a cache.
#pragma once

#include "common/parallel.h"
#include "common/workspace.h"
#include "local_attention_2d/strips.h"

namespace cogview {
namespace {

struct ForwardBf16 {
    // Keys of a run, of which the scores are held at a time. Rows of scores begin in different cache sets.
    static constexpr int64_t kRunBlocks = 8, kRunVectors = 2 * kRunBlocks, kRow = kRunBlocks * kBlock + 16;
    static constexpr int64_t kGrain = 8;  // panels

    // Of a head.
    struct Packed {
        const float *keys, *values;
    };

    // Neighbouring blocks; of extra keys where `strip` is negative.
    struct Run {
        int64_t strip;
        Range blocks;
    };

    // What belongs to the queries of a panel, a lane each, and to pairs of them and keys.
    struct Work {
        alignas(64) int32_t row[kPanelQueries], column[kPanelQueries];  // of the query's cell
        alignas(64) int32_t first[kPanelQueries], last[kPanelQueries];  // columns that it sees
        uint32_t r0[kPanelQueries], r1[kPanelQueries];
        alignas(64) float row_max[kPanelQueries], rescale[kPanelQueries];
        alignas(64) float sum[kPanelQueries * kLanes];  // 16 partial sums a query
        alignas(64) float part[kPanelQueries * kLanes], turned[kPanelQueries * kLanes];
        alignas(64) uint16_t seen[kRunVectors][kPanelQueries];  // a bit for each of 16 keys
        alignas(64) float scores[kPanelQueries * kRow];         // then the weights, in place
        float *queries, *out;                                   // [16, Du], [16, Dp]
    };
    static constexpr int64_t kWorkFloats = (sizeof(Work) + 63) / 64 * 16;

    const LocalAttentionForward& args;
    const StripPlan plan;

    void run(int threads) {
        const int64_t panels = plan.panels_down * plan.panels_across;
        const int64_t most =
            plan.heads_of_a_turn(2 * head_units(), parts(plan.group * panels, kGrain), threads);
        for_each_head(plan.B * plan.Hkv, most, threads,
                      [&](int64_t first, int64_t count, int own) { some_heads(first, count, own); });
    }

    // Of the packed keys of a head, and as many of its values.
    int64_t head_units() const { return plan.head_blocks * kBlock * plan.Du; }

    void some_heads(int64_t first, int64_t count, int threads) {
        const int64_t units = head_units(), panels = plan.panels_down * plan.panels_across;
        const Workspace memory(count * 2 * units);
        const auto keys = [&](int64_t i) { return memory.data + i * 2 * units; };
        parallel_for(count * plan.head_blocks, 16, threads, [&](int64_t begin, int64_t end) {
            const Workspace stage(kBlock * plan.Du);
            for (int64_t j = begin; j < end; ++j) {
                const int64_t i = j / plan.head_blocks, block = j % plan.head_blocks;
                const int64_t b = (first + i) / plan.Hkv, h = (first + i) % plan.Hkv;
                float* to = keys(i) + block * kBlock * plan.Du;
                pack(b, h, block, stage.data, to, to + units);
            }
        });
        parallel_for(count * plan.group * panels, kGrain, threads, [&](int64_t begin, int64_t end) {
            const TileScope scope;
            const Workspace memory(kWorkFloats + kPanelQueries * (plan.Du + plan.Dp));
            Work* work = new (memory.data) Work;
            work->queries = memory.data + kWorkFloats;
            work->out = work->queries + kPanelQueries * plan.Du;
            for (int64_t j = begin; j < end; ++j) {
                const int64_t i = j / panels / plan.group, b = (first + i) / plan.Hkv;
                const int64_t h = (first + i) % plan.Hkv * plan.group + j / panels % plan.group;
                panel(b, h, plan.panel(j % panels), {keys(i), keys(i) + units}, *work);
            }
        });
    }

    void pack(int64_t b, int64_t h, int64_t block, float* stage, float* keys, float* values) const {
        BFloat16* rows = reinterpret_cast<BFloat16*>(stage);
        plan.stage(args.common.k, args.common.extra_k, b, h, block, rows);
        pack_b_transposed<true>(rows, kBlock, plan.Dp, keys);
        plan.stage(args.common.v, args.common.extra_v, b, h, block, rows);
        pack_b(rows, kBlock, plan.Dp, values);
    }

    void panel(int64_t b, int64_t h, const Panel& p, const Packed& head, Work& work) const {
        start(b, h, p, work);
        bool begun = false;
        const auto runs = [&](int64_t strip, const Range& blocks) {
            for (int64_t i = blocks.begin; i < blocks.end; i += kRunBlocks, begun = true)
                add({strip, {i, std::min(blocks.end, i + kRunBlocks)}}, b, head, work, begun);
        };
        runs(-1, {0, plan.extra_blocks});
        runs(p.strip, p.blocks);
        finish(b, h, p, work);
    }

    void start(int64_t b, int64_t h, const Panel& p, Work& work) const {
        const Window& window = plan.window;
        const Dropout& dropout = args.common.dropout;
        std::memset(work.queries, 0, kPanelQueries * plan.Du * sizeof(float));
        std::memset(work.sum, 0, sizeof(work.sum));
        for (int64_t lane = 0; lane < kPanelQueries; ++lane) {
            work.row[lane] = kNoRow;
            work.column[lane] = work.first[lane] = work.last[lane] = 0;
            work.r0[lane] = work.r1[lane] = 0;
            work.row_max[lane] = -kInf;
        }
        plan.for_each_query(p, [&](int64_t lane, int64_t query) {
            const int64_t column = query % plan.query_width / window.query_scale;
            work.row[lane] = int32_t(query / plan.query_width / window.query_scale);
            work.column[lane] = int32_t(column);
            work.first[lane] = int32_t(std::max<int64_t>(0, column - window.column_radius));
            work.last[lane] = int32_t(std::min<int64_t>(window.width - 1, column + window.column_radius));
            stage_row(args.common.q.row<BFloat16>(b, h, query), plan.D, plan.Dp, plan.negate,
                      reinterpret_cast<BFloat16*>(work.queries + lane * plan.Du));
            if (dropout.drops()) {
                const RowWords words = philox(dropout.seed, uint32_t(query), uint32_t(h), uint32_t(b));
                work.r0[lane] = words.r0;
                work.r1[lane] = words.r1;
            }
        });
    }

    // Adds the keys of a run to what is summed.
    void add(const Run& run, int64_t b, const Packed& head, Work& work, bool begun) const {
        const int64_t blocks = run.blocks.end - run.blocks.begin;
        const int64_t at = run.strip < 0 ? run.blocks.begin : plan.strip_block(run.strip, run.blocks.begin);
        const int64_t units = kBlock * plan.Du;
        for (int64_t i = 0; i < blocks; ++i)
            score_block(work.queries, plan.Du, head.keys + (at + i) * units, work.scores + i * kBlock, kRow);
        look(run, b, work);
        raise_maxima(2 * blocks, work, begun);
        if (args.common.dropout.drops())
            exponentiate<true>(run, work);
        else
            exponentiate<false>(run, work);
        weigh_blocks(work.scores, kRow, blocks, head.values + at * units, plan.Dp, work.out, begun);
    }

    // Which keys of a run each query sees.
    void look(const Run& run, int64_t b, Work& work) const {
        const VecI one = VecI{} + 1;
        const VecI row = lane_vector<VecI>(work.row), own = lane_vector<VecI>(work.column);
        const VecI first = lane_vector<VecI>(work.first), last = lane_vector<VecI>(work.last);
        for (int64_t v = 0; v < 2 * (run.blocks.end - run.blocks.begin); ++v) {
            const int64_t place = run.blocks.begin * kBlock + v * kLanes;
            VecI bits = VecI{};
            if (run.strip < 0) {
                bits += seen_of_extra(b, place);
            } else if (plan.row_of(place) < plan.window.height) {
                const int32_t y = int32_t(plan.row_of(place));
                const int32_t x = int32_t(plan.column_of(run.strip, place));
                const VecI down = y - row;
                VecI near = (down <= plan.window.row_radius) & (down >= -plan.window.row_radius);
                VecI end = last;
                if (plan.window.causal) {
                    near &= down <= 0;
                    end = down == 0 ? own : last;
                }
                // Bits from, from + 1, ..., to - 1.
                const VecI from = clamp_lane(first - x), to = clamp_lane(end + 1 - x);
                bits = near & ((one << to) - (one << from));
            }
            for (int64_t c = 0; c < kPanelQueries; ++c) work.seen[v][c] = uint16_t(bits[c]);
        }
    }

    static VecI clamp_lane(VecI x) {
        x = x < 0 ? VecI{} : x;
        return x > kLanes ? VecI{} + kLanes : x;
    }

    int32_t seen_of_extra(int64_t b, int64_t first) const {
        const uint8_t* mask = args.common.extra_mask;
        int32_t bits = 0;
        for (int64_t e = first; e < std::min(plan.E, first + kLanes); ++e)
            if (mask == nullptr || mask[b * plan.E + e] != 0) bits |= 1 << (e - first);
        return bits;
    }

    // Raises the maxima to the scores of a run, and rescales what is summed, where there is some.
    void raise_maxima(int64_t vectors, Work& work, bool begun) const {
        VecF top[kPanelQueries];
#pragma GCC unroll 16
        for (int c = 0; c < kPanelQueries; ++c) top[c] = broadcast(-kInf);
        for (int64_t v = 0; v < vectors; ++v) {
            const float* scores = work.scores + v * kLanes;
#pragma GCC unroll 16
            for (int c = 0; c < kPanelQueries; ++c) {
                // Of a score that is NaN it gives the old one.
                top[c] = bitcast<VecF>(_mm512_mask_max_ps(bitcast<__m512>(top[c]), work.seen[v][c],
                                                          bitcast<__m512>(load(scores + c * kRow)),
                                                          bitcast<__m512>(top[c])));
            }
        }
        for (int c = 0; c < kPanelQueries; ++c) store(work.part + c * kLanes, top[c]);
        const VecF most = across(work, [](VecF a, VecF b) { return maximum(a, b); });
        const VecF wanted = most * plan.factor, old = load(work.row_max);
        const VecI raise = wanted > old + 8.0f;
        store(work.rescale, raise ? exp2(old - wanted) : broadcast(1.0f));
        store(work.row_max, raise ? wanted : old);
        if (!begun) return;
        for (int64_t c = 0; c < kPanelQueries; ++c) {
            const float by = work.rescale[c];
            if (by == 1.0f) continue;
            store(work.sum + c * kLanes, load(work.sum + c * kLanes) * by);
            float* out = work.out + c * plan.Dp;
            for (int64_t d = 0; d < plan.Dp; d += kLanes) store(out + d, load(out + d) * by);
        }
    }

    // What `join` makes of the 16 parts of each query, a lane each.
    template <typename Join>
    static VecF across(Work& work, const Join& join) {
        transpose_block(work.part, kLanes, work.turned, kLanes);
        VecF all = load(work.turned);
        for (int i = 1; i < kLanes; ++i) all = join(all, load(work.turned + i * kLanes));
        return all;
    }

    // Scores become weights 2^(exponent - max), in bfloat16, in the order of an A operand.
    template <bool kDropout>
    void exponentiate(const Run& run, Work& work) const {
        const int64_t vectors = 2 * (run.blocks.end - run.blocks.begin);
        for (int64_t c = 0; c < kPanelQueries; ++c) {
            const float max = work.row_max[c];
            const Exponent<true> exponent = plan.exponent<true>(broadcast(max == -kInf ? 0.0f : max), VecF{});
            float* row = work.scores + c * kRow;
            VecF sum = load(work.sum + c * kLanes), sum1 = VecF{};
            const auto weigh = [&](int64_t v) {
                const VecF w = weight<true>(exponent(load(row + v * kLanes)));
                return bitcast<VecF>(_mm512_maskz_mov_ps(work.seen[v][c], bitcast<__m512>(w)));
            };
            const auto kept = [&](int64_t v, VecF w) {
                if (!kDropout) return w;
                return keep_mask(VecU{} + work.r0[c], VecU{} + work.r1[c], slots_of(run, v),
                                 args.common.dropout.keep_threshold)
                           ? w
                           : VecF{};
            };
            for (int64_t v = 0; v < vectors; v += 2) {
                const VecF w0 = weigh(v), w1 = weigh(v + 1);
                sum += w0;
                sum1 += w1;
                const __m512bh pairs =
                    _mm512_cvtne2ps_pbh(bitcast<__m512>(kept(v + 1, w1)), bitcast<__m512>(kept(v, w0)));
                std::memcpy(row + v / 2 * kLanes, &pairs, sizeof(pairs));
            }
            store(work.sum + c * kLanes, sum + sum1);
        }
    }

    // The slots of the keys of a vector of a run, which dropout goes by.
    VecU slots_of(const Run& run, int64_t v) const {
        const int64_t place = run.blocks.begin * kBlock + v * kLanes;
        const int64_t first = run.strip < 0 ? plan.grid + place
                                            : plan.slot(plan.row_of(place), plan.column_of(run.strip, place));
        VecU slots;
        for (int i = 0; i < kLanes; ++i) slots[i] = uint32_t(first + i);
        return slots;
    }

    // Divides what is summed by the sums of the weights, and writes out and lse.
    void finish(int64_t b, int64_t h, const Panel& p, Work& work) const {
        std::memcpy(work.part, work.sum, sizeof(work.sum));
        alignas(64) float sums[kPanelQueries];
        store(sums, across(work, [](VecF a, VecF b) { return a + b; }));
        float* lse = args.lse + (b * plan.H + h) * plan.T;
        plan.for_each_query(p, [&](int64_t lane, int64_t query) {
            const float factor = args.common.dropout.keep_scale / sums[lane];
            const float* from = work.out + lane * plan.Dp;
            BFloat16* to = args.out.row<BFloat16>(b, h, query);
            int64_t d = 0;
            for (; d + kLanes <= plan.D; d += kLanes) store_narrow(to + d, load(from + d) * factor);
            for (; d < plan.D; ++d) from_float(from[d] * factor, to + d);
            lse[query] = float(work.row_max[lane] * kLn2 + std::log(double(sums[lane])));
        });
    }
};

}  // namespace
}  // namespace cogview
