// SPDX-License-Identifier: Apache-2.0
// One row at a time. A row is widened once into a thread's float buffer (it stays in L1 or L2), where
// maximum, exponentials and sum are taken; it is rounded once, on its way out. Bytes: read and write N
// elements a row. FLOPs: about 20 an element, most of them in exp2.
#include <algorithm>

#include "common/parallel.h"
#include "common/vec.h"
#include "stable_softmax/stable_softmax.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

// A long row is summed in blocks, and the blocks with their rounding errors carried along (Kahan): the error
// of one running sum grows with its length.
constexpr int64_t kSumBlock = 16 * kLanes;
struct BlockSum {
    VecF total = VecF{}, lost = VecF{};
    void add(VecF block) {
        const VecF corrected = block - lost;
        const VecF next = total + corrected;
        lost = (next - total) - corrected;
        total = next;
    }
};

// About a quarter of a megabyte of elements a chunk, so that dealing chunks costs nothing.
int64_t rows_per_chunk(int64_t N) {
    return std::max<int64_t>(1, 65536 / std::max<int64_t>(N, 1));
}

// row[0, n) = scale * scores, or -inf where masked.
template <typename T>
void widen(const T* scores, const uint8_t* mask, int64_t mask_stride, int64_t n, float scale, float* row) {
    int64_t j = 0;
    if (mask == nullptr || mask_stride == 1) {
        for (; j + kLanes <= n; j += kLanes) {
            VecF x = load(scores + j) * scale;
            if (mask != nullptr) {
                VecU8 keep;
                std::memcpy(&keep, mask + j, sizeof(keep));
                x = __builtin_convertvector(keep, VecI) != 0 ? x : broadcast(-kInf);
            }
            store(row + j, x);
        }
    }
    for (; j < n; ++j) {
        const bool keep = mask == nullptr || mask[j * mask_stride] != 0;
        row[j] = keep ? to_float(scores[j]) * scale : -kInf;
    }
}

template <typename T>
void forward_row(const T* scores, const uint8_t* mask, int64_t mask_stride, int64_t visible, int64_t N,
                 float alpha, float scale, float* row, T* probs) {
    widen(scores, mask, mask_stride, visible, scale, row);
    // The tail of the last vector counts as masked.
    const int64_t padded = (visible + kLanes - 1) / kLanes * kLanes;
    std::fill(row + visible, row + padded, -kInf);

    VecF maxima = broadcast(-kInf);
    VecF nans = VecF{};
    for (int64_t j = 0; j < padded; j += kLanes) {
        const VecF x = load(row + j);
        maxima = maximum(x, maxima);
        nans += x != x ? x : VecF{};  // a comparison drops NaN, a sum keeps it
    }
    const float row_max = reduce_max(maxima) + reduce_sum(nans);
    if (row_max == -kInf) {
        for (int64_t j = 0; j < N; ++j) from_float(0.0f, &probs[j]);
        return;
    }
    const double exact = double(alpha) * kLog2e;
    const float factor = float(exact), factor_low = float(exact - factor);
    BlockSum sums;
    for (int64_t start = 0; start < padded; start += kSumBlock) {
        VecF block = VecF{};
        for (int64_t j = start; j < std::min(padded, start + kSumBlock); j += kLanes) {
            const VecF e = exp2_product(load(row + j) - row_max, factor, factor_low);
            block += e;
            store(row + j, e);
        }
        sums.add(block);
    }
    const float total = reduce_sum(sums.total);
    int64_t j = 0;
    for (; j + kLanes <= visible; j += kLanes) store(probs + j, load(row + j) / total);
    for (; j < visible; ++j) from_float(row[j] / total, &probs[j]);
    for (; j < N; ++j) from_float(0.0f, &probs[j]);
}

template <typename T>
void forward(const SoftmaxForward& a, int threads) {
    parallel_for(a.A * a.B * a.T, rows_per_chunk(a.N), threads, [&](int64_t begin, int64_t end) {
        const Scratch row((a.N + kLanes - 1) / kLanes * kLanes);
        for (int64_t r = begin; r < end; ++r) {
            const int64_t t = r % a.T, b = r / a.T % a.B, i = r / a.T / a.B;
            const T* scores = static_cast<const T*>(a.scores) + i * a.scores_stride[0] +
                              b * a.scores_stride[1] + t * a.scores_stride[2];
            const uint8_t* mask = a.mask == nullptr ? nullptr
                                                    : a.mask + i * a.mask_stride[0] + b * a.mask_stride[1] +
                                                          t * a.mask_stride[2];
            const int64_t visible = a.causal ? std::min(a.N, t + 1) : a.N;
            forward_row(scores, mask, a.mask_stride[3], visible, a.N, a.alpha, a.scale, row.data,
                        static_cast<T*>(a.probs) + r * a.N);
        }
    });
}

template <typename T>
void backward(const SoftmaxBackward& a, int threads) {
    parallel_for(a.rows, rows_per_chunk(a.N), threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T* dprobs = static_cast<const T*>(a.dprobs) + r * a.N;
            const T* probs = static_cast<const T*>(a.probs) + r * a.N;
            T* dscores = static_cast<T*>(a.dscores) + r * a.N;
            BlockSum dots;
            int64_t j = 0;
            while (j + kLanes <= a.N) {
                VecF block = VecF{};
                for (const int64_t stop = j + kSumBlock; j < stop && j + kLanes <= a.N; j += kLanes)
                    block += load(dprobs + j) * load(probs + j);
                dots.add(block);
            }
            float dot = reduce_sum(dots.total);
            for (; j < a.N; ++j) dot += to_float(dprobs[j]) * to_float(probs[j]);
            for (j = 0; j + kLanes <= a.N; j += kLanes)
                store(dscores + j, a.factor * load(probs + j) * (load(dprobs + j) - dot));
            for (; j < a.N; ++j)
                from_float(a.factor * to_float(probs[j]) * (to_float(dprobs[j]) - dot), &dscores[j]);
        }
    });
}

}  // namespace

void stable_softmax_fwd_cpu(const SoftmaxForward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, forward<scalar_t>(args, threads));
}

void stable_softmax_bwd_cpu(const SoftmaxBackward& args, int threads) {
    COGVIEW_DISPATCH_DTYPE(args.dtype, backward<scalar_t>(args, threads));
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
