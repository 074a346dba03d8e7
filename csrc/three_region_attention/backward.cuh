// SPDX-License-Identifier: Apache-2.0
// Backward of three-region attention. With P_ij = e^(x_ij - lse_i), the dropout mask m_ij in {0, 1/(1-p)} and
// delta_i = sum_d dout_i out_i - dlse_i:
//     dv_j = sum_i m_ij P_ij dout_i          dS_ij = P_ij (m_ij dout_i v_j - delta_i)
//     dq_i = scale sum_j dS_ij k_j           dk_j = scale sum_i dS_ij q_i
// Scores are computed again in both kernels, as k q^T in the one for dk and dv: P and dS are then stored as
// they are multiplied, rows of keys. That huge scores round alike everywhere rests on a tensor core summing
// the same products in the same order either way. If one did not, P would still be at most 1. No atomics: dq
// has a block per 64 queries. dk and dv have a block per 64 keys, first for the sorted pivots as far keys
// (packed, fp32), then for all positions as window keys, which add the pivots' part.
//
// FLOPs: 14 D a visible pair (7 products instead of 5). Bytes: q, k, v, dout, out, dq, dk, dv once, tiles
// again by each block, mostly from L2; 16 D bytes a pivot and key head for dk_far, dv_far.
#pragma once

#include "three_region_attention/tiles.cuh"

namespace cogview {
namespace {

constexpr int kBackwardWarps = 4;
constexpr int kBackwardThreads = 32 * kBackwardWarps;
constexpr int kBackwardRows = 16 * kBackwardWarps;  // queries of a dq block, keys of a dk, dv block

// delta; a warp per row.
template <int D>
__global__ void __launch_bounds__(kBackwardThreads)
    three_region_attention_bwd_delta_kernel(AttentionBackward args) {
    const Attention& a = args.common;
    const int H = a.shape.H, T = a.shape.T;
    const int64_t at = int64_t(blockIdx.x) * kBackwardWarps + threadIdx.x / 32;
    if (at >= int64_t(a.shape.B) * H * T) return;
    const int i = at % T, h = at / T % H, b = at / T / H;
    const __half* out = args.out.row<__half>(b, h, i);
    const __half* dout = args.dout.row<__half>(b, h, i);
    float dot = 0.0f;
    for (int d = threadIdx.x % 32; d < D; d += 32) dot += __half2float(out[d]) * __half2float(dout[d]);
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
    if (threadIdx.x % 32 == 0) args.delta[at] = args.dlse == nullptr ? dot : dot - args.dlse[at];
}

// What a query's scores need.
struct QueryTerms {
    float lse, delta;
};

// Of one query, on its way from device memory to RowData: read while the tile before is worked on.
template <bool DROPOUT, bool CAUSAL>
struct NextRow {
    QueryTerms terms;
    RowWords words;

    __device__ __forceinline__ void fetch(const AttentionBackward& args, uint64_t seed, int b, int h,
                                          int query) {
        const AttentionShape& shape = args.common.shape;
        const int64_t at = (int64_t(b) * shape.H + h) * shape.T + query;
        terms = {args.lse[at], args.delta[at]};
        // All probabilities of a query before its sample are to be 0. Where the layout is causal, its scores
        // are masked, each of them.
        if (!CAUSAL && terms.lse == -INFINITY) terms.lse = INFINITY;
        if (DROPOUT) words = philox(seed, query, h, b);
    }
};

// Of the queries of a tile. Two neighbours are read at once: hence the alignment.
template <int ROWS, bool CAUSAL>
struct __align__(16) RowData {
    static_assert(ROWS <= kBackwardThreads, "a thread puts one row");
    QueryTerms terms[ROWS];
    RowWords words[ROWS];
    int window[CAUSAL ? 1 : 2][ROWS];  // its first key; where the layout is not causal, its last one, too

