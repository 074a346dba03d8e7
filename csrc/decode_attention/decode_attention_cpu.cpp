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
constexpr double kLog2e = 1.4426950408889634;

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

int64_t integer(const void* data, int bytes, int64_t at) {
    return bytes == 8   ? static_cast<const int64_t*>(data)[at]
           : bytes == 4 ? static_cast<const int32_t*>(data)[at]
                        : static_cast<const int16_t*>(data)[at];
}

inline VecF exp(VecF x) {
    constexpr float high = float(kLog2e);
    return exp2_product(x, high, float(kLog2e - high));
}

// A query's softmax over the keys met so far.
struct Softmax {
    float maximum, total;
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

// weights[kRows, kBlock] = q k^T. q has room for whole vectors, zero past D. Values are asked for meanwhile.
template <typename T, int kRows>
void take_scores(const Block<T>& block, const float* q, int D, int width, float* weights) {
    for (int first = 0; first < block.count; first += kLanes) {
        VecF products[kRows][kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) {
            const int at = std::min(first + j, block.count - 1);
            const T* key = block.k[at];
            prefetch_row(block.v[at], D);
            // Four products at a time, as the error of one running sum grows with its length.
            VecF sum[kRows] = {};
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
            for (int r = 0; r < kRows; ++r) products[r][j] = sum[r];
        }
        for (int r = 0; r < kRows; ++r) store(weights + r * kBlock + first, sums_of_lanes(products[r]));
    }
}

// weights from logits; the running maximum and total; out rescaled to the new maximum.
void softmax_step(float* weights, int count, Softmax& state, float* out, int width) {
    VecF maxima = broadcast(-kInf), nans = VecF{};
    for (int j = 0; j < count; j += kLanes) {
        const VecF x = load(weights + j);
        maxima = maximum(x, maxima);
        nans += x != x ? x : VecF{};  // a comparison drops NaN, a sum keeps it
    }
    const float top = reduce_max(maxima) + reduce_sum(nans);
    const float next = top > state.maximum ? top : state.maximum;
    if (next == -kInf && top == top) {  // nothing seen yet
        for (int j = 0; j < count; j += kLanes) store(weights + j, VecF{});
        return;
    }
    if (next > state.maximum) {
        const float rescale = exp(broadcast(state.maximum - next))[0];
        state.total *= rescale;
        for (int d = 0; d < width; d += kLanes) store(out + d, load(out + d) * rescale);
        state.maximum = next;
    }
    VecF sum = VecF{};
    for (int j = 0; j < count; j += kLanes) {
        const VecF p = exp(load(weights + j) - next);
        sum += p;
        store(weights + j, p);
    }
    state.total += reduce_sum(sum);
}

// out[:, d, d + kVectors * kLanes) += weights v, or the `tag` of the last vector.
template <typename T, int kRows, int kVectors, typename Tag>
void add_values(const Block<T>& block, const float* weights, float* out, int d, int width, Tag tag) {
    VecF sum[kRows][kVectors] = {};
    for (int j = 0; j < block.count; ++j) {
        const T* value = block.v[j] + d;
        VecF x[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) x[i] = load(value + i * kLanes, tag);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) sum[r][i] += x[i] * weights[r * kBlock + j];
    }
    // Added at the end: summing by blocks errs less than carrying out through every key.
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
            float* at = out + r * width + d + i * kLanes;
            store(at, load(at) + sum[r][i]);
        }
}

template <typename T, int kRows>
void take_values(const Block<T>& block, const float* weights, float* out, int D, int width) {
    int d = 0;
    for (; d + 4 * kLanes <= D; d += 4 * kLanes)
        add_values<T, kRows, 4>(block, weights, out, d, width, Whole{});
    for (; d + kLanes <= D; d += kLanes) add_values<T, kRows, 1>(block, weights, out, d, width, Whole{});
    if (d < D) add_values<T, kRows, 1>(block, weights, out, d, width, Part{D - d});
}

