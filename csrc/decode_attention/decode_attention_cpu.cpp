// SPDX-License-Identifier: Apache-2.0
// Decode attention: bound by memory. An item of work is up to kChunk keys of one sample and key head for up
// to kRows of the queries that share them (group heads times new positions). Its keys go in blocks: the
// scores of a block, one step of a running softmax, the values. The parts of a query are merged at the end,
// in their order. A sample's chunks are the same whatever else is in the batch, so the result depends neither
// on that nor on the threads.
//
// Bytes: k and v of the keys seen, once per kRows queries. FLOPs: 4 D a key and query.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "common/workspace.h"
#include "decode_attention/decode_attention.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int kChunk = 512, kBlock = 64;
// Queries of an item, where there are several: four vectors of output for each stay in registers.
constexpr int kSharing = kLanes == 8 ? 2 : 4;

// Lane j of the result: the sum over the lanes of v[j].
inline VecF sums_of_lanes(const VecF* v) {
#if defined(__AVX512F__)
    __m512 quads[4];  // lane 4 i + j of quads[n]: the sum over quad i of v[4 n + j]
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
        const __m512 a = bitcast<__m512>(v[4 * n]), b = bitcast<__m512>(v[4 * n + 1]);
        const __m512 c = bitcast<__m512>(v[4 * n + 2]), d = bitcast<__m512>(v[4 * n + 3]);
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        quads[n] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    const auto halves = [](__m512 x, __m512 y) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    };
    return bitcast<VecF>(halves(halves(quads[0], quads[1]), halves(quads[2], quads[3])));
#elif defined(__AVX2__)
    __m256 quads[2];
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
        const __m256 a = bitcast<__m256>(v[4 * n]), b = bitcast<__m256>(v[4 * n + 1]);
        const __m256 c = bitcast<__m256>(v[4 * n + 2]), d = bitcast<__m256>(v[4 * n + 3]);
        quads[n] = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    }
    return bitcast<VecF>(_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                                       _mm256_permute2f128_ps(quads[0], quads[1], 0x31)));
#else
    VecF sums = {};
    for (int j = 0; j < kLanes; ++j) sums[j] = reduce_sum(v[j]);
    return sums;
#endif
}

inline VecF exp(VecF x) {
    constexpr float high = float(kLog2e);
    return exp2_product(x, high, float(kLog2e - high));
}

// Whether scores are products of pairs of bfloat16, of which a vector has twice as many, not of floats.
template <typename T>
constexpr bool kPairs =
#if defined(__AVX512BF16__)
    std::is_same_v<T, BFloat16>;
#else
    false;
#endif

#if defined(__AVX512F__)
// What load_words() took apart, in order again.
inline void put_together(VecF& even, VecF& odd) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 a = bitcast<__m512>(even), b = bitcast<__m512>(odd);
    even = bitcast<VecF>(_mm512_permutex2var_ps(a, low, b));
    odd = bitcast<VecF>(_mm512_permutex2var_ps(a, high, b));
}
#endif

// A query's softmax over the keys met so far.
struct Softmax {
    float row_max, total;
};

// The keys of a block, those of the pivots first.
template <typename T>
struct Block {
    int count, far;  // far: how many of them are pivots
    int at[kBlock];
    const T *k[kBlock], *v[kBlock];
};

template <typename T>
inline void prefetch_row(const T* row, int D) {
    for (int d = 0; d < D; d += 64 / int(sizeof(T))) __builtin_prefetch(row + d);
}

// weights[kRows, kBlock] = q k^T; add_products(key, sum) adds a key's products with each query, in lanes, to
// sum[kRows]. Values are asked for meanwhile.
template <int kRows, typename T, typename AddProducts>
void score_keys(const Block<T>& block, int D, float* weights, const AddProducts& add_products) {
    for (int first = 0; first < block.count; first += kLanes) {
        VecF products[kRows][kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
            const int at = std::min(first + j, block.count - 1);
            prefetch_row(block.v[at], D);
            VecF sum[kRows] = {};
            add_products(block.k[at], sum);
            for (int r = 0; r < kRows; ++r) products[r][j] = sum[r];
        }
        for (int r = 0; r < kRows; ++r) store(weights + r * kBlock + first, sums_of_lanes(products[r]));
    }
}

