// SPDX-License-Identifier: Apache-2.0
// Chunks of outputs are dealt to the threads. In a chunk several rows of W are multiplied at a time, so that
// a core has several streams of memory under way and no sum waits for the one before it. Many rows of x are
// lanes of panels instead: a sum for each row and output would be one over lanes, which takes as long as its
// products where K is small.
#include <algorithm>
#include <type_traits>

#include "common/panels.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/vec.h"
#include "decode_linear/decode_linear.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// Of W in a chunk: a thread that is woken for less costs more than it saves, one that is awake does not.
constexpr int64_t kChunkBytes = 256 << 10, kChunkBytesAwake = 32 << 10;
// Products that one running sum takes up, since its error grows with their number.
constexpr int64_t kRun = 64 * kLanes;
// Rows of W that are multiplied at a time, with one row of x, and with up to kTogether: the sums, a vector of
// each row of x and one of W fill the 16 registers of AVX2.
constexpr int kAlone = 8, kShared = 4, kTogether = kLanes == 16 ? 4 : 3;

// How far ahead of the products W is asked for: a core by itself foresees little of rows that are short.
constexpr int64_t kBytesAhead = 2048;

// Two vectors of consecutive elements, in an order that depends on T alone.
using Pair = EvenOdd;
template <typename T>
inline Pair load_pair(const T* p) {
    return {load(p), load(p + kLanes)};
}
inline Pair load_pair(const BFloat16* p) {
    return load_words(p);
}
template <typename T>
inline Pair load_pair(const T* p, Whole) {
    return load_pair(p);
}
template <typename T>
inline Pair load_pair(const T* p, Part part) {
    T padded[2 * kLanes] = {};
    std::memcpy(padded, p, part.n * sizeof(T));
    return load_pair(padded);
}

// step(k, tag) for the pairs of elements `start` to `stop` - 1.
template <typename Step>
inline void for_each_pair(int64_t start, int64_t stop, const Step& step) {
    int64_t k = start;
    for (; k + 2 * kLanes <= stop; k += 2 * kLanes) step(k, Whole{});
    if (k < stop) step(k, Part{int(stop - k)});
}

// Two vectors of bfloat16 as they lie, of which one instruction adds the products of pairs to floats.
struct Words {
    VecF bits;
};
inline Words load_bits(const BFloat16* p, Whole) {
    Words words;
    std::memcpy(&words, p, sizeof(words));
    return words;
}
inline Words load_bits(const BFloat16* p, Part part) {
    BFloat16 padded[2 * kLanes] = {};
    std::memcpy(padded, p, part.n * sizeof(BFloat16));
    return load_bits(padded, Whole{});
}

// A row of x is floats in the order of pairs, or words; weights are loaded to go with it.
inline Pair load_row(const float* x) {
    return {load(x), load(x + kLanes)};
}
inline Words load_row(const BFloat16* x) {
    return load_bits(x, Whole{});
}
template <typename T, typename Tag>
inline Pair load_weights(const T* w, Tag tag, const float*) {
    return load_pair(w, tag);
}
template <typename Tag>
inline Words load_weights(const BFloat16* w, Tag tag, const BFloat16*) {
    return load_bits(w, tag);
}

