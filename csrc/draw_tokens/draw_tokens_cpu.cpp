// SPDX-License-Identifier: Apache-2.0
// A row is widened to floats. Its top_k-th largest is found bit by bit, by counting what is no smaller; then
// rates and noise are made for some tokens at a time. The noise of a token is -log(1 - u) of a uniform u,
// which is at least u: so a logarithm is taken only of the few tokens whose rate / u exceeds the best so far.
#include <math.h>

#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "common/workspace.h"
#include "draw_tokens/draw_tokens.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr int64_t kBlock = 64;           // tokens whose noise is made at a time
constexpr int64_t kOfAThread = 1 << 15;  // logits for which a thread is woken

// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;
inline uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

inline bool is_any(VecI mask) {
    uint64_t part[sizeof(VecI) / 8], all = 0;
    std::memcpy(part, &mask, sizeof(mask));
    for (uint64_t bits : part) all |= bits;
    return all != 0;
}

// Integers in the order of the floats.
inline VecI in_order(VecF x) {
    const VecI bits = bitcast<VecI>(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

// The k-th largest of n floats, which are -inf up to a whole vector.
float kth_largest(const float* row, int64_t n, int64_t k) {
    const auto is_no_more = [&](int32_t key) {
        VecI count = VecI{};
        for (int64_t j = 0; j < n; j += kLanes) count -= VecI(in_order(load(row + j)) >= key);
        int64_t found = 0;
        for (int lane = 0; lane < kLanes; ++lane) found += count[lane];
        return found >= k;
    };
    int32_t key = is_no_more(0) ? 0 : std::numeric_limits<int32_t>::min();
    for (int bit = 30; bit >= 0; --bit)
        if (is_no_more(key | 1 << bit)) key |= 1 << bit;
    return bitcast<float>(key ^ (key >> 31 & 0x7fffffff));
}

// The noise of tokens [i, i + kBlock) is -log(1 - u).
inline void make_uniform(uint64_t state, int64_t i, float* u) {
    for (int64_t j = 0; j < kBlock; ++j) {
        const uint64_t bits = mixed(state + uint64_t(i + j + 1) * kGamma) >> 33;
        // At 1 the noise would be infinite, which no token could win against, not even the only one left.
        u[j] = std::min((float(int32_t(bits)) + 0.5f) * 0x1p-31f, 1 - 0x1p-24f);
    }
}

// `row` has -inf behind its V logits up to a whole block.
int64_t draw_row(const DrawTokens& a, const float* row, float largest, uint64_t state) {
    if (a.temperature == 0) {
        for (int64_t i = 0; i < a.V; ++i)
            if (row[i] == largest) return i;
        return 0;
    }
    const float least = a.top_k > 0 && a.top_k < a.V ? kth_largest(row, a.V, a.top_k) : -kInf;
    const double scale = kLog2e / double(a.temperature);
    const float high = float(scale), low = float(scale - high);
    // Of what the division and the logarithm round.
    constexpr float kSlack = 1 - 1e-6f;
    float best = 0;
    int64_t at = 0;
    for (int64_t i = 0; i < a.V; i += kBlock) {
        alignas(64) float u[kBlock], rate[kBlock];
        make_uniform(state, i, u);
        VecI may_win = VecI{};
        for (int64_t j = 0; j < kBlock; j += kLanes) {
            const VecF x = load(row + i + j);
            const VecF e = x >= least ? exp2_product(x - largest, high, low) : VecF{};
            store(rate + j, e);
            may_win |= VecI(e > load(u + j) * (best * kSlack));
        }
        if (!is_any(may_win)) continue;
        for (int64_t j = 0; j < kBlock; ++j) {
            if (!(rate[j] > u[j] * (best * kSlack))) continue;
            const float arrival = rate[j] / -::log1pf(-u[j]);
            if (arrival > best) best = arrival, at = i + j;
        }
    }
    return at;
}

template <typename T>
void draw(const DrawTokens& a, int threads) {
    const int64_t padded = (a.V + kBlock - 1) / kBlock * kBlock;
    const Workspace sums(a.N);
    parallel_for(a.N, std::max<int64_t>(1, kOfAThread / padded), threads, [&](int64_t begin, int64_t end) {
        const Workspace row(padded);
        for (int64_t n = begin; n < end; ++n) {
            const T* logits = static_cast<const T*>(a.logits) + n * a.V;
            VecF sum = VecF{}, largest = broadcast(-kInf);
            for_each_vector(a.V, [&](int64_t j, auto tag) {
                const VecF x = load(logits + j, tag);  // zeros behind a part
                sum += x;
                store(row.data + j, x, tag);
            });
            for (int64_t j = a.V; j < padded; ++j) row.data[j] = -kInf;
            for (int64_t j = 0; j < padded; j += kLanes) {
                const VecF x = load(row.data + j);
                largest = x > largest ? x : largest;
            }
            sums.data[n] = reduce_sum(sum);
            const uint64_t state =
                mixed(uint64_t(a.seeds[n / a.T]) + uint64_t(a.first + a.positions[n]) * kGamma);
            a.drawn[n] = draw_row(a, row.data, reduce_max(largest), state);
        }
    });
    if (a.total == nullptr) return;
    for (int64_t n = 0; n < a.N; ++n) *a.total += sums.data[n];
}

}  // namespace

void draw_tokens_cpu(const DrawTokens& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, draw<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