template <typename T>
T* row_of(void* data, const int64_t* stride, int b, int h, int t) {
    return static_cast<T*>(data) + b * stride[0] + h * stride[1] + t * stride[2];
}
template <typename T>
const T* row_of(const void* data, const int64_t* stride, int b, int h, int t) {
    return static_cast<const T*>(data) + b * stride[0] + h * stride[1] + t * stride[2];
}

template <typename T>
void write_row(const DecodeAttention& a, int b, int h, int t, const float* sums, float total) {
    T* out = row_of<T>(a.out, a.out_stride, b, h, t);
    // A query that saw no key gives zeros.
    const float factor = total == 0.0f ? 0.0f : 1.0f / total;
    for_each_vector(a.D, [&](int64_t d, auto tag) { store(out + d, load(sums + d) * factor, tag); });
}

// What an item leaves for the merge: a row per query of maximum, total and the sums of D values.
struct Parts {
    float* data;
    int splits, width;
    float* of(const DecodeAttention& a, int b, int h, int t, int split) const {
        return data + (((int64_t(b) * a.H + h) * a.Tq + t) * splits + split) * (kLanes + width);
    }
};

// kD: the head size, known when compiling, or 0.
template <typename T, int kRows, int kD>
void attend(const DecodeAttention& a, int b, int kv_head, int first_row, int split, const Parts& parts) {
    const int D = kD > 0 ? kD : a.D, width = parts.width;
    const int heads = a.H / a.Hkv, rows = std::min(kRows, heads * a.Tq - first_row);
    const int length = int(std::clamp<int64_t>(integer(a.lengths, a.length_bytes, b), 0, a.S));
    const auto window_start = [&](int i) { return a.w == 0 ? 0 : std::max(0, (i / a.w - a.W + 1) * a.w); };

    // Rows that do not exist are the last one again.
    int head[kRows], t[kRows], position[kRows], start[kRows];
    int earliest = length, last = -1;
    for (int r = 0; r < kRows; ++r) {
        const int row = first_row + std::min(r, rows - 1);
        head[r] = kv_head * heads + row / a.Tq;
        t[r] = row % a.Tq;
        position[r] = length - a.Tq + t[r];
        start[r] = window_start(std::max(0, position[r]));
        earliest = std::min(earliest, std::max(0, position[r]));
        last = std::max(last, position[r]);
    }
    // The keys: first the pivots, then all positions from the first query's window on.
    const int listed = a.w == 0 || last < 0 ? 0 : a.P;
    const int window = window_start(earliest), latest = window_start(std::max(0, last));
    const int begin = split * kChunk,
              stop = std::min(begin + kChunk, listed + std::max(0, last + 1 - window));

    alignas(64) float q[kRows * 256], out[kRows * 256] = {};
    Softmax state[kRows];
    for (int r = 0; r < kRows; ++r) {
        const T* row = row_of<T>(a.q, a.q_stride, b, head[r], t[r]);
        for_each_vector(D, [&](int64_t d, auto tag) { store(q + r * width + d, load(row + d, tag)); });
        state[r] = {-kInf, 0.0f};
    }
    const T* keys = row_of<T>(a.k, a.k_stride, b, kv_head, 0);
    const T* values = row_of<T>(a.v, a.v_stride, b, kv_head, 0);
    const auto fill = [&](int base, Block<T>& block) {
        block.count = 0;
        int item = base;
        const int end = std::min(base + kBlock, stop);
        for (; item < std::min(end, listed); ++item) {
            const int64_t at = integer(a.pivots, a.pivot_bytes, int64_t(b) * a.P + item);
            // Left out: padding, and what every query has in its window or ahead.
            if (at >= 0 && at < latest && at < length) block.at[block.count++] = int(at);
        }
        block.far = block.count;
        for (; item < end; ++item) block.at[block.count++] = window + item - listed;
        for (int j = 0; j < block.count; ++j) {
            block.k[j] = keys + block.at[j] * a.k_stride[2];
            block.v[j] = values + block.at[j] * a.v_stride[2];
        }
    };
    alignas(64) float weights[kRows * kBlock];
    Block<T> blocks[2];
    fill(begin, blocks[0]);
    for (int base = begin, turn = 0; base < stop; base += kBlock, turn ^= 1) {
        const Block<T>& block = blocks[turn];
        Block<T>& next = blocks[turn ^ 1];
        fill(base + kBlock, next);
        if (block.count == 0) continue;
        take_scores<T, kRows>(block, q, D, width, weights);
        for (int j = 0; j < next.count; ++j) prefetch_row(next.k[j], D);
        for (int r = 0; r < kRows; ++r) {
            float* logits = weights + r * kBlock;
            for (int j = 0; j < block.count; j += kLanes) store(logits + j, load(logits + j) * a.scale);
            for (int j = 0; j < block.far; ++j) logits[j] += a.bias;
            if (a.Tq > 1)  // else each key here is seen
                for (int j = 0; j < block.count; ++j) {
                    const bool near = block.at[j] >= start[r];
                    if (j < block.far ? near : !near || block.at[j] > position[r]) logits[j] = -kInf;
                }
            for (int j = block.count; j % kLanes != 0; ++j) logits[j] = -kInf;
            softmax_step(logits, block.count, state[r], out + r * width, width);
        }
        take_values<T, kRows>(block, weights, out, D, width);
    }
    for (int r = 0; r < rows; ++r) {
        if (parts.splits == 1) {
            write_row<T>(a, b, head[r], t[r], out + r * width, state[r].total);
            continue;
        }
        float* part = parts.of(a, b, head[r], t[r], split);
        part[0] = state[r].maximum;
        part[1] = state[r].total;
        std::memcpy(part + kLanes, out + r * width, width * sizeof(float));
    }
}