inline void add_products(const Pair& w, const Pair& x, VecF& sum) {
    sum += w.even * x.even;
    sum += w.odd * x.odd;
}
inline void add_products(const Words& w, const Words& x, VecF& sum) {
    sum = multiply_add<true>(w.bits, x.bits, sum);
}
inline void keep(Pair& w) {
    hide(w.even);
    hide(w.odd);
}
inline void keep(Words& w) {
    hide(w.bits);
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// sums[r * stride + o] = x_r w_o for `outputs` rows of W, kOutputs at a time; gives how many are left over.
// Rows of x have zeros up to `width`, which whole pairs fill. kAsk: W is asked for ahead, as by the first
// rows of x. kOneRun: K is no more than that.
template <int kOutputs, int kRows, bool kAsk, bool kOneRun, typename T, typename X>
inline int64_t dot_products(const T* w, int64_t w_stride, int64_t outputs, const X* x, int64_t width,
                            int64_t K, float* sums, int64_t stride) {
    constexpr int64_t kAhead = kBytesAhead / sizeof(T);
    const bool amd = is_amd();
    for (; outputs >= kOutputs; outputs -= kOutputs, w += kOutputs * w_stride, sums += kOutputs) {
        const T* row[kOutputs];
#pragma GCC unroll 8
        for (int o = 0; o < kOutputs; ++o) {
            row[o] = w + o * w_stride;
            hide(row[o]);
        }
        VecF total[kOutputs][kRows] = {};
        for (int64_t start = 0; kOneRun ? start == 0 : start < K; start += kRun) {
            VecF run[kOutputs][kRows] = {};
            for_each_pair(start, kOneRun || K < start + kRun ? K : start + kRun, [&](int64_t k, auto tag) {
                if constexpr (kAsk) {
                    // Behind the end of a row come the next kOutputs rows.
                    const int64_t ahead = k + kAhead < K ? k + kAhead : kOutputs * w_stride + k + kAhead - K;
#pragma GCC unroll 8
                    for (int o = 0; o < kOutputs; ++o)
                        for (int line = 0; line < int(2 * kLanes * sizeof(T)); line += 64)
                            prefetch(reinterpret_cast<const char*>(row[o] + ahead) + line, amd);
                }
                decltype(load_row(x)) of_x[kRows];
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) of_x[r] = load_row(x + r * width + k);
#pragma GCC unroll 8
                for (int o = 0; o < kOutputs; ++o) {
                    auto weights = load_weights(row[o] + k, tag, x);
                    if constexpr (kRows > 1) keep(weights);
#pragma GCC unroll 4
                    for (int r = 0; r < kRows; ++r) add_products(weights, of_x[r], run[o][r]);
                }
            });
#pragma GCC unroll 8
            for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 4
                for (int r = 0; r < kRows; ++r) total[o][r] = kOneRun ? run[o][r] : total[o][r] + run[o][r];
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            VecF of_row[kOutputs];
#pragma GCC unroll 8
            for (int o = 0; o < kOutputs; ++o) of_row[o] = total[o][r];
            reduce_sums<kOutputs>(of_row, sums + r * stride);
        }
    }
    return outputs;
}

