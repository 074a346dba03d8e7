// SPDX-License-Identifier: Apache-2.0
// Forward of three-region attention for Hopper (sm_90a): head size 64, 16 bits, causal, no dropout, no
// starts.
//
// A block takes 64 queries a consumer warpgroup. Producer warps gather rows of k and v, those of sorted
// pivots first, then those of the window, into a ring of tiles in shared memory; consumers never touch the
// others' tiles' addresses nor wait for one another, so one's softmax runs beside another's products. Scores
// are q k^T from shared memory, out += p v with p in registers. Visible keys, units of log2 and what is left
// for the backward are those of forward_triton.py, whose index kernel runs before.
//
// FLOPs: 4 D a visible pair. Bytes: k and v of a tile of queries once from L2. exp2: one a pair.
#pragma once

#include "three_region_attention/wgmma.cuh"

namespace cogview {

constexpr float kLowest = -3.4028234663852886e38f;  // below every score; -inf - -inf would be NaN

struct Sm90Forward {
    const void *q, *k, *v;
    void* out;
    float* lse;
    int32_t* residuals;  // the index of pivots (see index_triton.py), then the peaks, from peaks_at on
    // In elements, of samples, heads, positions.
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
    int B, H, G, T, PP;
    int64_t index_stride, peaks_at;
    int block_size, window_blocks;
    float factor, bias;  // of log2
    bool has_far;
};

// ---- which keys: shared with the test on the CPU

// What a block does in turn: a tile of queries of a head. Those of a head lie together, its last queries,
// which see most, first. Blocks that do several get them dealt with a rotation, so that none gets only long
// ones.
struct Item {
    int b, h, first;  // first query

    COGVIEW_HOST_DEVICE static int place(int round, int block, int blocks) {
        return round * blocks + (block + round * 37) % blocks;
    }
    COGVIEW_HOST_DEVICE Item(int place, int tiles, int H, int queries) {
        first = (tiles - 1 - place % tiles) * queries;
        b = place / tiles / H;
        h = place / tiles % H;
    }
};

COGVIEW_HOST_DEVICE int window_block_of(int query, int block_size, int window_blocks) {
    const int block = query / block_size - window_blocks + 1;
    return block > 0 ? block : 0;
}

// The keys of the queries from `first` to `last`: `far_stop` pivots of the list, all of which see the first
// `far_full`; then positions from `window` to `last`, all of which see those from `window_full` to `first`.
struct Span {
    int first, last, far_full, far_stop, window, window_full;

    COGVIEW_HOST_DEVICE Span(const int32_t* counts, int first, int last, int block_size, int window_blocks)
        : first(first), last(last) {
        const int low = window_block_of(first, block_size, window_blocks);
        const int high = window_block_of(last, block_size, window_blocks);
        far_full = counts == nullptr ? 0 : counts[low];
        far_stop = counts == nullptr ? 0 : counts[high];
        window = low * block_size;
        window_full = high * block_size;
    }
};

// The row of tiles of a block's queries: those of pivots, then those of the window.
template <int KEYS>
struct Tiles {
    int far, count, window;

    COGVIEW_HOST_DEVICE explicit Tiles(const Span& span)
        : far((span.far_stop + KEYS - 1) / KEYS),
          count(far + (span.last + 1 - span.window + KEYS - 1) / KEYS),
          window(span.window) {}
    COGVIEW_HOST_DEVICE bool is_far(int tile) const { return tile < far; }
    // The first key: a place in the list of pivots, or a position.
    COGVIEW_HOST_DEVICE int start(int tile) const {
        return tile < far ? tile * KEYS : window + (tile - far) * KEYS;
    }
};

// Which of those tiles some queries of the block see, at all and in full, by number.
template <int KEYS>
struct Seen {
    int far, far_full, window, window_full, window_full_stop, stop;

