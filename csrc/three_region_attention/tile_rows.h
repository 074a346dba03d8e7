// SPDX-License-Identifier: Apache-2.0
// Rows of tensors into the tiles that attention multiplies on the CPU, and back. Internal linkage: see
// common/vec.h.
#pragma once

#include "three_region_attention/plan.h"

namespace cogview {
namespace {

// The packed keys or values of one key head, in slots.
struct PackedHead {
    float* rows;        // [S, Du]: A operand
    float* transposed;  // [S / 32, Dp, 32 / kPack]: A operand, keys contracted
};

enum class Order { kRows, kTransposed, kBoth };

// What pack_tile() works in, times Dp.
constexpr int64_t kPackFloats = 2 * kTile;

// Packs tile `tile` of the slots of a head of x, in the orders wanted.
template <bool kBf16, typename T>
void pack_tile(const Plan<kBf16>& plan, const StridedInput& x, int64_t b, int64_t head, int64_t tile,
               const PackedHead& to, Order order, float* work) {
    using E = typename Compute<kBf16>::type;
    float* const stage_at = order == Order::kTransposed ? work : to.rows + tile * kTile * plan.Du;
    E* stage = reinterpret_cast<E*>(stage_at);
    const T* base = x.head<T>(b, head);
    for (int64_t r = 0; r < kTile; ++r) {
        const int64_t position = plan.slot_position(b, tile * kTile + r);
        stage_row(position < plan.T ? base + position * x.stride[2] : nullptr, plan.D, plan.Dp, false,
                  stage + r * plan.Dp);
    }
    if (order != Order::kRows)
        pack_a_transposed(stage, plan.Dp, to.transposed + tile * kTile * plan.Du, work + kTile * plan.Dp);
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
