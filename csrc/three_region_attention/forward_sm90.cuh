// SPDX-License-Identifier: Apache-2.0
// Forward of three-region attention for Hopper (sm_90a): D = 64, 16 bits, causal, no dropout, no starts.
//
// A block takes 128 queries of a head, 64 a consumer warpgroup. Four producer warps gather rows of k and v,
// those of sorted pivots first, then those of the window, into a ring of four tiles of 64 keys in shared
// memory, each warp into a stage of its own. Consumers wait for tiles alone, not for one another, and two
// blocks share a multiprocessor, so the softmax of one runs beside the products of others. Scores are q k^T
// from shared memory; out += p v has p in registers. Visible keys, units of log2 and what is left for the
// backward are those of forward_triton.py, whose index kernel (index_triton.py) runs before.
//
// FLOPs: 4 D a visible pair. Bytes: q and out once, k and v of its keys by each block, mostly from L2.
// exp2: one a pair.
#pragma once

#include "three_region_attention/swizzle.cuh"
#include "three_region_attention/three_region_attention.h"
#include "three_region_attention/wgmma.cuh"

namespace cogview {
namespace {

constexpr float kLowest = -3.4028234663852886e38f;  // below every score; -inf - -inf would be NaN

struct Sm90Shape {
    static constexpr int kWarpgroups = 2;  // of consumers
    static constexpr int kQueries = 64 * kWarpgroups, kKeys = 64, kStages = 4;
    static constexpr int kThreads = 128 * (kWarpgroups + 1);
    static constexpr int kBlocks = 2;  // at once on a multiprocessor
    // A thread starts with 80; producers, a whole warpgroup, give back what consumers take.
    static constexpr int kConsumerRegisters = 104, kProducerRegisters = 32;
    // Bytes of shared memory.
    static constexpr int kQueryTile = kQueries * kSwizzledRow, kKeyTile = kKeys * kSwizzledRow;
    static constexpr int kKeysAt = kQueryTile;
    static constexpr int kValuesAt = kKeysAt + kStages * kKeyTile;
    static constexpr int kBarriersAt = kValuesAt + kStages * kKeyTile;
    static constexpr int kBarriers = 1 + 2 * kStages;
    static constexpr int kShared = kBarriersAt + 8 * kBarriers + kSwizzleAtom;  // the last to align
    static_assert(kStages == 4, "a producer warp has a stage");
};

// ---- which keys

__device__ __forceinline__ int window_block_of(int query, int block_size, int window_blocks) {
    const int block = query / block_size - window_blocks + 1;
    return block > 0 ? block : 0;
}

// How many pivots lie before each block of positions; nullptr where no key is far.
__device__ __forceinline__ const int32_t* counts_of(const AttentionForwardSm90& a, int b) {
    return a.index_stride == 0 ? nullptr : a.residuals + b * a.index_stride + a.padded_pivots + a.shape.T;
}

// The keys of the queries from `first` to `last`: `far_stop` pivots of the list, all of which see the first
// `far_full`; then positions from `window` to `last`, all of which see those from `window_full` to `first`.
struct Span {
    int first, last, far_full, far_stop, window, window_full;

    __device__ __forceinline__ Span(const AttentionForwardSm90& a, const int32_t* counts, int first,
                                    int queries)
        : first(min(first, a.shape.T - 1)), last(min(first + queries, a.shape.T) - 1) {
        const int low = window_block_of(this->first, a.block_size, a.window_blocks);
        const int high = window_block_of(last, a.block_size, a.window_blocks);
        far_full = counts == nullptr ? 0 : counts[low];
        far_stop = counts == nullptr ? 0 : counts[high];
        window = low * a.block_size;
        window_full = high * a.block_size;
    }
};

// The row of tiles of a block's queries: those of pivots, then those of the window.
struct Tiles {
    static constexpr int kKeys = Sm90Shape::kKeys;
    int far, count, window;

    __device__ __forceinline__ explicit Tiles(const Span& span)
        : far((span.far_stop + kKeys - 1) / kKeys),
          count(far + (span.last + 1 - span.window + kKeys - 1) / kKeys),
          window(span.window) {}
    __device__ __forceinline__ bool is_far(int tile) const { return tile < far; }
    // The first key: a place in the list of pivots, or a position.
    __device__ __forceinline__ int start(int tile) const {
        return tile < far ? tile * kKeys : window + (tile - far) * kKeys;
    }
};

// Which of a block's tiles some queries of it see, at all and in full, by number.
struct Seen {
    static constexpr int kKeys = Sm90Shape::kKeys;
    int far, far_full, window, window_full, window_full_stop, stop;