// x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / 2 (1 + tanh(u)); exp of no more than
// 0.
inline VecF gelu(VecF x) {
    constexpr float kHigh = float(kLog2e), kLow = float(kLog2e - kHigh);
    const VecF twice = 1.5957691216057308f * (x + 0.044715f * x * x * x);
    const VecF e = exp2_product(-magnitude(twice), kHigh, kLow);
    return x * (twice < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

// y[row, o to o + count - 1] = activation(sums + bias).
template <typename T>
inline void finish(const DecodeLinear& a, const float* sums, int64_t row, int64_t o, int64_t count) {
    const T* bias = static_cast<const T*>(a.bias);
    T* y = static_cast<T*>(a.y) + row * a.O + o;
    for_each_vector(count, [&](int64_t j, auto tag) {
        VecF v = load(sums + j, tag);
        if (bias != nullptr) v += load(bias + o + j, tag);
        store(y + j, a.gelu ? gelu(v) : v, tag);
    });
}

// Rows of x as dot_products() wants them, `width` apart.
template <typename T>
inline void spread_rows(const T* x, int64_t N, int64_t K, int64_t width, float* to) {
    for (int64_t r = 0; r < N; ++r) {
        for_each_pair(0, K, [&](int64_t k, auto tag) {
            const Pair values = load_pair(x + r * K + k, tag);  // zeros behind a part
            store(to + r * width + k, values.even);
            store(to + r * width + k + kLanes, values.odd);
        });
    }
}
inline void spread_rows(const BFloat16* x, int64_t N, int64_t K, int64_t width, BFloat16* to) {
    for (int64_t r = 0; r < N; ++r) {
        std::memcpy(to + r * width, x + r * K, K * sizeof(BFloat16));
        std::memset(to + r * width + K, 0, (width - K) * sizeof(BFloat16));
    }
}

template <typename T, typename X>
void few_rows(const DecodeLinear& a, int threads) {
    const T *x = static_cast<const T*>(a.x), *weight = static_cast<const T*>(a.weight);
    const int64_t width = (a.K + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes;
    const Scratch memory(a.N * width);
    X* wide = reinterpret_cast<X*>(memory.data);
    spread_rows(x, a.N, a.K, width, wide);
    const int64_t bytes = in_parallel_region() ? kChunkBytesAwake : kChunkBytes;
    const int64_t chunk =
        std::max<int64_t>(kAlone, bytes / (int64_t(sizeof(T)) * (a.K + 1)) / kAlone * kAlone);
    parallel_for(a.O, chunk, threads, [&](int64_t begin, int64_t end) {
        const int64_t stride = end - begin;
        const Scratch sums(a.N * stride);
        const auto multiply = [&](int64_t r, auto rows, auto ask) {
            constexpr int kRows = decltype(rows)::value, kMost = kRows == 1 ? kAlone : kShared;
            constexpr bool kAsk = decltype(ask)::value;
            const auto some = [&](auto outputs, int64_t left) {
                constexpr int kOutputs = decltype(outputs)::value;
                const auto function = a.K <= kRun ? dot_products<kOutputs, kRows, kAsk, true, T, X>
                                                  : dot_products<kOutputs, kRows, kAsk, false, T, X>;
                const int64_t o = stride - left;
                return function(weight + (begin + o) * a.weight_stride, a.weight_stride, left,
                                wide + r * width, width, a.K, sums.data + r * stride + o, stride);
            };
            some(Constant<1>{}, some(Constant<kMost>{}, stride));
        };
        const auto multiply_up_to = [&](int64_t r, auto ask) {
            const int64_t rows = a.N - r;
            if (rows >= kTogether)
                multiply(r, Constant<kTogether>{}, ask);
            else if (rows == 3)
                multiply(r, Constant<3>{}, ask);
            else if (rows == 2)
                multiply(r, Constant<2>{}, ask);
            else
                multiply(r, Constant<1>{}, ask);
        };
        multiply_up_to(0, std::true_type{});
        for (int64_t r = kTogether; r < a.N; r += kTogether) multiply_up_to(r, std::false_type{});
        for (int64_t r = 0; r < a.N; ++r) finish<T>(a, sums.data + r * stride, r, begin, stride);
    });
}

// Rows of x from which on they are lanes, of floats and of pairs.
constexpr int64_t kManyFloats = 32, kManyPairs = 24;
// Outputs of a chunk.
constexpr int64_t kOutputs = 32;

// 16 units of inputs, from k on, of the rows [n, n + 16) of x to a panel, whose columns they are; zeros
// beyond both.
template <bool kBf16, typename T>
inline void pack_block(const DecodeLinear& a, int64_t n, int64_t k, float* panel) {
    using E = typename Compute<kBf16>::type;
    constexpr int64_t kWidth = 16 * Compute<kBf16>::kPack;
    const T* x = static_cast<const T*>(a.x);
    alignas(64) float stage[16 * 16];
    for (int64_t r = 0; r < 16; ++r)
        stage_row(n + r < a.N ? x + (n + r) * a.K + k : nullptr, std::min(kWidth, a.K - k), kWidth, false,
                  reinterpret_cast<E*>(stage) + kWidth * r);
    transpose_block(stage, 16, panel, kPanelColumns);
}

template <bool kBf16, typename T>
void many_rows(const DecodeLinear& a, int threads) {
    constexpr int64_t kPack = Compute<kBf16>::kPack;
    const int64_t units = (a.K + kPack - 1) / kPack, blocks = (units + 15) / 16;
    const int64_t panels = (a.N + kPanelColumns - 1) / kPanelColumns,
                  panel_size = blocks * 16 * kPanelColumns;
    const Workspace x(panels * panel_size);
    parallel_for(panels * blocks, 4, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            for (int64_t n = 0; n < kPanelColumns; n += 16)
                pack_block<kBf16, T>(a, i / blocks * kPanelColumns + n, i % blocks * 16 * kPack,
                                     x.data + i * 16 * kPanelColumns + n);
    });
    parallel_for(a.O, kOutputs, threads, [&](int64_t begin, int64_t end) {
        const int64_t outputs = end - begin;
        const T* weight = static_cast<const T*>(a.weight) + begin * a.weight_stride;
        const UnitRows<kBf16, T> w(weight, a.weight_stride, outputs, a.K);
        const Workspace sums(kOutputs * kPanelColumns);
        for (int64_t first = 0; first < a.N; first += kPanelColumns) {
            const int64_t rows = std::min(kPanelColumns, a.N - first);
            w.multiply(x.data + first / kPanelColumns * panel_size, round_up(rows, kLanes), sums.data,
                       kPanelColumns, false);
            for (int64_t o = 0; o < outputs; o += 16) {
                for (int64_t n = 0; n < rows; n += 16) {
                    alignas(64) float block[16 * 16];
                    transpose_block(sums.data + o * kPanelColumns + n, kPanelColumns, block, 16);
                    for (int64_t r = 0; r < std::min<int64_t>(16, rows - n); ++r)
                        finish<T>(a, block + 16 * r, first + n + r, begin + o,
                                  std::min<int64_t>(16, outputs - o));
                }
            }
        }
    });
}

template <typename T>
void forward(const DecodeLinear& a, int threads) {
    // Tiles would take whole blocks of the rows of W.
    constexpr bool kPairs = std::is_same<T, BFloat16>::value && kHasBf16 && !Product<kHasBf16>::kSteps;
    // Intel's processors multiply floats faster than pairs.
    const bool has_pairs = kPairs && is_amd();
    if (a.N >= (has_pairs ? kManyPairs : kManyFloats))
        many_rows<kPairs, T>(a, threads);
    else if (has_pairs)
        few_rows<T, std::conditional_t<kPairs, BFloat16, float>>(a, threads);
    else
        few_rows<T, float>(a, threads);
}

}  // namespace

void decode_linear_cpu(const DecodeLinear& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, forward<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