// q has room for whole vectors, zero past D.
template <int kRows, typename T>
void take_scores(const Block<T>& block, const float* q, int D, int width, float* weights) {
    score_keys<kRows>(block, D, weights, [=](const T* key, VecF* sum) {
        // Four products at a time, as the error of one running sum grows with its length.
        int d = 0;
        for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
            VecF four[kRows] = {};
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const VecF x = load(key + d + i * kLanes);
                for (int r = 0; r < kRows; ++r) four[r] += x * load(q + r * width + d + i * kLanes);
            }
            for (int r = 0; r < kRows; ++r) sum[r] += four[r];
        }
        for (; d + kLanes <= D; d += kLanes) {
            const VecF x = load(key + d);
            for (int r = 0; r < kRows; ++r) sum[r] += x * load(q + r * width + d);
        }
        if (d < D) {
            const VecF x = load(key + d, Part{D - d});
            for (int r = 0; r < kRows; ++r) sum[r] += x * load(q + r * width + d);
        }
    });
}

#if defined(__AVX512BF16__)
// By pairs of bfloat16. A row of q is 256 long, and zero past D.
template <int kRows>
void take_scores(const Block<BFloat16>& block, const BFloat16* q, int D, int, float* weights) {
    score_keys<kRows>(block, D, weights, [=](const BFloat16* key, VecF* sum) {
        const auto add = [=](__m512i x, int d) {
            for (int r = 0; r < kRows; ++r) {
                const __m512i y = _mm512_loadu_si512(q + r * 256 + d);
                sum[r] = bitcast<VecF>(
                    _mm512_dpbf16_ps(bitcast<__m512>(sum[r]), bitcast<__m512bh>(x), bitcast<__m512bh>(y)));
            }
        };
        int d = 0;
        for (; d + 32 <= D; d += 32) add(_mm512_loadu_si512(key + d), d);
        if (d < D) add(_mm512_maskz_loadu_epi16((1u << (D - d)) - 1, key + d), d);
    });
}
#endif

// weights from logits; the running maximum and total; out rescaled to the new maximum.
void softmax_step(float* weights, int count, Softmax& state, float* out, int width) {
    VecF maxima = broadcast(-kInf), nans = VecF{};
    for (int j = 0; j < count; j += kLanes) {
        const VecF x = load(weights + j);
        maxima = maximum(x, maxima);
        nans += x != x ? x : VecF{};  // a comparison drops NaN, a sum keeps it
    }
    const float top = reduce_max(maxima) + reduce_sum(nans);
    const float next = top > state.row_max ? top : state.row_max;
    if (next == -kInf && top == top) {  // nothing seen yet
        for (int j = 0; j < count; j += kLanes) store(weights + j, VecF{});
        return;
    }
    if (next > state.row_max) {
        const float rescale = exp(broadcast(state.row_max - next))[0];
        state.total *= rescale;
        for (int d = 0; d < width; d += kLanes) store(out + d, load(out + d) * rescale);
        state.row_max = next;
    }
    VecF sum = VecF{};
    for (int j = 0; j < count; j += kLanes) {
        const VecF p = exp(load(weights + j) - next);
        sum += p;
        store(weights + j, p);
    }
    state.total += reduce_sum(sum);
}

// out[:, d, d + kVectors * kLanes) += weights v, or the `tag` of the last vector. The keys of `next`, if any,
// are asked for meanwhile.
template <typename T, int kRows, int kVectors, typename Tag>
void add_values(const Block<T>& block, const Block<T>* next, const float* weights, float* out, int d,
                int width, int D, Tag tag) {
    constexpr bool kApart = kLanes == 16 && std::is_same_v<T, BFloat16> && kVectors % 2 == 0;
    VecF sum[kRows][kVectors] = {};
    for (int j = 0; j < block.count; ++j) {
        const T* value = block.v[j] + d;
        if (next != nullptr && j < next->count) prefetch_row(next->k[j], D);
        VecF x[kVectors];
        if constexpr (kApart) {
#pragma GCC unroll 2
            for (int i = 0; i < kVectors; i += 2) {
                const EvenOdd words = load_words(value + i * kLanes);
                x[i] = words.even, x[i + 1] = words.odd;
            }
        } else {
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) x[i] = load(value + i * kLanes, tag);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) sum[r][i] += x[i] * weights[r * kBlock + j];
    }
    if constexpr (kApart)
        for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < kVectors; i += 2) put_together(sum[r][i], sum[r][i + 1]);
    // Added at the end: summing by blocks errs less than carrying out through every key.
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            float* at = out + r * width + d + i * kLanes;
            store(at, load(at) + sum[r][i]);
        }
}

template <typename T, int kRows>
void take_values(const Block<T>& block, const Block<T>& next, const float* weights, float* out, int D,
                 int width) {
    const Block<T>* ahead = &next;
    const auto add = [&](int d, auto vectors, auto tag) {
        add_values<T, kRows, vectors.value>(block, ahead, weights, out, d, width, D, tag);
        ahead = nullptr;
    };
    using Four = std::integral_constant<int, 4>;
    using One = std::integral_constant<int, 1>;
    int d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes) add(d, Four{}, Whole{});
    for (; d + kLanes <= D; d += kLanes) add(d, One{}, Whole{});
    if (d < D) add(d, One{}, Part{D - d});
}

