// SPDX-License-Identifier: Apache-2.0
// Forward of local attention in two dimensions, in the tiles of tiles.h:
//
//   S = K Q^T,  P = 2^(c S - m),  O^T = V^T P          4 D FLOPs a pair, one exponential
//
// with c = |scale| log2(e); a negative scale is put into Q.
//
// Bytes: q and out once, k and v by each tile whose windows reach them, out of a cache for the most part.
#include "common/parallel.h"
#include "common/workspace.h"
#include "local_attention_2d/tiles.h"
#if defined(__AVX512BF16__)
#include "local_attention_2d/forward_bf16.h"
#endif

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <typename T>
struct Forward {
    const LocalAttentionForward& args;
    const Plan plan;

    void run(int threads) {
        const int64_t heads = plan.B * plan.Hkv, head_floats = 2 * plan.slots * plan.Dp;
        const int64_t blocks = (plan.slots + 127) / 128, tiles = plan.tiles_down * plan.tiles_across;
        const int64_t turn = plan.heads_of_a_turn(head_floats, plan.group * tiles, threads);
        const Workspace memory(turn * head_floats);
        for (int64_t done = 0; done < heads; done += turn) {
            const int64_t now = std::min(turn, heads - done);
            const auto keys = [&](int64_t i) { return memory.data + i * head_floats; };
            const auto values = [&](int64_t i) { return keys(i) + plan.slots * plan.Dp; };
            parallel_for(now * blocks, 1, threads, [&](int64_t j, int64_t) {
                const int64_t i = j / blocks, b = (done + i) / plan.Hkv, h = (done + i) % plan.Hkv;
                const Range slots = {j % blocks * 128, std::min(plan.slots, (j % blocks + 1) * 128)};
                convert_slots<T>(plan, args.common.k, args.common.extra_k, b, h, slots, keys(i));
                convert_slots<T>(plan, args.common.v, args.common.extra_v, b, h, slots, values(i));
            });
            parallel_for(now * plan.group * tiles, 1, threads, [&](int64_t j, int64_t) {
                const int64_t i = j / tiles / plan.group, b = (done + i) / plan.Hkv;
                const int64_t h = (done + i) % plan.Hkv * plan.group + j / tiles % plan.group;
                tile(b, h, plan.tile(j % tiles), keys(i), values(i));
            });
        }
    }

    void tile(int64_t b, int64_t h, const Tile& t, const float* keys, const float* values) {
        const int64_t Dp = plan.Dp;
        const Workspace memory((kRun + 3 * Dp) * kQueries);
        float* scores = memory.data;
        float* queries = scores + kRun * kQueries;
        float* out = queries + Dp * kQueries;
        float* work = out + Dp * kQueries;
        Lanes lanes;
        start_lanes(plan, t, b, h, lanes);
        load_tile<T>(plan, args.common.q, b, h, t, plan.negate, work, queries);
        bool begun[kPanels] = {};
        for_each_run(plan, t, [&](const Run& run) {
            for_each_row(t, run, [&](int64_t row, const Range& seeing) {
                matmul<false>(run.width(), seeing.end - seeing.begin, Dp,
                              {keys + first_slot(plan, run, row) * Dp, Dp, Dp, 0}, queries + seeing.begin,
                              kQueries, scores + run.first_key(row) * kQueries + seeing.begin, kQueries,
                              false);
            });
            for (int64_t p = 0; p < t.panels; ++p) {
                const Range rows = run.rows_of(t.panel_rows[p]);
                if (rows.begin >= rows.end) continue;
                mask_scores(plan, run, rows, b, lanes, p * kPanelLanes, scores);
                raise_maxima(run, rows, lanes, p * kPanelLanes, scores, begun[p] ? out : nullptr);
                if (args.common.dropout.drops())
                    exponentiate<true>(run, rows, lanes, p * kPanelLanes, scores);
                else
                    exponentiate<false>(run, rows, lanes, p * kPanelLanes, scores);
                multiply_keys(plan, run, rows, values, scores, p * kPanelLanes, out, begun[p]);
                begun[p] = true;
            }
        });
        finish(b, h, t, lanes, out, work);
    }