    __device__ __forceinline__ Seen(const Tiles& tiles, const Span& span)
        : far((span.far_stop + kKeys - 1) / kKeys),
          far_full(span.far_full / kKeys),
          window(tiles.far + (span.window - tiles.window) / kKeys),
          window_full(tiles.far + (span.window_full - tiles.window + kKeys - 1) / kKeys),
          window_full_stop(tiles.far + (span.first + 1 - tiles.window) / kKeys),
          stop(tiles.far + (span.last - tiles.window) / kKeys + 1) {}
    __device__ __forceinline__ bool any(int tile) const {
        return (tile < far) | ((tile >= window) & (tile < stop));
    }
    __device__ __forceinline__ bool all(int tile) const {
        return (tile < far_full) | ((tile >= window_full) & (tile < window_full_stop));
    }
};

// ---- what both kinds of warps know

struct Block {
    int b, h, first;  // the head, and the first query

    // The last queries see most: they go first.
    __device__ __forceinline__ explicit Block(const AttentionForwardSm90& a) {
        const int tiles = (a.shape.T + Sm90Shape::kQueries - 1) / Sm90Shape::kQueries;
        first = (tiles - 1 - int(blockIdx.x % tiles)) * Sm90Shape::kQueries;
        b = blockIdx.x / tiles / a.shape.H;
        h = blockIdx.x / tiles % a.shape.H;
    }
};

// Addresses of barriers. A full one waits for copies, an empty one for a warp of each consumer.
struct Barriers {
    uint32_t at;

    __device__ __forceinline__ uint32_t full_q() const { return at; }
    __device__ __forceinline__ uint32_t full(int stage) const { return at + 8 * (1 + stage); }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(Sm90Shape::kStages + stage); }

    __device__ __forceinline__ void init() const {
        barrier_init(full_q(), Sm90Shape::kStages);
        for (int i = 0; i < Sm90Shape::kStages; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), 4 * Sm90Shape::kWarpgroups);
        }
        barriers_initialized();
    }
};

// ---- producers

// Rows of a tensor of 16 bits, from the chunk of a lane on.
struct Rows {
    const char* at;
    uint32_t stride;  // bytes

    __device__ __forceinline__ Rows(const StridedInput& x, int b, int h, int chunk)
        : at(static_cast<const char*>(x.data) + 2 * (b * x.stride[0] + h * x.stride[1] + chunk * 8)),
          stride(2 * x.stride[2]) {}
    __device__ __forceinline__ const char* row(uint32_t position) const {
        return row_address(at, position, stride);
    }
};

// A quarter of the queries: every fourth group of four rows.
__device__ __forceinline__ void copy_queries(const AttentionForwardSm90& a, const Block& block,
                                             uint32_t shared, int stage, int row, int chunk) {
    const Rows q(a.q, block.b, block.h, chunk);
    int i = stage * 4 + row;
    keep_here(i);
#pragma unroll 1
    for (; i < Sm90Shape::kQueries; i += 4 * Sm90Shape::kStages)
        copy_chunk(shared + swizzled(i, chunk), q.row(block.first + i), block.first + i < a.shape.T);
}

// The warp of stage `stage`: of every four tiles in a row it gathers one, and tells when it has arrived.
__device__ __forceinline__ void produce(const AttentionForwardSm90& a, uint32_t shared, int stage, int lane) {
    constexpr int kKeys = Sm90Shape::kKeys;
    const Barriers barriers{shared + Sm90Shape::kBarriersAt};
    // A lane copies chunk lane % 8 of every fourth row.
    const int chunk = lane % 8, row = lane / 8;
    const uint32_t keys_at = shared + Sm90Shape::kKeysAt + stage * Sm90Shape::kKeyTile;
    const uint32_t even = keys_at + swizzled(row, chunk), odd = keys_at + swizzled(row + 4, chunk);

    const Block block(a);
    const int32_t* sorted_pivots = a.residuals + block.b * a.index_stride;
    const Tiles tiles(Span(a, counts_of(a, block.b), block.first, Sm90Shape::kQueries));
    const int key_head = block.h / (a.shape.H / a.shape.Hkv);
    const Rows k(a.k, block.b, key_head, chunk), v(a.v, block.b, key_head, chunk);

    copy_queries(a, block, shared, stage, row, chunk);
    // The first tile brings the queries along.
    uint32_t q_pending = barriers.full_q();
    auto wait_for_copies = [&] {
        copies_commit();
        copies_wait();
        fence_for_products();
        __syncwarp();
        if (q_pending != 0 && lane == 0) barrier_arrive(q_pending);
        q_pending = 0;
    };

    uint32_t parity = 1;  // the first wait passes at once
    for (int tile = stage; tile < tiles.count; tile += Sm90Shape::kStages) {
        const bool far = tiles.is_far(tile);
        const int first = tiles.start(tile) + lane;
        int positions[kKeys / 32];  // of row 32 j + lane
#pragma unroll
        for (int j = 0; j < kKeys / 32; ++j) {
            const int index = first + 32 * j;
            positions[j] = far ? (index < a.padded_pivots ? __ldg(sorted_pivots + index) : a.shape.T) : index;
        }
        barrier_wait(barriers.empty(stage), parity);
        parity ^= 1;
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i) {
            const uint32_t position = __shfl_sync(0xffffffffu, positions[i / 8], i % 8 * 4 + row);
            const uint32_t to = i % 2 ? odd + (i - 1) * 4 * kSwizzledRow : even + i * 4 * kSwizzledRow;
            const bool valid = position < uint32_t(a.shape.T);
            copy_chunk(to, k.row(position), valid);
            copy_chunk(to + Sm90Shape::kValuesAt - Sm90Shape::kKeysAt, v.row(position), valid);
        }
        wait_for_copies();
        if (lane == 0) barrier_arrive(barriers.full(stage));
    }
    if (q_pending != 0) wait_for_copies();
}