    COGVIEW_HOST_DEVICE Seen(const Tiles<KEYS>& tiles, const Span& span)
        : far((span.far_stop + KEYS - 1) / KEYS),
          far_full(span.far_full / KEYS),
          window(tiles.far + (span.window - tiles.window) / KEYS),
          window_full(tiles.far + (span.window_full - tiles.window + KEYS - 1) / KEYS),
          window_full_stop(tiles.far + (span.first + 1 - tiles.window) / KEYS),
          stop(tiles.far + (span.last - tiles.window) / KEYS + 1) {}
    COGVIEW_HOST_DEVICE bool any(int tile) const { return (tile < far) | ((tile >= window) & (tile < stop)); }
    COGVIEW_HOST_DEVICE bool all(int tile) const {
        return (tile < far_full) | ((tile >= window_full) & (tile < window_full_stop));
    }
};

// The keys that a query sees among those of one kind: from low up to high.
struct Visible {
    int low, high;

    COGVIEW_HOST_DEVICE Visible(const int32_t* counts, bool far, int query, int block_size,
                                int window_blocks) {
        const int block = window_block_of(query, block_size, window_blocks);
        low = far ? 0 : block * block_size;
        high = far ? counts[block] : query + 1;
    }
};

// ---- running softmax of a row

// How far a score may pass the maximum that sums refer to, in log2: 2^8 is no danger to float16.
constexpr float kSlack = 8.f;

struct RunningRow {
    float max = kLowest, rest = 0.f, total = 0.f;  // total: of the keys this thread has

    // Past this peak a multiply-add of the score and the rounded peak would be off by too much.
    static constexpr float kLarge = 1024.f;

    // The row has got a tile whose largest product is `top`. Returns what its sums shrink by. Probabilities
    // are then 2^(s factor + shift), with s - top in the place of s where `large`.
    template <typename Exp2>
    COGVIEW_HOST_DEVICE float advance(float top, float factor, float bias, bool large, float slack,
                                      float& shift, Exp2 exp2_of) {
        const float peak = fmaf(top, factor, bias);
        const bool grows = peak > max + slack;
        const float new_max = grows ? peak : max;
        shift = large ? peak - new_max : bias - new_max;
        if (grows) rest = large ? fmaf(top, factor, -peak) + bias : 0.f;
        const float shrink = exp2_of(max - new_max);
        max = new_max;
        total *= shrink;
        return shrink;
    }
    COGVIEW_HOST_DEVICE bool is_large(float top, float factor, float bias) const {
        return fabsf(fmaxf(max, fmaf(top, factor, bias))) > kLarge;
    }
};

#if defined(__CUDACC__) || defined(COGVIEW_EMULATED)

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&x);
}

// A producer warp owns a stage of the ring. OVERLAP: the scores of the next tile are under way during the
// softmax of this one. TURNS: warpgroups issue products in turn. LAZY: sums are rescaled only where the
// maximum grows by more than kSlack. Registers are what setmaxnreg gives to consumers and producers.
template <typename T_, int WARPGROUPS_, int KEYS_, int STAGES_, bool OVERLAP_, bool TURNS_, bool LAZY_,
          int BLOCKS_, int CONSUMER_REGISTERS_, int PRODUCER_REGISTERS_>
struct Sm90Shape {
    using T = T_;
    static constexpr int kWarpgroups = WARPGROUPS_, kKeys = KEYS_, kStages = STAGES_;
    static constexpr bool kOverlap = OVERLAP_, kTurns = TURNS_, kLazy = LAZY_;
    static constexpr int kBlocks = BLOCKS_;  // of a multiprocessor
    static constexpr int kConsumerRegisters = CONSUMER_REGISTERS_, kProducerRegisters = PRODUCER_REGISTERS_;
    static constexpr int kQueries = 64 * kWarpgroups;
    static constexpr int kThreads = 128 * (kWarpgroups + 1);  // setmaxnreg takes whole warpgroups
    static constexpr int kQueryBuffers = kBlocks == 1 ? 2 : 1;
    static constexpr int kScores = kKeys / 2;  // registers
    // Bytes of shared memory.
    static constexpr int kQueryTile = kQueries * kSwizzledRow, kKeyTile = kKeys * kSwizzledRow;
    static constexpr int kKeysAt = kQueryBuffers * kQueryTile;
    static constexpr int kValuesAt = kKeysAt + kStages * kKeyTile;
    static constexpr int kBarriersAt = kValuesAt + kStages * kKeyTile;
    static constexpr int kBarriers = 2 * kQueryBuffers + 2 * kStages;
    static constexpr int kShared = kBarriersAt + 8 * kBarriers + kSwizzleAtom;  // the last to align
    static_assert(kStages <= 4 && kKeys % 32 == 0, "");
};

