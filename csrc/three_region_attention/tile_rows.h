// SPDX-License-Identifier: Apache-2.0
// Rows of tensors into the tiles that attention multiplies on the CPU, and back. Internal linkage: see
// common/vec.h.
#pragma once

#include "three_region_attention/plan.h"

namespace cogview {
namespace {

// The keys and values of a key head are packed tile by tile of their slots. Each tile, `kTile * Du` floats,
// is an A operand: rows [S, Du], or, to contract keys, of bfloat16 as pairs [S / 32, Dp, 16]. Floats are
// contracted from their rows.

// Packs the rows of tile `tile` of a head of x.
template <bool kBf16, typename T>
void pack_rows(const Plan<kBf16>& plan, const StridedInput& x, int64_t b, int64_t head, int64_t tile,
               float* to) {
    using E = typename Compute<kBf16>::type;
    E* stage = reinterpret_cast<E*>(to);
    const T* base = x.head<T>(b, head);
    for (int64_t r = 0; r < kTile; ++r) {
        const int64_t position = plan.slot_position(b, tile * kTile + r);
        stage_row(position < plan.T ? base + position * x.stride[2] : nullptr, plan.D, plan.Dp, false,
                  stage + r * plan.Dp);
    }
}

// The rows of a tile in the order for contraction; `work` holds a tile of floats.
inline void pack_contracted(const Plan<true>& plan, const float* rows, float* to, float* work) {
    pack_a_transposed(reinterpret_cast<const BFloat16*>(rows), plan.Dp, to, work);
}

// The slots of a run as A operands.
template <bool kBf16>
MatmulA rows_of(const Plan<kBf16>& plan, const float* rows, const Run& run) {
    return {rows + run.slot * plan.Du, plan.Du, plan.Du, 0};
}

inline MatmulA contracted_of(const Plan<true>& plan, const float* pairs, const Run& run) {
    constexpr int64_t kUnits = kTile / Compute<true>::kPack;
    return {pairs + run.slot * plan.Du, kUnits, kUnits, plan.Dp * kUnits};
}
inline TransposedA contracted_of(const Plan<false>& plan, const float* rows, const Run& run) {
    return {rows + run.slot * plan.Dp, plan.Dp, run.rows, 0};
}

template <bool kBf16, typename T>
void stage_queries(const Plan<kBf16>& plan, const StridedInput& x, int64_t b, int64_t h, const Sight& s,
                   bool negate, typename Compute<kBf16>::type* stage) {
    const T* base = x.head<T>(b, h);
    for (int64_t c = 0; c < s.columns; ++c)
        stage_row(c < s.queries ? base + (s.first + c) * x.stride[2] : nullptr, plan.D, plan.Dp, negate,
                  stage + c * plan.Dp);
}

// Writes the queries of a tile, given transposed as [Dp, columns], times `factor`. `work` holds as much.
template <bool kBf16, typename T>
void store_queries(const Plan<kBf16>& plan, const float* transposed, const StridedOutput& x, int64_t b,
                   int64_t h, const Sight& s, float factor, float* work) {
    const int64_t D = plan.D, Dp = plan.Dp;
    transpose(transposed, Dp, s.columns, s.columns, work, Dp);
    for (int64_t r = 0; r < s.queries; ++r) {
        T* to = x.row<T>(b, h, s.first + r);
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) store(to + d, load(work + r * Dp + d) * factor);
        for (; d < D; ++d) from_float(work[r * Dp + d] * factor, &to[d]);
    }
}

}  // namespace
}  // namespace cogview