// ---- consumers

// The scores of keys that a query does not see become -inf.
__device__ __forceinline__ void mask(float (&s)[32], const AttentionForwardSm90& a, const int32_t* counts,
                                     bool far, int start, int row, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int query = min(row + 8 * half, a.shape.T - 1);
        keep_here(query);
        const int block = window_block_of(query, a.block_size, a.window_blocks);
        const int low = far ? 0 : block * a.block_size, high = far ? counts[block] : query + 1;
        const int offset = start + lane % 4 * 2 - low;
        const uint32_t length = high - low;
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if ((i & 2) == 2 * half)
                s[i] = uint32_t(offset + accumulator_column(0, i)) < length ? s[i] : -INFINITY;
    }
}

struct RunningRow {
    float max = kLowest, rest = 0.f, total = 0.f;  // total: of the keys this thread has

    // Past this peak a multiply-add of the score and the rounded peak would be off by too much.
    static constexpr float kLarge = 1024.f;

    __device__ __forceinline__ bool is_large(float top, float factor, float bias) const {
        return fabsf(fmaxf(max, fmaf(top, factor, bias))) > kLarge;
    }
    // The row has got a tile whose largest product is `top`. Returns what its sums shrink by. Probabilities
    // are then 2^(s factor + shift), with s - top in the place of s where `large`.
    __device__ __forceinline__ float advance(float top, float factor, float bias, bool large, float& shift) {
        const float peak = fmaf(top, factor, bias);
        const bool grows = peak > max;
        const float new_max = grows ? peak : max;
        shift = large ? peak - new_max : bias - new_max;
        if (grows) rest = large ? fmaf(top, factor, -peak) + bias : 0.f;
        const float shrink = exp2_approximate(max - new_max);
        max = new_max;
        total *= shrink;
        return shrink;
    }
};

// Scores become probabilities; the sums of the thread's rows shrink by `shrink`.
__device__ __forceinline__ void softmax(float (&s)[32], RunningRow (&rows)[2], float (&shrink)[2],
                                        float factor, float bias) {
    float top[2] = {kLowest, kLowest}, other[2] = {kLowest, kLowest}, shift[2];
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        top[0] = fmaxf(top[0], s[i]), other[0] = fmaxf(other[0], s[i + 1]);
        top[1] = fmaxf(top[1], s[i + 2]), other[1] = fmaxf(other[1], s[i + 3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        top[half] = fmaxf(top[half], other[half]);
        top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 1));
        top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 2));
    }
    const bool large = __any_sync(
        0xffffffffu, rows[0].is_large(top[0], factor, bias) || rows[1].is_large(top[1], factor, bias));
    if (large) {
#pragma unroll
        for (int i = 0; i < 32; ++i) s[i] -= top[i >> 1 & 1];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
        shrink[half] = rows[half].advance(top[half], factor, bias, large, shift[half]);
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        s[i] = exp2_approximate(fmaf(s[i], factor, shift[i >> 1 & 1]));
        sum[i & 3] += s[i];
    }
    rows[0].total += sum[0] + sum[1];
    rows[1].total += sum[2] + sum[3];
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}

// lse and both peaks of the rows of a thread; `scale` becomes one over their sums.
__device__ __forceinline__ void store_sums(const AttentionForwardSm90& a, const Block& block,
                                           const RunningRow (&rows)[2], float (&scale)[2], int row,
                                           int lane) {
    const int T = a.shape.T;
    const int64_t bh = int64_t(block.b) * a.shape.H + block.h;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = rows[half].total;
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        scale[half] = 1.f / total;
        const float rest = rows[half].rest + log2f(total);
        const int query = row + 8 * half;
        if (lane % 4 == 0 && query < T) {
            a.lse[bh * T + query] = (rows[half].max + rest) * 0.6931471805599453f;
            int32_t* peaks = a.residuals + a.shape.B * a.index_stride + bh * 2 * T + query;
            peaks[0] = __float_as_int(rows[half].max);
            peaks[T] = __float_as_int(rest);
        }
    }
}

