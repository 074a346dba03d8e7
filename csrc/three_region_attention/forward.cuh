// SPDX-License-Identifier: Apache-2.0
// Forward of three-region attention. Per query i, over the keys j it sees:
//     x_j = scale q_i k_j (+ bias where far),   l = sum_j e^(x_j - max)
//     out_i = sum_j e^(x_j - max) v_j / l,      lse_i = max + log l
// A block takes 128 queries of a head; a warp 16 M of them, all keys, all columns of out. Tiles of 32 keys:
// scores by wmma into the warp's strip, one lane (M = 1: two) to a row for maximum, exponentials and sum, the
// probabilities back into the strip as fp16, out += probabilities v by wmma.
//
// FLOPs: 4 D a visible pair. Bytes: q and out once; k and v of its keys by each block, mostly from L2.
// Shared memory a key tile and warp: 2 x 32 x D halves and the strip's scores (written, read, halves written
// and read), see benchmarks/NOTES.md. exp2: one a pair.
#pragma once

#include "three_region_attention/tiles.cuh"

namespace cogview {
namespace {

constexpr int kTileKeys = 32;

template <int D>
struct ForwardShape {
    static constexpr int kM = D <= 64 ? 2 : 1;  // out of 32 rows is D registers a lane: too many past 64
    static constexpr int kRows = 16 * kM;
    static constexpr int kWarps = 8 / kM;
    static constexpr int kThreads = 32 * kWarps;
    // At once on a multiprocessor. Far keys on both sides cost registers, which at D = 32 would be spilled.
    static constexpr int blocks(bool causal) { return D == 32 ? (causal ? 3 : 2) : D == 64 ? 2 : 1; }
    static constexpr int kQueries = 128;
    static constexpr int kRow = padded_row(D);       // halves
    static constexpr int kStripRow = kTileKeys + 4;  // floats
    // k, v and the strips; the queries pass through the same place before the first tile.
    static constexpr int kTileHalves = 2 * kTileKeys * kRow;
    static constexpr int kStrips = kQueries * kStripRow;
    static constexpr int kStaged = kQueries * kRow * 2;
    static constexpr int kMain = kTileHalves * 2 + kStrips * 4;
    static constexpr int kShared = (kMain > kStaged ? kMain : kStaged) + kQueries * 4 + kTileKeys * 4;
};

// Occupancy on sm_70, by registers. D = 32: 168, 25 KB, 3 blocks of 4 warps. D = 64: 251, 29 KB, 2 blocks of
// 4 warps. D = 80, 96, 128: 184 to 227, 30 to 37 KB, 1 block of 8 warps.
template <int D, bool DROPOUT, bool CAUSAL = true>
__global__ void __launch_bounds__(ForwardShape<D>::kThreads, ForwardShape<D>::blocks(CAUSAL))
    three_region_attention_fwd_kernel(AttentionForward args) {
    using Shape = ForwardShape<D>;
    constexpr int M = Shape::kM, kRows = Shape::kRows, kRow = Shape::kRow, kStripRow = Shape::kStripRow;
    extern __shared__ __align__(128) char raw[];
    __half* keys = reinterpret_cast<__half*>(raw);
    __half* values = keys + kTileKeys * kRow;
    float* strips = reinterpret_cast<float*>(raw + Shape::kTileHalves * 2);
    float* row_factors = reinterpret_cast<float*>(raw + Shape::kShared) - Shape::kQueries - kTileKeys;
    int* key_positions = reinterpret_cast<int*>(row_factors + Shape::kQueries);

    const Attention& a = args.common;
    const int H = a.shape.H, T = a.shape.T;
    const int tiles = (T + Shape::kQueries - 1) / Shape::kQueries;
    // The last queries see most: they go first, so that no long block is left alone at the end.
    const int first = (tiles - 1 - int(blockIdx.x % tiles)) * Shape::kQueries;
    const int h = blockIdx.x / tiles % H, b = blockIdx.x / tiles / H;
    const int last = min(first + Shape::kQueries, T) - 1;
    const int kv_head = h / (H / a.shape.Hkv);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* strip = strips + warp * kRows * kStripRow;
    __half* halves = reinterpret_cast<__half*>(strip);
    float* factors = row_factors + warp * kRows;

    FragmentA q[M][D / 16];
    {
        __half* staged = reinterpret_cast<__half*>(raw);
        Carrier<Shape::kQueries, D, Shape::kThreads> rows;
        rows.fetch(a.q.head<__half>(b, h), a.q.stride[2],
                   [=](int row) { return first + row <= last ? first + row : kNowhere; });
        rows.put(staged, kRow);
        __syncthreads();
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int d = 0; d < D / 16; ++d)
                wmma::load_matrix_sync(q[m][d], staged + (warp * kRows + m * 16) * kRow + d * 16, kRow);
        __syncthreads();
    }
    const Places places = find_places(strip);