template <typename T>
void merge(const DecodeAttention& a, int b, int h, int t, const Parts& parts) {
    alignas(64) float sums[256] = {};
    float top = -kInf, total = 0.0f;
    for (int s = 0; s < parts.splits; ++s) top = std::max(top, parts.of(a, b, h, t, s)[0]);
    for (int s = 0; s < parts.splits; ++s) {
        const float* part = parts.of(a, b, h, t, s);
        if (part[1] == 0.0f) continue;  // saw nothing
        const float weight = exp(broadcast(part[0] - top))[0];
        total += part[1] * weight;
        for (int d = 0; d < parts.width; d += kLanes)
            store(sums + d, load(sums + d) + load(part + kLanes + d) * weight);
    }
    write_row<T>(a, b, h, t, sums, total);
}

template <typename T, int kRows, int kD>
void forward(const DecodeAttention& a, int threads) {
    const int64_t tiles = (int64_t(a.H / a.Hkv) * a.Tq + kRows - 1) / kRows;
    int64_t longest = 0;
    for (int b = 0; b < a.B; ++b) longest = std::max(longest, integer(a.lengths, a.length_bytes, b));
    longest = std::min<int64_t>(longest, a.S);
    if (a.w != 0) longest = a.P + std::min(longest, int64_t(a.w) * a.W + a.Tq);
    const int splits = int(std::max<int64_t>(1, (longest + kChunk - 1) / kChunk));
    const int width = (a.D + kLanes - 1) / kLanes * kLanes;
    const int64_t queries = int64_t(a.B) * a.H * a.Tq;
    const Workspace work(splits > 1 ? queries * splits * (kLanes + width) : 0);
    const Parts parts = {work.data, splits, width};
    parallel_for(a.B * a.Hkv * tiles * splits, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t tile = i / splits % tiles, pair = i / splits / tiles;
            attend<T, kRows, kD>(a, int(pair / a.Hkv), int(pair % a.Hkv), int(tile * kRows), int(i % splits),
                                 parts);
        }
    });
    if (splits == 1) return;
    parallel_for(queries, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            merge<T>(a, int(i / a.Tq / a.H), int(i / a.Tq % a.H), int(i % a.Tq), parts);
    });
}

template <typename T>
void pick(const DecodeAttention& a, int threads) {
    const bool alone = a.H == a.Hkv && a.Tq == 1;
    if (a.D == 64)
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
