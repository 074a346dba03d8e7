// SPDX-License-Identifier: Apache-2.0
// Vectors lie across tokens, so that sums over ids need no shuffles. Bytes: the logits are read once to be
// reduced, read and written once for their gradient. FLOPs: about 25 an element each time, most of them in
// exp2.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kFactor = float(kLog2e), kFactorLow = float(kLog2e - kFactor);

// Ids whose logits, one vector of tokens wide, stay in L1 between maximum and sum.
constexpr int64_t kTile = 32;
// Partial results at most; what is summed together does not depend on the number of threads.
constexpr int64_t kParts = 64;
// Ids a chunk of the gradient.
constexpr int64_t kRows = 64;

// exp(x) for x <= 0.
VecF exp_negative(VecF x) {
    return exp2_product(x, kFactor, kFactorLow);
}

int64_t rounded_up(int64_t n) {
    return (n + kLanes - 1) / kLanes * kLanes;
}

// The first `count` lanes; the others are 0 and are left alone.
template <typename T>
VecF load_part(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
    T part[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return load(part);
}
template <typename T>
void store_part(T* p, VecF x, int64_t count) {
    if (count >= kLanes) return store(p, x);
    T part[kLanes];
    store(part, x);
    for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

// logit_max and total, [n] padded to vectors, of the ids [begin, end).
template <typename T>
void reduce_part(const Logits& logits, int64_t begin, int64_t end, float* logit_max, float* total) {
    const int64_t n = logits.n, stride = logits.stride;
    std::fill(logit_max, logit_max + rounded_up(n), -kInf);
    std::fill(total, total + rounded_up(n), 0.0f);
    for (int64_t start = begin; start < end; start += kTile) {
        const int64_t rows = std::min(kTile, end - start);
        const T* tile = static_cast<const T*>(logits.data) + start * stride;
        for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t count = n - j;
            const VecF before = load(logit_max + j);
            VecF max = before;
            for (int64_t r = 0; r < rows; ++r) max = maximum(load_part(tile + r * stride + j, count), max);
            VecF sum = load(total + j) * exp_negative(before - max);
            for (int64_t r = 0; r < rows; ++r)
                sum += exp_negative(load_part(tile + r * stride + j, count) - max);
            store(logit_max + j, max);
            store(total + j, sum);
        }
    }
}

template <typename T>
void reduce(const LinearCrossEntropyReduce& a, int threads) {
    const int64_t V = a.logits.v, n = a.logits.n;
    const int64_t rows = std::max((V + kParts - 1) / kParts, 4 * kTile);
    const int64_t parts = (V + rows - 1) / rows, width = rounded_up(n);
    const Scratch scratch(parts * 2 * width);
    const auto part_max = [&](int64_t part) { return scratch.data + part * 2 * width; };
    const auto part_total = [&](int64_t part) { return part_max(part) + width; };
    parallel_for(parts, 1, threads, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
            reduce_part<T>(a.logits, p * rows, std::min(V, (p + 1) * rows), part_max(p), part_total(p));
    });
    for (int64_t j = 0; j < n; j += kLanes) {
        VecF max = load(part_max(0) + j), sum = VecF{}, lost = VecF{};
        for (int64_t p = 1; p < parts; ++p) max = maximum(load(part_max(p) + j), max);
        for (int64_t p = 0; p < parts; ++p) {
            // Kahan's sum: the error of one running sum grows with its length.
            const VecF term = load(part_total(p) + j) * exp_negative(load(part_max(p) + j) - max) - lost;
            const VecF next = sum + term;
            lost = (next - sum) - term;
            sum = next;
        }
        store_part(a.logit_max + j, max, n - j);
        store_part(a.total + j, sum, n - j);
    }
}

template <typename T>
void gradient(const LinearCrossEntropyGradient& a, int threads) {
    const int64_t n = a.logits.n, stride = a.logits.stride, width = rounded_up(n);
    const Scratch factor(width);
    for (int64_t j = 0; j < n; ++j)
        factor.data[j] = a.coefficient[j] == 0.0f ? 0.0f : a.coefficient[j] / a.total[j];
    std::fill(factor.data + n, factor.data + width, 0.0f);
    parallel_for(a.logits.v, kRows, threads, [&](int64_t begin, int64_t end) {
        const Scratch at_target(n);
        T* logits = static_cast<T*>(a.logits.data);
        // The targets among these ids first: 1 must be taken off before their softmax is rounded.
        for (int64_t j = 0; j < n; ++j) {
            const int64_t row = a.target[j] - a.first;
            if (row < begin || row >= end || factor.data[j] == 0.0f) continue;
            const float x = to_float(logits[row * stride + j]) - a.logit_max[j];
            at_target.data[j] = factor.data[j] * exp_negative(broadcast(x))[0] - a.coefficient[j];
        }
        for (int64_t r = begin; r < end; ++r) {
            T* row = logits + r * stride;
            for (int64_t j = 0; j < n; j += kLanes) {
                const int64_t count = n - j;
                const VecF f = load(factor.data + j);
                const VecF p = exp_negative(load_part(row + j, count) - load_part(a.logit_max + j, count));
                // A product would not do: the logits of a token that does not count may be infinite.
                store_part(row + j, f == 0.0f ? VecF{} : f * p, count);
            }
        }
        for (int64_t j = 0; j < n; ++j) {
            const int64_t row = a.target[j] - a.first;
            if (row < begin || row >= end || factor.data[j] == 0.0f) continue;
            from_float(at_target.data[j], &logits[row * stride + j]);
        }
    });
}

}  // namespace

void linear_cross_entropy_reduce_cpu(const LinearCrossEntropyReduce& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.logits.dtype, reduce<scalar_t>(args, threads));
}

void linear_cross_entropy_gradient_cpu(const LinearCrossEntropyGradient& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.logits.dtype, gradient<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
