// SPDX-License-Identifier: Apache-2.0
// Forward of three-region attention, in the tiles of plan.h:
//
//   S = K Q^T,  P = 2^(c S + bias - m),  O^T = V^T P          4 D FLOPs a pair, one exponential
//
// with c = |scale| log2(e); a negative scale is put into Q.
#include "common/parallel.h"
#include "common/workspace.h"
#include "three_region_attention/tile_rows.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Scores become weights 2^(exponent - max), in the order of a B operand with keys contracted.
template <bool kBf16, bool kDropout, int kVectors>
void exponentiate(const Plan<kBf16>& plan, const Run& run, int64_t b, int64_t columns, int64_t c,
                  Lanes& lanes, float* scores, Spread<kBf16>& products) {
    Exponent<kBf16> exponent[kVectors];
    VecF sum[kVectors];
    for (int i = 0; i < kVectors; ++i) {
        const VecF max = load(lanes.row_max + c + i * kLanes);
        exponent[i] = plan.exponent(run.far, max == -kInf ? VecF{} : max, VecF{});
        sum[i] = load(lanes.sum + c + i * kLanes);
    }
    const auto kept = [&](VecF p, int64_t r, int i) {
        if (!kDropout) return p;
        return keeps(plan, run, r, b, lanes, c + i * kLanes) ? p : VecF{};
    };
    for (int64_t r = 0; r < run.rows; r += 2) {
        products.turn();
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

// The packed keys and values of a head; the values in the order for contraction.
struct PackedHead {
    float *keys, *values;
};

template <bool kBf16, typename T>
struct Forward {
    using E = typename Compute<kBf16>::type;
    static constexpr bool kOverlaps = Product<kBf16>::kSteps;
    static constexpr int64_t kRun = kBf16 && !kOverlaps ? 256 : 128;
    // Weights of the run before, scores of this run and of the next one.
    static constexpr int64_t kBuffers = kOverlaps ? 3 : 1;

    const AttentionForward& args;
    const Plan<kBf16> plan;

    void run(int threads) {
        const int64_t heads = plan.B * plan.Hkv;
        for_each_head(heads, heads, threads,
                      [&](int64_t first, int64_t count, int own) { some_heads(first, count, own); });
    }

    void some_heads(int64_t first, int64_t count, int threads) {
        const int64_t head_units = plan.S * plan.Du, slot_tiles = plan.S / kTile;
        const int64_t tile_units = kTile * plan.Du;
        const Workspace memory(2 * count * head_units);
        const auto packed = [&](int64_t i) {
            float* keys = memory.data + 2 * i * head_units;
            return PackedHead{keys, keys + head_units};
        };
        parallel_for(count * slot_tiles, 16, threads, [&](int64_t begin, int64_t end) {
            const Workspace work(2 * tile_units);
            for (int64_t j = begin; j < end; ++j) {
                const int64_t i = j / slot_tiles, b = (first + i) / plan.Hkv, h = (first + i) % plan.Hkv;
                const int64_t tile = j % slot_tiles, at = tile * tile_units;
                float *keys = packed(i).keys + at, *values = packed(i).values + at;
                pack_rows<kBf16, T>(plan, args.common.k, b, h, tile, keys);
                if constexpr (kBf16) {
                    pack_rows<kBf16, T>(plan, args.common.v, b, h, tile, work.data);
                    pack_contracted(plan, work.data, values, work.data + tile_units);
                } else {
                    pack_rows<kBf16, T>(plan, args.common.v, b, h, tile, values);
                }
            }
        });
        parallel_for(count * plan.group * plan.tiles, 1, threads, [&](int64_t j, int64_t) {
            const TileScope scope;
            const int64_t query_head = first * plan.group + j / plan.tiles;
            // Long tiles first, so that threads end together.
            tile(query_head / plan.H, query_head % plan.H, plan.tiles - 1 - j % plan.tiles,
                 packed(j / plan.tiles / plan.group));
        });
    }

    void tile(int64_t b, int64_t h, int64_t index, const PackedHead& head) {
        const Sight s = sight(plan, b, index);
        const int64_t N = s.columns, Dp = plan.Dp;
        const Workspace memory((kBuffers * kRun + 3 * Dp) * N);
        float* queries = memory.data + kBuffers * kRun * N;
        float* out = queries + Dp * N;
        float* work = out + Dp * N;
        Lanes lanes;
        start_lanes(plan, s, b, h, lanes);
        stage_queries<kBf16, T>(plan, args.common.q, b, h, s, plan.negate, reinterpret_cast<E*>(work));
        pack_b_transposed<kBf16>(reinterpret_cast<E*>(work), N, Dp, queries);

        const auto buffer = [&](int64_t i) { return memory.data + i % kBuffers * kRun * N; };
        const auto score = [&](const Run& run, float* to) {
            const int64_t c = run.column;
            return Product<kBf16>(run.rows, N - c, plan.Du, rows_of(plan, head.keys, run), queries + c, N,
                                  to + c, N, false);
        };
        const auto weigh = [&](const Run& run, const float* weights, bool accumulate) {
            const int64_t c = run.column;
            return Product<kBf16>(Dp, N - c, run.rows / Compute<kBf16>::kPack,
                                  contracted_of(plan, head.values, run), weights + c, N, out + c, N,
                                  accumulate);
        };
        Runs<kBf16> runs(plan, s, kRun);
        Run run, next;
        bool more = runs.next(run);
        const bool blind = !more;
        // What is multiplied beside the exponentials of a run: the weights before, the scores behind.
        Product<kBf16> pending[2];
        if (more) score(run, buffer(0)).finish();
        for (int64_t i = 0; more; ++i) {
            float* scores = buffer(i);
            more = runs.next(next);
            pending[1] = more ? score(next, buffer(i + 1)) : Product<kBf16>();
            mask_scores(plan, run, b, lanes, N, scores);
            raise_maxima(run, lanes, N, scores, i == 0 ? nullptr : out, pending[0]);
            Spread<kBf16> products(pending, 2, column_groups(run.column, N) * run.rows / 2);
            for_each_column(run.column, N, [&](int64_t c, auto vectors) {
                if (args.common.dropout.drops())
                    exponentiate<kBf16, true, vectors.value>(plan, run, b, N, c, lanes, scores, products);
                else
                    exponentiate<kBf16, false, vectors.value>(plan, run, b, N, c, lanes, scores, products);
            });
            pending[0] = weigh(run, scores, i > 0);
            if constexpr (!kOverlaps) {
                pending[0].finish();
                pending[1].finish();
            }
            run = next;
        }
        pending[0].finish();
        // What sees nothing gives 0, whatever its scores are.
        if (blind) std::memset(out, 0, Dp * N * sizeof(float));
        for (int64_t c = 0; c < s.blind; ++c) lanes.sum[c] = kInf;
        finish(b, h, s, lanes, out, work);
    }

    // Raises the maxima of a tile to its new scores, and rescales the sums and `out`, where there is one.
    // What is still to be added to it was weighed by the old maxima.
    void raise_maxima(const Run& run, Lanes& lanes, int64_t columns, const float* scores, float* out,
                      Product<kBf16>& addend) const {
        alignas(64) float rescale[kQueries];
        const float bias = run.far ? plan.bias : 0.0f;
        bool raised = false;
        for_each_column(run.column, columns, [&](int64_t c, auto vectors) {
            raised |= raise_max<vectors.value>(scores, run.rows, columns, plan.factor, bias, c, lanes.row_max,
                                               rescale);
        });
        if (!raised || out == nullptr) return;
        addend.finish();
        for (int64_t c = run.column; c < columns; c += kLanes) {
            const VecF by = load(rescale + c);
            store(lanes.sum + c, load(lanes.sum + c) * by);
            for (int64_t d = 0; d < plan.Dp; ++d)
                store(out + d * columns + c, load(out + d * columns + c) * by);
        }
    }

    // Divides what is summed by the sums of the weights, and writes out and lse.
    void finish(int64_t b, int64_t h, const Sight& s, const Lanes& lanes, float* out, float* work) const {
        const int64_t N = s.columns;
        for (int64_t c = 0; c < N; c += kLanes) {
            const VecF inverse = args.common.dropout.keep_scale / load(lanes.sum + c);
            for (int64_t d = 0; d < plan.Dp; ++d) store(out + d * N + c, load(out + d * N + c) * inverse);
        }
        store_queries<kBf16, T>(plan, out, args.out, b, h, s, 1.0f, work);
        float* lse = args.lse + (b * plan.H + h) * plan.T + s.first;
        for (int64_t c = 0; c < s.queries; ++c)
            lse[c] = c < s.blind ? -kInf : float(lanes.row_max[c] * kLn2 + std::log(double(lanes.sum[c])));
    }
};

template <bool kBf16, typename T>
void run(const AttentionForward& args, const SortedPivots& sorted_pivots, int threads) {
    Forward<kBf16, T>{args, Plan<kBf16>(args.common, sorted_pivots)}.run(threads);
}

}  // namespace

void three_region_attention_fwd_cpu(const AttentionForward& args, const SortedPivots& sorted_pivots,
                                    int threads) {
    if constexpr (kHasBf16) {
        if (args.common.dtype == DType::kBFloat16) return run<true, BFloat16>(args, sorted_pivots, threads);
    }
    COGVIEW_DISPATCH_DTYPE(args.common.dtype, run<false, scalar_t>(args, sorted_pivots, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