template <typename T>
void write_row(const DecodeAttention& a, int b, int h, int t, const float* sums, float total) {
    T* out = a.out.row<T>(b, h, t);
    // A query that saw no key gives zeros.
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    for_each_vector(a.shape.D, [&](int64_t d, auto tag) { store(out + d, load(sums + d) * factor, tag); });
}

// What an item leaves for the merge: a row per query of maximum, total and the sums of D values.
struct Parts {
    float* data;
    int splits, width;
    float* of(const DecodeShape& shape, int b, int h, int t, int split) const {
        return data + (((int64_t(b) * shape.H + h) * shape.Tq + t) * splits + split) * (kLanes + width);
    }
};

// The queries of an item, and the keys that they may see: first the pivots, then all positions from the first
// query's window on.
template <int kRows>
struct Item {
    int b, kv_head, rows, length, origin;
    int head[kRows], t[kRows], position[kRows], window_start[kRows];
    int listed;        // how many pivots come first
    int window;        // the position that follows them
    int latest_start;  // of all queries' windows
    int keys;

    // Rows that do not exist are the last one again.
    Item(const DecodeAttention& a, int b, int kv_head, int first_row) : b(b), kv_head(kv_head) {
        const DecodeShape& shape = a.shape;
        const int group = shape.H / shape.Hkv;
        rows = std::min(kRows, group * shape.Tq - first_row);
        length = int(std::clamp<int64_t>(a.lengths[b], 0, shape.S));
        origin = a.layout.origin_of(b, shape.S);
        int earliest = length, last = -1;
        for (int r = 0; r < kRows; ++r) {
            const int row = first_row + std::min(r, rows - 1);
            head[r] = kv_head * group + row / shape.Tq;
            t[r] = row % shape.Tq;
            position[r] = length - shape.Tq + t[r];
            window_start[r] = a.layout.window_start(std::max(0, position[r]), origin);
            earliest = std::min(earliest, std::max(0, position[r]));
            last = std::max(last, position[r]);
        }
        listed = last < 0 ? 0 : a.layout.P;
        window = a.layout.window_start(earliest, origin);
        latest_start = a.layout.window_start(std::max(0, last), origin);
        keys = listed + std::max(0, last + 1 - window);
    }

    // The block of up to kBlock keys from the `from`th on, before the `stop`th.
    template <typename T>
    void fill(const DecodeAttention& a, int from, int stop, Block<T>& block) const {
        block.count = 0;
        const int end = std::min(from + kBlock, stop);
        int i = from;
        for (; i < std::min(end, listed); ++i) {
            const int64_t at = a.layout.pivots[int64_t(b) * a.layout.P + i];
            // Left out: padding, and what every query has in its window or ahead.
            if (at >= origin && at < latest_start && at < length) block.at[block.count++] = int(at);
        }
        block.far = block.count;
        for (; i < end; ++i) block.at[block.count++] = window + i - listed;
        for (int j = 0; j < block.count; ++j) {
            block.k[j] = a.k.row<T>(b, kv_head, block.at[j]);
            block.v[j] = a.v.row<T>(b, kv_head, block.at[j]);
        }
    }

    // Scores of row r become logits, -inf where the query does not see a key and past the keys of the block.
    template <typename T>
    void finish_logits(const DecodeAttention& a, const Block<T>& block, int r, float* logits) const {
        for (int j = 0; j < block.count; j += kLanes) store(logits + j, load(logits + j) * a.scale);
        for (int j = 0; j < block.far; ++j) logits[j] += a.layout.pivot_bias;
        if (a.shape.Tq > 1) {  // else each key here is seen
            for (int j = 0; j < block.count; ++j)
                if (!sees(j < block.far, block.at[j], window_start[r], position[r], true)) logits[j] = -kInf;
        }
        for (int j = block.count; j % kLanes != 0; ++j) logits[j] = -kInf;
    }
};

