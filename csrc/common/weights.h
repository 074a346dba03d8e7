// SPDX-License-Identifier: Apache-2.0
// From scores to the weights of a softmax, on the CPU. Internal linkage: see common/vec.h.
#pragma once

#include "common/matmul.h"
#include "common/vec.h"

namespace cogview {
namespace {

constexpr double kLn2 = 0.6931471805599453;

// 2^x for x < 128, 0 from -127 down, NaN for NaN; to 2^-13 where the result is rounded to bfloat16, else to 1
// ulp. As exp2 of vec.h, less what attention does not need: -127 itself gives exactly 0, for its exponent
// field is 0. (Not by vscalefps: it takes 100 times as long where the result underflows, and every masked
// score does.)
template <bool kBf16>
inline VecF weight(VecF x) {
    x = maximum(broadcast(-127.0f), x);         // of a NaN maximum() gives its second operand
    const VecF magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const VecF shifted = x + magic;
    const VecF f = x - (shifted - magic);
    VecF p;
    if (kBf16) {
        p = broadcast(0.05500892922282219f);
        p = p * f + 0.2422109693288803f;
        p = p * f + 0.6932829022407532f;
    } else {
        p = broadcast(0.00015461444854736328f);
        p = p * f + 0.0013400427997112274f;
        p = p * f + 0.009618056938052177f;
        p = p * f + 0.05550327152013779f;
        p = p * f + 0.24022650718688965f;
        p = p * f + 0.6931471824645996f;
    }
    p = p * f + 1.0f;
    return bitcast<VecF>(bitcast<VecI>(p) + (bitcast<VecI>(shifted) << 23));
}

// Exponents in powers of 2, factor * score + shift, of a column of scores. In float they are carried to twice
// the precision where it matters: an error of the last bit of a logit of 16 is one of 16 ulps in its weight.
template <bool kBf16>
struct Exponent {
    VecF factor, factor_low, shift, shift_low;
    VecF operator()(VecF score) const {
        const VecF high = multiply_add<false>(score, factor, shift);
        if (kBf16) return high;
        // Where nothing is seen, -inf: its low part would be NaN.
        const VecF low = multiply_add<false>(score, factor_low, shift_low);
        return score == -kInf ? score : high + low;
    }
};

// Raises the maxima of the columns from c on to what a new score tile needs; gives whether it raised one, and
// by what is to be multiplied what was summed. The old ones do while no score passes them by more than 2^8:
// sums and products stay far below overflow, and the rare change rescales what is summed.
template <int kVectors>
bool raise_max(const float* scores, int64_t rows, int64_t columns, float factor, float bias, int64_t c,
               float* row_max, float* rescale) {
    VecF top[kVectors];
    for (int i = 0; i < kVectors; ++i) top[i] = broadcast(-kInf);
    for (int64_t r = 0; r < rows; ++r)
        for (int i = 0; i < kVectors; ++i)
            top[i] = maximum(load(scores + r * columns + c + i * kLanes), top[i]);
    VecI changed = VecI{};
    for (int i = 0; i < kVectors; ++i) {
        const int64_t at = c + i * kLanes;
        const VecF wanted = top[i] * factor + bias, old = load(row_max + at);
        const VecI raise = wanted > old + 8.0f;
        // From -inf (nothing seen yet) the factor is 0, and there is nothing to rescale.
        store(rescale + at, raise ? exp2(old - wanted) : broadcast(1.0f));
        store(row_max + at, raise ? wanted : old);
        changed |= raise;
    }
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= changed[i];
    return any != 0;
}

}  // namespace
}  // namespace cogview