// Writes out of a warp's 16 rows: lanes exchange halves, so that four of them fill a sector of 32 bytes.
template <typename T>
__device__ __forceinline__ void store_out(const float (&out)[32], const float (&scale)[2],
                                          const AttentionForwardSm90& a, const Block& block, int query,
                                          int lane) {
    const int odd = lane & 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        T* row = a.out.row<T>(block.b, block.h, query + 8 * half) + odd * 8 + (lane >> 1 & 1) * 4;
#pragma unroll
        for (int group = 0; group < 8; group += 2) {
            const int i = 4 * group + 2 * half;
            const uint32_t x = pack(out[i] * scale[half], out[i + 1] * scale[half], T{});
            const uint32_t y = pack(out[i + 4] * scale[half], out[i + 5] * scale[half], T{});
            const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? x : y, 1);
            const uint2 both = odd ? make_uint2(other, y) : make_uint2(x, other);
            if (query + 8 * half < a.shape.T) *reinterpret_cast<uint2*>(row + group * 8) = both;
        }
    }
}

template <typename T>
__device__ __forceinline__ void consume(const AttentionForwardSm90& a, uint32_t shared, int thread) {
    const Barriers barriers{shared + Sm90Shape::kBarriersAt};
    const int warpgroup = __shfl_sync(0xffffffffu, thread / 128, 0), lane = thread % 32;
    const Block block(a);
    const int32_t* counts = counts_of(a, block.b);
    const Tiles tiles(Span(a, counts, block.first, Sm90Shape::kQueries));
    const Seen seen(tiles, Span(a, counts, block.first + 64 * warpgroup, 64));
    const int row = block.first + accumulator_row(thread, 0);

    RunningRow rows[2];
    float s[32], out[32], shrink[2];
    uint32_t p[16];
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i] = 0.f;
    const uint64_t q = swizzled_descriptor(shared + warpgroup * 64 * kSwizzledRow);

    barrier_wait(barriers.full_q(), 0);
    int stage = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles.count; ++tile) {
        barrier_wait(barriers.full(stage), parity);
        if (seen.any(tile)) {
            const uint32_t keys_at = shared + Sm90Shape::kKeysAt + stage * Sm90Shape::kKeyTile;
            const uint64_t k = swizzled_descriptor(keys_at);
            const uint64_t v = swizzled_descriptor(keys_at + Sm90Shape::kValuesAt - Sm90Shape::kKeysAt);
            pin(s);
            products_begin();
#pragma unroll
            for (int i = 0; i < 4; ++i) Products<T>::scores(s, q + i * kAlongRow, k + i * kAlongRow, i > 0);
            products_commit();
            products_wait();
            pin(s);

            const bool far = tiles.is_far(tile);
            if (!seen.all(tile)) mask(s, a, counts, far, tiles.start(tile), row, lane);
            softmax(s, rows, shrink, a.factor, far ? a.bias : 0.f);
#pragma unroll
            for (int i = 0; i < 32; ++i) out[i] *= shrink[i >> 1 & 1];
#pragma unroll
            for (int i = 0; i < 16; ++i) p[i] = pack(s[2 * i], s[2 * i + 1], T{});

            pin(out);
            pin(p);
            products_begin();
#pragma unroll
            for (int i = 0; i < 4; ++i) Products<T>::output(out, p + 4 * i, v + i * kAcrossRows);
            products_commit();
            products_wait();
            pin(out);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers.empty(stage));
        if (++stage == Sm90Shape::kStages) stage = 0, parity ^= 1;
    }

    float scale[2];
    store_sums(a, block, rows, scale, row, lane);
    store_out<T>(out, scale, a, block, row, lane);
}

template <typename T>
__global__ void __launch_bounds__(Sm90Shape::kThreads, Sm90Shape::kBlocks)
    three_region_attention_fwd_sm90_kernel(AttentionForwardSm90 args) {
    extern __shared__ __align__(128) char raw[];
    const uint32_t shared = (shared_address(raw) + kSwizzleAtom - 1) / kSwizzleAtom * kSwizzleAtom;
    if (threadIdx.x == 0) Barriers{shared + Sm90Shape::kBarriersAt}.init();
    __syncthreads();
    if (threadIdx.x >= 128 * Sm90Shape::kWarpgroups) {
        give_registers_back<Sm90Shape::kProducerRegisters>();
        const int stage = __shfl_sync(0xffffffffu, threadIdx.x / 32 - 4 * Sm90Shape::kWarpgroups, 0);
        produce(args, shared, stage, threadIdx.x % 32);
    } else {
        take_registers<Sm90Shape::kConsumerRegisters>();
        consume<T>(args, shared, threadIdx.x);
    }
}

}  // namespace
}  // namespace cogview