// Addresses of the barriers.
template <typename Shape>
struct Barriers {
    uint32_t at;

    __device__ uint32_t full_q(int i) const { return at + 8 * i; }
    __device__ uint32_t empty_q(int i) const { return at + 8 * (Shape::kQueryBuffers + i); }
    __device__ uint32_t full(int stage) const { return at + 8 * (2 * Shape::kQueryBuffers + stage); }
    __device__ uint32_t empty(int stage) const { return full(Shape::kStages + stage); }

    __device__ void init() const {
        for (int i = 0; i < Shape::kQueryBuffers; ++i) {
            barrier_init(full_q(i), Shape::kStages);
            barrier_init(empty_q(i), 4 * Shape::kWarpgroups);
        }
        for (int i = 0; i < Shape::kStages; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), 4 * Shape::kWarpgroups);
        }
        barriers_initialized();
    }
};

// A place in a ring, and how often it has come round, as parity.
template <int SIZE>
struct Ring {
    int place = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
        if (++place == SIZE) place = 0, parity ^= 1;
    }
};

// The warp of stage `stage`: of every kStages tiles in a row it gathers one, and tells when it has arrived.
// All of them share the queries.
template <typename Shape>
__device__ __forceinline__ void produce(const Sm90Forward& a, uint32_t shared, int stage, int lane) {
    constexpr int kKeys = Shape::kKeys;
    const Barriers<Shape> barriers{shared + Shape::kBarriersAt};
    const int tiles_of_head = (a.T + Shape::kQueries - 1) / Shape::kQueries;
    const int items = tiles_of_head * a.B * a.H;
    // A lane copies chunk lane % 8 of every fourth row.
    const int chunk = lane % 8, row = lane / 8;
    const uint32_t keys_at = shared + Shape::kKeysAt + stage * Shape::kKeyTile;
    const uint32_t even = keys_at + swizzled(row, chunk), odd = keys_at + swizzled(row + 4, chunk);
    int skip = stage;  // tiles until the next one of this warp
    uint32_t parity = 1;
    Ring<Shape::kQueryBuffers> q_ring;

    for (int round = 0; round * int(gridDim.x) < items; ++round) {
        const int place = Item::place(round, blockIdx.x, gridDim.x);
        if (place >= items) continue;
        const Item item(place, tiles_of_head, a.H, Shape::kQueries);
        const int32_t* sorted = a.residuals + item.b * a.index_stride;
        const Span span(a.has_far ? sorted + a.PP + a.T : nullptr, item.first,
                        min(item.first + Shape::kQueries, a.T) - 1, a.block_size, a.window_blocks);
        const Tiles<kKeys> tiles(span);
        // Strides in bytes, of 2 an element.
        const char* k = static_cast<const char*>(a.k) +
                        2 * (item.b * a.k_stride[0] + item.h / a.G * a.k_stride[1] + chunk * 8);
        const char* v = static_cast<const char*>(a.v) +
                        2 * (item.b * a.v_stride[0] + item.h / a.G * a.v_stride[1] + chunk * 8);
        const uint32_t k_stride = 2 * a.k_stride[2], v_stride = 2 * a.v_stride[2];

        barrier_wait(barriers.empty_q(q_ring.place), q_ring.parity ^ 1);
        {
            const char* q = static_cast<const char*>(a.q) +
                            2 * (item.b * a.q_stride[0] + item.h * a.q_stride[1] + chunk * 8);
            const uint32_t q_at = shared + q_ring.place * Shape::kQueryTile;
            int i = stage * 4 + row;
            keep_here(i);
#pragma unroll 1
            for (; i < Shape::kQueries; i += 4 * Shape::kStages) {
                const int query = item.first + i;
                copy_chunk(q_at + swizzled(i, chunk), q + 2 * a.q_stride[2] * query, query < a.T);
            }
        }
        uint32_t q_pending = barriers.full_q(q_ring.place);
        auto arrived = [&] {
            copies_commit();
            copies_wait<0>();
            fence_for_products();
            __syncwarp();
            if (q_pending != 0 && lane == 0) barrier_arrive(q_pending);
            q_pending = 0;
        };
        q_ring.next();

        int tile = skip;
        for (; tile < tiles.count; tile += Shape::kStages) {
            const bool far = tiles.is_far(tile);
            const int first = tiles.start(tile) + lane;
            int positions[kKeys / 32];  // of row 32 j + lane
#pragma unroll
            for (int j = 0; j < kKeys / 32; ++j) {
                const int index = first + 32 * j;
                positions[j] = far ? (index < a.PP ? __ldg(sorted + index) : a.T) : index;
            }
            barrier_wait(barriers.empty(stage), parity);
            parity ^= 1;
#pragma unroll
            for (int i = 0; i < kKeys / 4; ++i) {
                const uint32_t position = __shfl_sync(0xffffffffu, positions[i / 8], i % 8 * 4 + row);
                const uint32_t to = i % 2 ? odd + (i - 1) * 4 * kSwizzledRow : even + i * 4 * kSwizzledRow;
                const bool valid = position < uint32_t(a.T);
                copy_chunk(to, row_address(k, position, k_stride), valid);
                copy_chunk(to + Shape::kValuesAt - Shape::kKeysAt, row_address(v, position, v_stride), valid);
            }
            arrived();
            if (lane == 0) barrier_arrive(barriers.full(stage));
        }
        if (q_pending != 0) arrived();
        skip = tile - tiles.count;
    }
}