    template <bool DROPOUT>
    __device__ __forceinline__ void put(int row, const NextRow<DROPOUT, CAUSAL>& from) {
        terms[row] = from.terms;
        if (DROPOUT) words[row] = from.words;
    }
    __device__ __forceinline__ void put_window(const Attention& a, int b, int row, int query) {
        const int T = a.shape.T, origin = a.layout.origin_of(b, T);
        window[0][row] = a.layout.window_start(query, origin);
        if (!CAUSAL) window[CAUSAL ? 0 : 1][row] = a.layout.window_last(query, origin, T, CAUSAL);
    }
    // Whether the query of a row sees a key.
    __device__ __forceinline__ bool row_sees(bool far, int key, int row, int query) const {
        return sees(far, key, window[0][row], CAUSAL ? query : window[CAUSAL ? 0 : 1][row], CAUSAL);
    }
    __device__ __forceinline__ void read_two(int row, QueryTerms* to) const {
        const float4 two = *reinterpret_cast<const float4*>(terms + row);
        to[0] = {two.x, two.y}, to[1] = {two.z, two.w};
    }
};

// log2 of P: at most 0 but for rounding, which for scores of 1e10 is thousands.
__device__ __forceinline__ float log2_probability(const Attention& a, float score, float bias, float lse) {
    return fminf((score * a.scale + bias - lse) * kLog2e, 0.0f);
}

// From P and dprob = dout v: {m P (without the factor 1 / (1 - p)), dS}.
template <bool DROPOUT>
__device__ __forceinline__ float2 dropped_and_gradient(const Attention& a, float p, float dprob, float delta,
                                                       RowWords words, int position) {
    if (!DROPOUT) return make_float2(p, p * (dprob - delta));
    const bool keep = keep_mask(words.r0, words.r1, uint32_t(position), a.dropout.keep_threshold);
    return make_float2(keep ? p : 0.0f, p * ((keep ? dprob * a.dropout.keep_scale : 0.0f) - delta));
}

template <int D, bool CAUSAL = true>
struct QueryGradientShape {
    // At 128 q and dq are 128 registers a lane: what is fetched ahead must be little.
    static constexpr int kTileKeys = D <= 96 ? 32 : 16;
    static constexpr int kRow = padded_row(D);
    static constexpr int kStripRow = kTileKeys + kStripPad;  // halves
    // dout of 16 rows is D / 2 registers a lane: past 64 it stays in shared memory.
    static constexpr bool kHoldsDout = D <= 64;
    static constexpr int kTileHalves = 2 * kTileKeys * kRow;
    static constexpr int kStrip = 640;  // halves: 16 rows, or the 320 floats of by_rows
    static_assert(16 * kStripRow <= kStrip);
    static constexpr int kStripHalves = kBackwardWarps * kStrip;
    static constexpr int kDoutHalves = kBackwardRows * kRow;
    static constexpr int kMain = (kTileHalves + kStripHalves + (kHoldsDout ? 0 : kDoutHalves)) * 2;
    static constexpr int kStaged = kDoutHalves * 2;
    static constexpr int kShared =
        (kMain > kStaged ? kMain : kStaged) + int(sizeof(RowData<kBackwardRows, CAUSAL>)) + kTileKeys * 4;
};

// Occupancy on sm_70, by registers: 4 blocks of 4 warps at D = 32 (128 registers), else 2 (194 at D = 64, 213
// to 238 past it), with 12 to 35 KB of shared memory.
template <int D, bool DROPOUT, bool CAUSAL = true>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    three_region_attention_bwd_dq_kernel(AttentionBackward args) {
    using Shape = QueryGradientShape<D, CAUSAL>;
    constexpr int kRow = Shape::kRow, kStripRow = Shape::kStripRow, kTileKeys = Shape::kTileKeys;
    extern __shared__ __align__(128) char raw[];
    __half* keys = reinterpret_cast<__half*>(raw);
    __half* values = keys + kTileKeys * kRow;
    __half* strips = values + kTileKeys * kRow;
    __half* douts = strips + Shape::kStripHalves;
    using Rows = RowData<kBackwardRows, CAUSAL>;
    auto* rows = reinterpret_cast<Rows*>(raw + Shape::kShared - kTileKeys * 4 - sizeof(Rows));
    int* key_positions = reinterpret_cast<int*>(rows + 1);

    const Attention& a = args.common;
    const int H = a.shape.H, T = a.shape.T;
    const int tiles = (T + kBackwardRows - 1) / kBackwardRows;
    const int first = (tiles - 1 - int(blockIdx.x % tiles)) * kBackwardRows;  // the longest first
    const int h = blockIdx.x / tiles % H, b = blockIdx.x / tiles / H;
    const int last = min(first + kBackwardRows, T) - 1;
    const int kv_head = h / (H / a.shape.Hkv);
    const int warp = threadIdx.x / 32;
    __half* strip = strips + warp * Shape::kStrip;
    float* scratch = reinterpret_cast<float*>(strip);

    FragmentA q[D / 16], dout[Shape::kHoldsDout ? D / 16 : 1];
    {
        __half* staged = keys;
        Carrier<kBackwardRows, D, kBackwardThreads> carrier;
        const auto position = [=](int row) { return first + row <= last ? first + row : kNowhere; };
        carrier.fetch(a.q.head<__half>(b, h), a.q.stride[2], position);
        carrier.put(staged, kRow);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
            wmma::load_matrix_sync(q[d], staged + warp * 16 * kRow + d * 16, kRow);
        carrier.fetch(args.dout.head<__half>(b, h), args.dout.stride[2], position);
        __syncthreads();
        carrier.put(Shape::kHoldsDout ? staged : douts, kRow);
        if (threadIdx.x < kBackwardRows) {
            const int query = min(first + int(threadIdx.x), last);
            NextRow<DROPOUT, CAUSAL> row;
            row.fetch(args, DROPOUT ? a.dropout.read_seed() : 0, b, h, query);
            rows->put(threadIdx.x, row);
            rows->put_window(a, b, threadIdx.x, query);
        }
        __syncthreads();
        if (Shape::kHoldsDout) {
#pragma unroll
            for (int d = 0; d < (Shape::kHoldsDout ? D / 16 : 1); ++d)
                wmma::load_matrix_sync(dout[d], staged + warp * 16 * kRow + d * 16, kRow);
            __syncthreads();
        }
    }
    const Places places = find_places(scratch);

    Accumulator dq[D / 16];
#pragma unroll
    for (int d = 0; d < D / 16; ++d) wmma::fill_fragment(dq[d], 0.0f);

    const KeyWalk<kTileKeys, CAUSAL> walk(a, b, first, last);
    const __half* k = a.k.head<__half>(b, kv_head);
    const __half* v = a.v.head<__half>(b, kv_head);
    using KeyCarrier = Carrier<kTileKeys, D, kBackwardThreads>;
    KeyCarrier next_keys, next_values;
    typename KeyCarrier::Positions positions;
    const auto find = [&](int tile) { positions.find([&](int key) { return walk.position(tile, key); }); };
    const auto fetch = [&] {
        next_keys.fetch(k, a.k.stride[2], positions);
        next_values.fetch(v, a.v.stride[2], positions);
    };
    find(0);  // where there is no tile at all, of keys that nobody looks at
    fetch();
    for (int tile = 0; tile < walk.tiles; ++tile) {
        __syncthreads();  // no warp reads the tile before any more
        next_keys.put(keys, kRow);
        next_values.put(values, kRow);
        positions.put(key_positions);
        __syncthreads();
        // Long before the rows are fetched: what is loaded here is where they lie.
        if (tile + 1 < walk.tiles) find(tile + 1);

        const bool far = walk.is_far(tile), full = walk.is_full(tile);
        const float bias = far ? a.layout.pivot_bias : 0.0f;
#pragma unroll(Shape::kHoldsDout ? 2 : 1)
        for (int n = 0; n < kTileKeys / 16; ++n) {
            Accumulator scores, dprobs;
            wmma::fill_fragment(scores, 0.0f);
            wmma::fill_fragment(dprobs, 0.0f);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                FragmentBT key;
                wmma::load_matrix_sync(key, keys + n * 16 * kRow + d * 16, kRow);
                wmma::mma_sync(scores, q[d], key, scores);
            }
#pragma unroll(Shape::kHoldsDout ? D / 16 : 2)
            for (int d = 0; d < D / 16; ++d) {
                FragmentBT value;
                wmma::load_matrix_sync(value, values + n * 16 * kRow + d * 16, kRow);
                if (Shape::kHoldsDout) {
                    wmma::mma_sync(dprobs, dout[Shape::kHoldsDout ? d : 0], value, dprobs);
                } else {
                    FragmentA left;
                    wmma::load_matrix_sync(left, douts + warp * 16 * kRow + d * 16, kRow);
                    wmma::mma_sync(dprobs, left, value, dprobs);
                }
            }
            // By a loop for each: few tiles need a mask, and without branches the rest overlaps.
            const int row = warp * 16;
            const QueryTerms terms[2] = {rows->terms[row + places.row(0)], rows->terms[row + places.row(2)]};
#pragma unroll
            for (int i = 0; i < 8; ++i)
                scores.x[i] = log2_probability(a, scores.x[i], bias, terms[i / 2 % 2].lse);
            if (!full) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int query = row + places.row(i);
                    if (!rows->row_sees(far, key_positions[n * 16 + places.column(i)], query, first + query))
                        scores.x[i] = -INFINITY;
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int position = DROPOUT ? key_positions[n * 16 + places.column(i)] : 0;
                const RowWords words = DROPOUT ? rows->words[row + places.row(i)] : RowWords{0, 0};
                scores.x[i] = dropped_and_gradient<DROPOUT>(a, exp2_fast(scores.x[i]), dprobs.x[i],
                                                            terms[i / 2 % 2].delta, words, position)
                                  .y;
            }
            places.store_halves(strip + n * 16, kStripRow, scores);
        }
        __syncwarp();
        // Not before: beside the scores there is no room for it in the registers.
        if (tile + 1 < walk.tiles) fetch();
#pragma unroll(Shape::kHoldsDout ? 2 : 1)
        for (int n = 0; n < kTileKeys / 16; ++n) {
            FragmentA dscores;
            wmma::load_matrix_sync(dscores, strip + n * 16, kStripRow);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                FragmentB key;
                wmma::load_matrix_sync(key, keys + n * 16 * kRow + d * 16, kRow);
                wmma::mma_sync(dq[d], dscores, key, dq[d]);
            }
        }
        __syncwarp();  // the strip is free for the next tile
    }

    __half* to = args.dq.head<__half>(b, h);
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
        by_rows(dq[d], scratch, [&](int r, int c, float* eight) {
            const int at = first + warp * 16 + r;
#pragma unroll
            for (int i = 0; i < 8; ++i) eight[i] *= a.scale;
            if (at <= last) *reinterpret_cast<uint4*>(to + at * args.dq.stride[2] + d * 16 + c) = pack(eight);
        });
}