    // This lane's row of the strip, and where in it its columns begin.
    const int row = lane % kRows, column = lane / kRows * (16 * M);
    const int query = first + warp * kRows + row;
    const int window_start = a.layout.window_start(min(query, last), a.layout.origin_of(b, T));
    const int window_last = a.layout.window_last(query, a.layout.origin_of(b, T), T, CAUSAL);
    RowWords words = {0, 0};
    if (DROPOUT) words = philox(a.dropout.read_seed(), query, h, b);

    Accumulator out[M][D / 16];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int d = 0; d < D / 16; ++d) wmma::fill_fragment(out[m][d], 0.0f);
    float row_max = -INFINITY, sum = 0.0f;

    const KeyWalk<kTileKeys, CAUSAL> walk(a, b, first, last);
    const __half* k = a.k.head<__half>(b, kv_head);
    const __half* v = a.v.head<__half>(b, kv_head);
    using KeyCarrier = Carrier<kTileKeys, D, Shape::kThreads>;
    KeyCarrier next_keys, next_values;
    typename KeyCarrier::Positions positions;
    const auto find = [&](int tile) { positions.find([&](int key) { return walk.position(tile, key); }); };
    const auto fetch = [&] {
        next_keys.fetch(k, a.k.stride[2], positions);
        next_values.fetch(v, a.v.stride[2], positions);
    };
    if (walk.tiles > 0) {
        find(0);
        fetch();
    }
    for (int tile = 0; tile < walk.tiles; ++tile) {
        __syncthreads();  // no warp reads the tile before any more
        next_keys.put(keys, kRow);
        next_values.put(values, kRow);
        positions.put(key_positions);
        __syncthreads();

#pragma unroll
        for (int n = 0; n < kTileKeys / 16; ++n) {
            Accumulator scores[M];
#pragma unroll
            for (int m = 0; m < M; ++m) wmma::fill_fragment(scores[m], 0.0f);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                FragmentBT key;
                wmma::load_matrix_sync(key, keys + n * 16 * kRow + d * 16, kRow);
#pragma unroll
                for (int m = 0; m < M; ++m) wmma::mma_sync(scores[m], q[m][d], key, scores[m]);
            }
#pragma unroll
            for (int m = 0; m < M; ++m)
                wmma::store_matrix_sync(strip + m * 16 * kStripRow + n * 16, scores[m], kStripRow,
                                        wmma::mem_row_major);
        }
        __syncwarp();