// The scores of keys that a query does not see become -inf.
template <int R>
__device__ __forceinline__ void mask(float (&s)[R], const Sm90Forward& a, const int32_t* counts, bool far,
                                     int start, int row, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int query = min(row + 8 * half, a.T - 1);
        keep_here(query);
        const Visible visible(counts, far, query, a.block_size, a.window_blocks);
        const int offset = start + lane % 4 * 2 - visible.low;
        const uint32_t length = visible.high - visible.low;
#pragma unroll
        for (int i = 0; i < R; ++i)
            if ((i & 2) == 2 * half)
                s[i] = uint32_t(offset + accumulator_column(0, i)) < length ? s[i] : -INFINITY;
    }
}

// Scores become probabilities. Returns whether the sums of some row of the warp shrink, by `shrink`.
template <bool LAZY, int R>
__device__ __forceinline__ bool softmax(float (&s)[R], RunningRow (&rows)[2], float (&shrink)[2],
                                        float factor, float bias) {
    float top[2] = {kLowest, kLowest}, shift[2];
    {
        float other[2] = {kLowest, kLowest};
#pragma unroll
        for (int i = 0; i < R; i += 4) {
            top[0] = fmaxf(top[0], s[i]), other[0] = fmaxf(other[0], s[i + 1]);
            top[1] = fmaxf(top[1], s[i + 2]), other[1] = fmaxf(other[1], s[i + 3]);
        }
        top[0] = fmaxf(top[0], other[0]), top[1] = fmaxf(top[1], other[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 1));
        top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 2));
    }
    const bool large = __any_sync(
        0xffffffffu, rows[0].is_large(top[0], factor, bias) || rows[1].is_large(top[1], factor, bias));
    if (large) {
#pragma unroll
        for (int i = 0; i < R; ++i) s[i] -= top[i >> 1 & 1];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
        shrink[half] = rows[half].advance(top[half], factor, bias, large, LAZY ? kSlack : 0.f, shift[half],
                                          exp2_approximate);
    float sum[4] = {};
#pragma unroll
    for (int i = 0; i < R; ++i) {
        s[i] = exp2_approximate(fmaf(s[i], factor, shift[i >> 1 & 1]));
        sum[i & 3] += s[i];
    }
    rows[0].total += sum[0] + sum[1];
    rows[1].total += sum[2] + sum[3];
    return !LAZY || __any_sync(0xffffffffu, shrink[0] != 1.f || shrink[1] != 1.f);
}