template <int D, bool CAUSAL = true>
struct KeyGradientShape {
    // At 128 dk and dv are 128 registers a lane: what is fetched ahead must be little.
    static constexpr int kTileQueries = D <= 96 ? 32 : 16;
    // At 96 that would be too much shared memory for a second block.
    static constexpr int kRow = D == 96 ? D + 8 : padded_row(D);
    static constexpr int kStripRow = 16 + kStripPad;  // halves; P and dS of 16 x 16: 384 floats
    // k and v of 16 keys are D registers a lane: past 64 they stay in shared memory.
    static constexpr bool kHoldsKeys = D <= 64;
    static constexpr int kTileHalves = 2 * kTileQueries * kRow;
    static constexpr int kStripHalves = kBackwardWarps * 2 * 16 * kStripRow;
    static constexpr int kKeyHalves = kBackwardRows * kRow;
    static constexpr int kMain = (kTileHalves + kStripHalves + (kHoldsKeys ? 0 : 2 * kKeyHalves)) * 2;
    static constexpr int kStaged = kKeyHalves * 2;
    static constexpr int kShared =
        (kMain > kStaged ? kMain : kStaged) + int(sizeof(RowData<kTileQueries, CAUSAL>)) + kBackwardRows * 4;
};

// FAR: the block's keys are 64 sorted pivots, seen by the queries whose window lies right of them and, where
// the layout is not causal, by those whose window lies left of them; else 64 positions, seen by the queries
// in whose window they lie. Occupancy on sm_70. D = 32: 161 registers, 13 KB, 3 blocks of 4 warps. D = 64,
// 80, 96: 211 to 242 registers, 17 to 46 KB, 2 blocks. D = 128: 251 registers, 52 KB, 1 block, by shared
// memory.
template <int D, bool DROPOUT, bool FAR, bool CAUSAL = true>
__global__ void __launch_bounds__(kBackwardThreads, D <= 96 ? 2 : 1)
    three_region_attention_bwd_dkv_kernel(AttentionBackward args) {
    using Shape = KeyGradientShape<D, CAUSAL>;
    constexpr int kRow = Shape::kRow, kStripRow = Shape::kStripRow, kTileQueries = Shape::kTileQueries;
    extern __shared__ __align__(128) char raw[];
    __half* queries = reinterpret_cast<__half*>(raw);
    __half* douts = queries + kTileQueries * kRow;
    __half* strips = douts + kTileQueries * kRow;
    __half* held_keys = strips + Shape::kStripHalves;
    __half* held_values = held_keys + Shape::kKeyHalves;
    using Rows = RowData<kTileQueries, CAUSAL>;
    auto* rows = reinterpret_cast<Rows*>(raw + Shape::kShared - kBackwardRows * 4 - sizeof(Rows));
    int* key_positions = reinterpret_cast<int*>(rows + 1);

    const Attention& a = args.common;
    const AttentionShape& shape = a.shape;  // copies of its fields would cost registers
    const int keys = FAR ? a.layout.P : shape.T;
    const int tiles = (keys + kBackwardRows - 1) / kBackwardRows;
    const int first_key = int(blockIdx.x % tiles) * kBackwardRows;
    const int kv_head = blockIdx.x / tiles % shape.Hkv, b = blockIdx.x / tiles / shape.Hkv;
    const int group = shape.H / shape.Hkv;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int32_t* sorted_pivots = a.sorted_pivots + int64_t(b) * a.layout.P;
    __half* probs = strips + warp * 2 * 16 * kStripRow;
    __half* dscores = probs + 16 * kStripRow;
    float* scratch = reinterpret_cast<float*>(probs);
    const float bias = FAR ? a.layout.pivot_bias : 0.0f;

    const auto position_of = [=](int key) {
        const int at = first_key + key;
        if (at >= keys) return kNowhere;
        if (!FAR) return at;
        return sorted_pivots[at] < shape.T ? sorted_pivots[at] : kNowhere;
    };
    FragmentA k[Shape::kHoldsKeys ? D / 16 : 1], v[Shape::kHoldsKeys ? D / 16 : 1];
    {
        __half* staged = reinterpret_cast<__half*>(raw);
        Carrier<kBackwardRows, D, kBackwardThreads> carrier;
        carrier.fetch(a.k.head<__half>(b, kv_head), a.k.stride[2], position_of);
        carrier.put(Shape::kHoldsKeys ? staged : held_keys, kRow);
        if (threadIdx.x < kBackwardRows) key_positions[threadIdx.x] = position_of(threadIdx.x);
        carrier.fetch(a.v.head<__half>(b, kv_head), a.v.stride[2], position_of);
        __syncthreads();
        if (Shape::kHoldsKeys) {
#pragma unroll
            for (int d = 0; d < (Shape::kHoldsKeys ? D / 16 : 1); ++d)
                wmma::load_matrix_sync(k[d], staged + warp * 16 * kRow + d * 16, kRow);
            __syncthreads();
        }
        carrier.put(Shape::kHoldsKeys ? staged : held_values, kRow);
        __syncthreads();
        if (Shape::kHoldsKeys) {
#pragma unroll
            for (int d = 0; d < (Shape::kHoldsKeys ? D / 16 : 1); ++d)
                wmma::load_matrix_sync(v[d], staged + warp * 16 * kRow + d * 16, kRow);
            __syncthreads();
        }
    }
    const Places places = find_places(scratch);

    Accumulator dk[D / 16], dv[D / 16];
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
        wmma::fill_fragment(dk[d], 0.0f);
        wmma::fill_fragment(dv[d], 0.0f);
    }

    // The queries that see the block's keys, [begin, end); those in [full_begin, full_end) see all of them.
    // Far keys that are seen from both sides: `end` is the last query's, tiles from `pause` up to `resume`
    // are left out, and those before full_before see all keys, too.
    const int origin = a.layout.origin_of(b, shape.T);
    const int first_position = key_positions[0];
    const int last_position = key_positions[kBackwardRows - 1];
    int begin, end, full_begin, full_end, pause = -1, resume = 0, full_before = 0;
    if (FAR) {
        const auto seen_from = [&](int position) {
            return position == kNowhere ? shape.T : a.layout.first_query_past(position, origin, shape.T);
        };
        begin = seen_from(first_position);
        full_begin = seen_from(last_position);
        end = full_end = shape.T;
    } else {
        begin = CAUSAL ? max(first_position, origin) : a.layout.window_start(first_position, origin);
        const int last_key = min(first_key + kBackwardRows, shape.T) - 1;
        end = last_key < origin ? begin : a.layout.first_query_past(last_key, origin, shape.T);
        full_begin = last_position == kNowhere ? shape.T
                     : CAUSAL                  ? last_position
                                               : a.layout.window_start(last_position, origin);
        // Nobody sees a key before the sample.
        full_end =
            first_position < origin ? begin : a.layout.first_query_past(first_position, origin, shape.T);
    }
    int tiles_of_queries = max(0, (end - begin + kTileQueries - 1) / kTileQueries);
    if (FAR && !CAUSAL) {
        const int pivots =
            pivots_before(sorted_pivots + first_key, min(kBackwardRows, keys - first_key), shape.T);
        const auto seen_up_to = [&](int row) { return a.layout.window_start(key_positions[row], origin); };
        const int tiles_before = pivots == 0 ? 0 : (seen_up_to(pivots - 1) + kTileQueries - 1) / kTileQueries;
        pause = tiles_before * kTileQueries;
        full_before = pivots == 0 ? 0 : seen_up_to(0);
        resume = max(pause, begin / kTileQueries * kTileQueries);
        tiles_of_queries = tiles_before + max(0, (end - resume + kTileQueries - 1) / kTileQueries);
        begin = pause > 0 ? 0 : resume;
        if (pivots == 0) tiles_of_queries = 0;
    }
    // Steps: the tiles of queries of one head, then those of the next head of the group.
    int steps = tiles_of_queries * group;
    int next_h = kv_head * group, next_first = begin;
    const uint64_t seed = DROPOUT ? a.dropout.read_seed() : 0;
    Carrier<kTileQueries, D, kBackwardThreads> next_queries, next_douts;
    NextRow<DROPOUT, CAUSAL> next_row;
    const auto fetch = [&] {
        const auto position = [&](int row) { return next_first + row < end ? next_first + row : kNowhere; };
        next_queries.fetch(a.q.head<__half>(b, next_h), a.q.stride[2], position);
        next_douts.fetch(args.dout.head<__half>(b, next_h), args.dout.stride[2], position);
        if (threadIdx.x < kTileQueries)
            next_row.fetch(args, seed, b, next_h, min(next_first + int(threadIdx.x), end - 1));
    };
    if (steps > 0) fetch();
    for (; steps > 0; --steps) {
        const int first = next_first;
        next_first += kTileQueries;
        if (FAR && !CAUSAL && next_first == pause) next_first = resume;
        if (next_first >= end) ++next_h, next_first = begin;
        __syncthreads();  // no warp reads the tile before any more
        next_queries.put(queries, kRow);
        next_douts.put(douts, kRow);
        const bool full = (first >= full_begin && first + kTileQueries <= full_end) ||
                          (FAR && !CAUSAL && first + kTileQueries <= full_before);
        if (threadIdx.x < kTileQueries) {
            rows->put(threadIdx.x, next_row);
            // It takes a division, and only a mask asks for it.
            if (!full) rows->put_window(a, b, threadIdx.x, min(first + int(threadIdx.x), end - 1));
        }
        __syncthreads();
        if (steps > 1) fetch();

#pragma unroll 1
        for (int m = 0; m < kTileQueries; m += 16) {
            Accumulator scores, dprob;
            wmma::fill_fragment(scores, 0.0f);
            wmma::fill_fragment(dprob, 0.0f);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                FragmentBT right;
                if (Shape::kHoldsKeys) {
                    wmma::load_matrix_sync(right, queries + m * kRow + d * 16, kRow);
                    wmma::mma_sync(scores, k[Shape::kHoldsKeys ? d : 0], right, scores);
                    wmma::load_matrix_sync(right, douts + m * kRow + d * 16, kRow);
                    wmma::mma_sync(dprob, v[Shape::kHoldsKeys ? d : 0], right, dprob);
                } else {
                    FragmentA left;
                    wmma::load_matrix_sync(left, held_keys + warp * 16 * kRow + d * 16, kRow);
                    wmma::load_matrix_sync(right, queries + m * kRow + d * 16, kRow);
                    wmma::mma_sync(scores, left, right, scores);
                    wmma::load_matrix_sync(left, held_values + warp * 16 * kRow + d * 16, kRow);
                    wmma::load_matrix_sync(right, douts + m * kRow + d * 16, kRow);
                    wmma::mma_sync(dprob, left, right, dprob);
                }
            }
            QueryTerms terms[4];
            rows->read_two(m + places.column(0), terms);
            rows->read_two(m + places.column(4), terms + 2);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                scores.x[i] = log2_probability(a, scores.x[i], bias, terms[i / 4 * 2 + i % 2].lse);
            if (!full) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int query = m + places.column(i);
                    const int key = key_positions[warp * 16 + places.row(i)];
                    if (first + query >= end || !rows->row_sees(FAR, key, query, first + query))
                        scores.x[i] = -INFINITY;
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int position = DROPOUT ? key_positions[warp * 16 + places.row(i)] : 0;
                const RowWords words = DROPOUT ? rows->words[m + places.column(i)] : RowWords{0, 0};
                const float2 both = dropped_and_gradient<DROPOUT>(
                    a, exp2_fast(scores.x[i]), dprob.x[i], terms[i / 4 * 2 + i % 2].delta, words, position);
                scores.x[i] = both.x, dprob.x[i] = both.y;
            }
            places.store_halves(probs, kStripRow, scores);
            places.store_halves(dscores, kStripRow, dprob);
            __syncwarp();
            FragmentA left;
            wmma::load_matrix_sync(left, probs, kStripRow);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                FragmentB right;
                wmma::load_matrix_sync(right, douts + m * kRow + d * 16, kRow);
                wmma::mma_sync(dv[d], left, right, dv[d]);
            }
            wmma::load_matrix_sync(left, dscores, kStripRow);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                FragmentB right;
                wmma::load_matrix_sync(right, queries + m * kRow + d * 16, kRow);
                wmma::mma_sync(dk[d], left, right, dk[d]);
            }
            __syncwarp();  // the strip is free for the next rows
        }
    }

    // This lane's row in by_rows, and in the window kernel the pivot that it may be.
    const int key = first_key + warp * 16 + lane / 2;
    int rank = -1;
    if (!FAR && key < keys) {
        const int before = pivots_before(sorted_pivots, a.layout.P, key);
        if (before < a.layout.P && sorted_pivots[before] == key) rank = before;
    }
    const int64_t packed = (int64_t(b) * shape.Hkv + kv_head) * a.layout.P;
    const auto write = [&](const Accumulator& from, float factor, const StridedOutput& to, float* far,
                           int d) {
        by_rows(from, scratch, [&](int, int c, float* eight) {
            if (key >= keys) return;
#pragma unroll
            for (int i = 0; i < 8; ++i) eight[i] *= factor;
            if (FAR) {
                float* at = far + (packed + key) * D + d * 16 + c;
                *reinterpret_cast<float4*>(at) = make_float4(eight[0], eight[1], eight[2], eight[3]);
                *reinterpret_cast<float4*>(at + 4) = make_float4(eight[4], eight[5], eight[6], eight[7]);
                return;
            }
            if (rank >= 0) {
                const float* at = far + (packed + rank) * D + d * 16 + c;
#pragma unroll
                for (int i = 0; i < 8; ++i) eight[i] += at[i];
            }
            __half* row = to.row<__half>(b, kv_head, key);
            *reinterpret_cast<uint4*>(row + d * 16 + c) = pack(eight);
        });
    };
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
        write(dk[d], a.scale, args.dk, args.dk_far, d);
        write(dv[d], DROPOUT ? a.dropout.keep_scale : 1.0f, args.dv, args.dv_far, d);
    }
}

}  // namespace
}  // namespace cogview