        float x[16 * M];
        const bool far = walk.is_far(tile), full = walk.is_full(tile);
        const float bias = far ? a.layout.pivot_bias : 0.0f;
#pragma unroll
        for (int c = 0; c < 16 * M; c += 4) {
            const float4 four = *reinterpret_cast<const float4*>(strip + row * kStripRow + column + c);
            x[c] = four.x, x[c + 1] = four.y, x[c + 2] = four.z, x[c + 3] = four.w;
        }
#pragma unroll
        for (int c = 0; c < 16 * M; ++c) x[c] = x[c] * a.scale + bias;
        // In a loop of its own: few tiles need a mask, and without branches the rest of a row's work
        // overlaps.
        if (!full) {
#pragma unroll
            for (int c = 0; c < 16 * M; ++c)
                if (!sees(far, key_positions[column + c], window_start, window_last, CAUSAL))
                    x[c] = -INFINITY;
        }
        float new_max = row_max;
#pragma unroll
        for (int c = 0; c < 16 * M; ++c) new_max = fmaxf(new_max, x[c]);
        if (M == 1) new_max = fmaxf(new_max, __shfl_xor_sync(kAllLanes, new_max, 16));
        // A row that has seen no key yet: -inf minus -inf would be NaN.
        const float base = new_max == -INFINITY ? 0.0f : new_max;
        // The difference first, then the factor: rounding of large scores then cancels.
        const float factor = exp2_fast((row_max - base) * kLog2e);
        row_max = new_max;
        sum *= factor;
        // Long before the rows are fetched: what is loaded here is where they lie.
        if (tile + 1 < walk.tiles) find(tile + 1);
        __syncwarp();  // the other half of a row (M = 1) has been read: its place is written now
#pragma unroll
        for (int c = 0; c < 16 * M; c += 8) {
#pragma unroll
            for (int i = c; i < c + 8; ++i) {
                x[i] = exp2_fast((x[i] - base) * kLog2e);
                sum += x[i];
                if (DROPOUT && !keep_mask(words.r0, words.r1, uint32_t(key_positions[column + i]),
                                          a.dropout.keep_threshold))
                    x[i] = 0.0f;
            }
            *reinterpret_cast<uint4*>(halves + row * 2 * kStripRow + column + c) = pack(x + c);
        }
        if (column == 0) factors[row] = factor;
        __syncwarp();
        // Not before: beside a row of scores there is no room for it in the registers.
        if (tile + 1 < walk.tiles) fetch();

        if (__any_sync(kAllLanes, factor != 1.0f)) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float f = factors[m * 16 + places.row(i)];
#pragma unroll
                    for (int d = 0; d < D / 16; ++d) out[m][d].x[i] *= f;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kTileKeys / 16; ++n) {
            FragmentA probs[M];
#pragma unroll
            for (int m = 0; m < M; ++m)
                wmma::load_matrix_sync(probs[m], halves + m * 16 * 2 * kStripRow + n * 16, 2 * kStripRow);
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                FragmentB value;
                wmma::load_matrix_sync(value, values + n * 16 * kRow + d * 16, kRow);
#pragma unroll
                for (int m = 0; m < M; ++m) wmma::mma_sync(out[m][d], probs[m], value, out[m][d]);
            }
        }
        __syncwarp();  // the strip is free for the next scores
    }

    if (M == 1) sum += __shfl_xor_sync(kAllLanes, sum, 16);
    if (column == 0) {
        // A query before its sample sees nothing: it gives 0, whatever its scores are.
        const bool blind = query < a.layout.origin_of(b, T);
        factors[row] = blind ? 0.0f : (DROPOUT ? a.dropout.keep_scale : 1.0f) / sum;
        if (query <= last)
            args.lse[(int64_t(b) * H + h) * T + query] = blind ? -INFINITY : row_max + logf(sum);
    }
    __syncwarp();
    __half* to = args.out.head<__half>(b, h);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
            by_rows(out[m][d], strip, [&](int r, int c, float* eight) {
                const int at = first + warp * kRows + m * 16 + r;
                const float f = factors[m * 16 + r];
#pragma unroll
                for (int i = 0; i < 8; ++i) eight[i] *= f;
                if (at <= last)
                    *reinterpret_cast<uint4*>(to + at * args.out.stride[2] + d * 16 + c) = pack(eight);
            });
}

}  // namespace
}  // namespace cogview