// Writes out of a warp's 16 rows: lanes exchange halves, so that four of them fill a sector of 32 bytes.
template <typename T>
__device__ __forceinline__ void store_out(const float (&out)[32], const float (&scale)[2], T* to,
                                          int64_t stride, int query, int queries, int lane) {
    const int odd = lane & 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        T* row = to + stride * (query + 8 * half) + odd * 8 + (lane >> 1 & 1) * 4;
#pragma unroll
        for (int group = 0; group < 8; group += 2) {
            const int i = 4 * group + 2 * half;
            const uint32_t x = pack(out[i] * scale[half], out[i + 1] * scale[half], T{});
            const uint32_t y = pack(out[i + 4] * scale[half], out[i + 5] * scale[half], T{});
            const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? x : y, 1);
            const uint2 both = odd ? make_uint2(other, y) : make_uint2(x, other);
            if (query + 8 * half < queries) *reinterpret_cast<uint2*>(row + group * 8) = both;
        }
    }
}

template <typename Shape>
__device__ __forceinline__ void consume(const Sm90Forward& a, uint32_t shared, int thread) {
    using T = typename Shape::T;
    constexpr int kKeys = Shape::kKeys, kScores = Shape::kScores, kSteps = kKeys / 16;
    const Barriers<Shape> barriers{shared + Shape::kBarriersAt};
    const int warpgroup = __shfl_sync(0xffffffffu, thread / 128, 0), lane = thread % 32;
    const int tiles_of_head = (a.T + Shape::kQueries - 1) / Shape::kQueries;
    const int items = tiles_of_head * a.B * a.H;
    // Barriers 1, 2, ...: whose turn it is to issue products.
    constexpr int kPair = 256;
    const int next_group = warpgroup + 1 == Shape::kWarpgroups ? 0 : warpgroup + 1;
    if (Shape::kTurns && warpgroup == Shape::kWarpgroups - 1) named_barrier_arrive(1, kPair);
    auto my_turn = [&] {
        if (Shape::kTurns) named_barrier_sync(1 + warpgroup, kPair);
    };
    auto pass_turn = [&] {
        if (Shape::kTurns) named_barrier_arrive(1 + next_group, kPair);
    };
    auto release = [&](uint32_t barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    };

    Ring<Shape::kStages> ring;
    Ring<Shape::kQueryBuffers> q_ring;
    for (int round = 0; round * int(gridDim.x) < items; ++round) {
        const int place = Item::place(round, blockIdx.x, gridDim.x);
        if (place >= items) continue;
        const Item item(place, tiles_of_head, a.H, Shape::kQueries);
        const int32_t* counts = a.has_far ? a.residuals + item.b * a.index_stride + a.PP + a.T : nullptr;
        const int last = min(item.first + Shape::kQueries, a.T) - 1;
        const Tiles<kKeys> tiles(Span(counts, item.first, last, a.block_size, a.window_blocks));
        const int first = min(item.first + 64 * warpgroup, a.T - 1);  // of the warpgroup
        const Seen<kKeys> seen(tiles,
                               Span(counts, first, min(first + 63, a.T - 1), a.block_size, a.window_blocks));
        const int row = item.first + accumulator_row(thread, 0);

        RunningRow rows[2];
        float s[kScores], out[32], shrink[2];
        uint32_t p[kScores / 2];
        bool grows = true;
#pragma unroll
        for (int i = 0; i < 32; ++i) out[i] = 0.f;
        const uint64_t q =
            swizzled_descriptor(shared + q_ring.place * Shape::kQueryTile + warpgroup * 64 * kSwizzledRow);

        auto issue_scores = [&](int stage) {
            const uint64_t k = swizzled_descriptor(shared + Shape::kKeysAt + stage * Shape::kKeyTile);
            pin(s);
            products_begin();
#pragma unroll
            for (int i = 0; i < 4; ++i)
                Products<T, kKeys>::scores(s, q + i * kAlongRow, k + i * kAlongRow, i > 0);
            products_commit();
        };
        auto issue_output = [&](int stage) {
            const uint64_t v = swizzled_descriptor(shared + Shape::kValuesAt + stage * Shape::kKeyTile);
            pin(out);
            pin(p);
            products_begin();
#pragma unroll
            for (int i = 0; i < kSteps; ++i) Products<T, 64>::output(out, p + 4 * i, v + i * kAcrossRows);
            products_commit();
        };
        auto to_probabilities = [&](int tile) {
            const bool far = tiles.is_far(tile);
            if (!seen.all(tile)) mask(s, a, counts, far, tiles.start(tile), row, lane);
            grows = softmax<Shape::kLazy>(s, rows, shrink, a.factor, far ? a.bias : 0.f);
        };
        auto round_probabilities = [&] {
#pragma unroll
            for (int i = 0; i < kScores / 2; ++i) p[i] = pack(s[2 * i], s[2 * i + 1], T{});
        };
        auto rescale = [&] {
            if (!grows) return;
#pragma unroll
            for (int i = 0; i < 32; ++i) out[i] *= shrink[i >> 1 & 1];
        };

        barrier_wait(barriers.full_q(q_ring.place), q_ring.parity);
        if constexpr (Shape::kOverlap) {
            // Tiles past the last query of this warpgroup are left out; others without a visible key do no
            // harm.
            int before = ring.place;
            barrier_wait(barriers.full(ring.place), ring.parity);
            my_turn();
            issue_scores(ring.place);
            pass_turn();
            products_wait<0>();
            pin(s);
            to_probabilities(0);
            round_probabilities();
            ring.next();
#pragma unroll 1
            for (int tile = 1; tile < seen.stop; ++tile) {
                barrier_wait(barriers.full(ring.place), ring.parity);
                my_turn();
                issue_scores(ring.place);
                issue_output(before);
                pass_turn();
                products_wait<1>();
                pin(s);
                to_probabilities(tile);
                products_wait<0>();
                pin(out);
                pin(p);
                release(barriers.empty(before));
                rescale();
                round_probabilities();
                before = ring.place;
                ring.next();
            }
            issue_output(before);
            products_wait<0>();
            pin(out);
            release(barriers.empty(before));
            for (int tile = seen.stop; tile < tiles.count; ++tile, ring.next()) {
                my_turn();
                pass_turn();
                barrier_wait(barriers.full(ring.place), ring.parity);
                release(barriers.empty(ring.place));
            }
        } else {
#pragma unroll 1
            for (int tile = 0; tile < tiles.count; ++tile, ring.next()) {
                barrier_wait(barriers.full(ring.place), ring.parity);
                my_turn();
                if (seen.any(tile)) {
                    issue_scores(ring.place);
                    products_wait<0>();
                    pin(s);
                    pass_turn();
                    to_probabilities(tile);
                    rescale();
                    round_probabilities();
                    issue_output(ring.place);
                    products_wait<0>();
                    pin(out);
                } else {
                    pass_turn();
                }
                release(barriers.empty(ring.place));
            }
        }
        release(barriers.empty_q(q_ring.place));
        q_ring.next();

        float scale[2];
        const int64_t bh = int64_t(item.b) * a.H + item.h;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = rows[half].total;
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            scale[half] = 1.f / total;
            const float rest = rows[half].rest + log2f(total);
            const int query = row + 8 * half;
            if (lane % 4 == 0 && query < a.T) {
                a.lse[bh * a.T + query] = (rows[half].max + rest) * 0.6931471805599453f;
                int32_t* peaks = a.residuals + a.peaks_at + bh * 2 * a.T + query;
                peaks[0] = __float_as_int(rows[half].max);
                peaks[a.T] = __float_as_int(rest);
            }
        }
        store_out(out, scale, static_cast<T*>(a.out) + item.b * a.out_stride[0] + item.h * a.out_stride[1],
                  a.out_stride[2], row, a.T, lane);
    }
}

template <typename Shape>
__device__ __forceinline__ void three_region_attention_fwd_sm90(const Sm90Forward& a) {
    extern __shared__ char raw[];
    const uint32_t shared = (shared_address(raw) + kSwizzleAtom - 1) / kSwizzleAtom * kSwizzleAtom;
    if (threadIdx.x == 0) Barriers<Shape>{shared + Shape::kBarriersAt}.init();
    __syncthreads();
    if (threadIdx.x >= 128 * Shape::kWarpgroups) {
        if constexpr (Shape::kProducerRegisters > 0) give_registers_back<Shape::kProducerRegisters>();
        const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 - 4 * Shape::kWarpgroups, 0);
        if (warp < Shape::kStages) produce<Shape>(a, shared, warp, threadIdx.x % 32);
    } else {
        if constexpr (Shape::kConsumerRegisters > 0) take_registers<Shape::kConsumerRegisters>();
        consume<Shape>(a, shared, threadIdx.x);
    }
}

#endif  // __CUDACC__

}  // namespace cogview