    // Raises the maxima of a panel to its new scores, and rescales `out` and the sums, where there are some.
    void raise_maxima(const Run& run, const Range& rows, Lanes& lanes, int64_t lane, const float* scores,
                      float* out) const {
        alignas(64) float rescale[kQueries];
        const float* first = scores + run.first_key(rows.begin) * kQueries;
        const int64_t keys = (rows.end - rows.begin) * run.width();
        const bool raised =
            raise_max<kPanelVectors>(first, keys, kQueries, plan.factor, 0.0f, lane, lanes.row_max, rescale);
        if (!raised || out == nullptr) return;
        for (int64_t c = lane; c < lane + kPanelLanes; c += kLanes) {
            const VecF by = load(rescale + c);
            store(lanes.sum + c, load(lanes.sum + c) * by);
            for (int64_t d = 0; d < plan.Dp; ++d)
                store(out + d * kQueries + c, load(out + d * kQueries + c) * by);
        }
    }

    // Scores of a panel become weights 2^(exponent - max).
    template <bool kDropout>
    void exponentiate(const Run& run, const Range& rows, Lanes& lanes, int64_t lane, float* scores) const {
        Exponent<false> exponent[kPanelVectors];
        VecF sum[kPanelVectors];
        for (int i = 0; i < kPanelVectors; ++i) {
            const VecF max = load(lanes.row_max + lane + i * kLanes);
            exponent[i] = plan.exponent(max == -kInf ? VecF{} : max, VecF{});
            sum[i] = load(lanes.sum + lane + i * kLanes);
        }
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            float* p = scores + run.first_key(row) * kQueries + lane;
            [[maybe_unused]] const int64_t slot = first_slot(plan, run, row);
            for (int64_t k = 0; k < run.width(); ++k, p += kQueries) {
#pragma GCC unroll 4
                for (int i = 0; i < kPanelVectors; ++i) {
                    const VecF w = weight<false>(exponent[i](load(p + i * kLanes)));
                    sum[i] += w;
                    if constexpr (kDropout)
                        store(p + i * kLanes, keeps(plan, slot + k, lanes, lane + i * kLanes) ? w : VecF{});
                    else
                        store(p + i * kLanes, w);
                }
            }
        }
        for (int i = 0; i < kPanelVectors; ++i) store(lanes.sum + lane + i * kLanes, sum[i]);
    }

    // Divides what is summed by the sums of the weights, and writes out and lse.
    void finish(int64_t b, int64_t h, const Tile& t, const Lanes& lanes, float* out, float* work) const {
        for (int64_t c = 0; c < t.panels * kPanelLanes; c += kLanes) {
            const VecF inverse = args.common.dropout.keep_scale / load(lanes.sum + c);
            for (int64_t d = 0; d < plan.Dp; ++d)
                store(out + d * kQueries + c, load(out + d * kQueries + c) * inverse);
        }
        store_tile<T>(plan, out, args.out, b, h, t, 1.0f, work);
        float* lse = args.lse + (b * plan.H + h) * plan.T;
        for_each_query(plan, t, [&](int64_t lane, int64_t query) {
            lse[query] = float(lanes.row_max[lane] * kLn2 + std::log(double(lanes.sum[lane])));
        });
    }
};

template <typename T>
void run(const LocalAttentionForward& args, int threads) {
    Forward<T>{args, Plan(args.common)}.run(threads);
}

}  // namespace

void local_attention_2d_fwd_cpu(const LocalAttentionForward& args, int threads) {
#if defined(__AVX512BF16__)
    if (args.common.dtype == DType::kBFloat16) return ForwardBf16{args, StripPlan(args.common)}.run(threads);
#endif
    COGVIEW_DISPATCH_DTYPE(args.common.dtype, run<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