// kD: the head size, known when compiling, or 0.
template <typename T, int kRows, int kD>
void attend(const DecodeAttention& a, int b, int kv_head, int first_row, int split, const Parts& parts) {
    const int D = kD > 0 ? kD : a.shape.D, width = parts.width;
    const Item<kRows> item(a, b, kv_head, first_row);
    const int begin = split * kChunk, stop = std::min(begin + kChunk, item.keys);

    using Q = std::conditional_t<kPairs<T>, BFloat16, float>;
    alignas(64) Q q[kRows * 256] = {};
    alignas(64) float out[kRows * 256] = {};
    Softmax state[kRows];
    for (int r = 0; r < kRows; ++r) {
        const T* row = a.q.row<T>(b, item.head[r], item.t[r]);
        if constexpr (kPairs<T>)
            std::memcpy(q + r * 256, row, D * sizeof(T));
        else
            for_each_vector(D, [&](int64_t d, auto tag) { store(q + r * width + d, load(row + d, tag)); });
        state[r] = {-kInf, 0.0f};
    }
    alignas(64) float weights[kRows * kBlock];
    Block<T> blocks[2];
    item.fill(a, begin, stop, blocks[0]);
    for (int base = begin, turn = 0; base < stop; base += kBlock, turn ^= 1) {
        const Block<T>& block = blocks[turn];
        Block<T>& next = blocks[turn ^ 1];
        item.fill(a, base + kBlock, stop, next);
        if (block.count == 0) continue;
        take_scores<kRows>(block, q, D, width, weights);
        for (int r = 0; r < kRows; ++r) {
            item.finish_logits(a, block, r, weights + r * kBlock);
            softmax_step(weights + r * kBlock, block.count, state[r], out + r * width, width);
        }
        take_values<T, kRows>(block, next, weights, out, D, width);
    }
    for (int r = 0; r < item.rows; ++r) {
        if (parts.splits == 1) {
            write_row<T>(a, b, item.head[r], item.t[r], out + r * width, state[r].total);
            continue;
        }
        float* part = parts.of(a.shape, b, item.head[r], item.t[r], split);
        part[0] = state[r].row_max;
        part[1] = state[r].total;
        std::memcpy(part + kLanes, out + r * width, width * sizeof(float));
    }
}

template <typename T>
void merge(const DecodeAttention& a, int b, int h, int t, const Parts& parts) {
    alignas(64) float sums[256] = {};
    float row_max = -kInf, total = 0.0f;
    for (int s = 0; s < parts.splits; ++s) row_max = std::max(row_max, parts.of(a.shape, b, h, t, s)[0]);
    for (int s = 0; s < parts.splits; ++s) {
        const float* part = parts.of(a.shape, b, h, t, s);
        if (part[1] == 0.0f) continue;  // saw nothing
        const float weight = exp(broadcast(part[0] - row_max))[0];
        total += part[1] * weight;
        for (int d = 0; d < parts.width; d += kLanes)
            store(sums + d, load(sums + d) + load(part + kLanes + d) * weight);
    }
    write_row<T>(a, b, h, t, sums, total);
}

// The most keys, pivots included, that a query of the batch may look at.
int64_t most_keys(const DecodeAttention& a) {
    int64_t longest = 0;
    for (int b = 0; b < a.shape.B; ++b) longest = std::max(longest, a.lengths[b]);
    const int64_t window = int64_t(a.layout.block_size) * a.layout.window_blocks + a.shape.Tq;
    return a.layout.P + std::min(std::min(longest, window), int64_t(a.shape.S));
}

template <typename T, int kRows, int kD>
void forward(const DecodeAttention& a, int threads) {
    const auto [B, H, Hkv, Tq, S, D] = a.shape;
    const int64_t tiles = (int64_t(H / Hkv) * Tq + kRows - 1) / kRows;
    const int splits = int(std::max<int64_t>(1, (most_keys(a) + kChunk - 1) / kChunk));
    const int width = (D + kLanes - 1) / kLanes * kLanes;
    const int64_t queries = int64_t(B) * H * Tq;
    const Workspace work(splits > 1 ? queries * splits * (kLanes + width) : 0);
    const Parts parts = {work.data, splits, width};
    parallel_for(B * Hkv * tiles * splits, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t tile = i / splits % tiles, pair = i / splits / tiles;
            attend<T, kRows, kD>(a, int(pair / a.shape.Hkv), int(pair % a.shape.Hkv), int(tile * kRows),
                                 int(i % splits), parts);
        }
    });
    if (splits == 1) return;
    parallel_for(queries, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            merge<T>(a, int(i / a.shape.Tq / a.shape.H), int(i / a.shape.Tq % a.shape.H), int(i % a.shape.Tq),
                     parts);
    });
}

template <typename T>
void pick(const DecodeAttention& a, int threads) {
    const bool alone = a.shape.H == a.shape.Hkv && a.shape.Tq == 1;
    if (a.shape.D == 64)
        alone ? forward<T, 1, 64>(a, threads) : forward<T, kSharing, 64>(a, threads);
    else
        alone ? forward<T, 1, 0>(a, threads) : forward<T, kSharing, 0>(a, threads);
}

}  // namespace

void decode_attention_cpu(const DecodeAttention& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, pick<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
