// SPDX-License-Identifier: Apache-2.0
// Puts rows of q, k, v and dout into the orders that matmul.h reads. A unit is 4 bytes: one float, or a pair
// of bfloat16. A stage is `rows` rows of `width` elements in the compute type, zero beyond what exists.
#pragma once

#include "common/vec.h"

namespace cogview {
namespace {

inline int64_t round_down(int64_t n, int64_t to) {
    return n / to * to;
}
inline int64_t round_up(int64_t n, int64_t to) {
    return (n + to - 1) / to * to;
}

// units[c, r] = units[r, c]; rows and columns are multiples of 16.
inline void transpose_block(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
#if defined(__AVX512F__)
    __m512 x[16], y[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(from + i * ld_from);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
        x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
    // x[4 g + j], lane quarter l: rows 4 g to 4 g + 3 of column 4 l + j.
    for (int j = 0; j < 4; ++j) {
        const __m512 low0 = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88);
        const __m512 low1 = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
        const __m512 high0 = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd);
        const __m512 high1 = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
        _mm512_storeu_ps(to + j * ld_to, _mm512_shuffle_f32x4(low0, low1, 0x88));
        _mm512_storeu_ps(to + (4 + j) * ld_to, _mm512_shuffle_f32x4(high0, high1, 0x88));
        _mm512_storeu_ps(to + (8 + j) * ld_to, _mm512_shuffle_f32x4(low0, low1, 0xdd));
        _mm512_storeu_ps(to + (12 + j) * ld_to, _mm512_shuffle_f32x4(high0, high1, 0xdd));
    }
#else
    for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c) std::memcpy(to + c * ld_to + r, from + r * ld_from + c, sizeof(float));
#endif
}

inline void transpose(const float* from, int64_t rows, int64_t columns, int64_t ld_from, float* to,
                      int64_t ld_to) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 16)
            transpose_block(from + r * ld_from + c, ld_from, to + c * ld_to + r, ld_to);
}

// ---- bfloat16 pairs

// The upper halves of two vectors of floats, rounded, as pairs (low, high). Ties go away from zero; a
// NaN made by arithmetic stays one.
inline VecF pair(VecF low, VecF high) {
    const VecU half = VecU{} + 0x8000u;
    return bitcast<VecF>(((bitcast<VecU>(low) + half) >> 16) | ((bitcast<VecU>(high) + half) & 0xffff0000u));
}

// As pair(), of floats that are bfloat16 already.
inline VecF exact_pair(VecF low, VecF high) {
    return bitcast<VecF>(bitcast<VecU>(low) >> 16 | bitcast<VecU>(high));
}

// As store() of vec.h, where there is an instruction for it.
inline void store_narrow(BFloat16* p, VecF v) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh(bitcast<__m512>(v));
    std::memcpy(p, &h, sizeof(h));
#else
    store(p, v);
#endif
}

// Rows 2 r and 2 r + 1 of bfloat16 into row r of pairs; `width` is a multiple of 16.
inline void interleave(const BFloat16* stage, int64_t rows, int64_t width, float* units) {
    for (int64_t r = 0; r < rows; r += 2) {
        const BFloat16* first = stage + r * width;
        for (int64_t c = 0; c < width; c += kLanes)
            store(units + r / 2 * width + c, exact_pair(load(first + c), load(first + width + c)));
    }
}

// ---- stages

template <typename T>
inline void stage_row(const T* row, int64_t D, int64_t width, bool negate, float* stage) {
    const VecF sign = broadcast(negate ? -1.0f : 1.0f);
    int64_t d = 0;
    if (row != nullptr) {
        for (; d + kLanes <= D; d += kLanes) store(stage + d, load(row + d) * sign);
        for (; d < D; ++d) stage[d] = to_float(row[d]) * sign[0];
    }
    for (; d < width; ++d) stage[d] = 0.0f;
}

inline void stage_row(const BFloat16* row, int64_t D, int64_t width, bool negate, BFloat16* stage) {
    int64_t d = 0;
    if (row != nullptr) {
        for (; d + 16 <= D; d += 16) std::memcpy(stage + d, row + d, 16 * sizeof(BFloat16));
        for (; d < D; ++d) stage[d] = row[d];
        if (negate)
            for (int64_t i = 0; i < D; ++i) stage[i].bits ^= 0x8000;
    }
    if (d < width) std::memset(stage + d, 0, (width - d) * sizeof(BFloat16));
}

// ---- what matmul.h reads, from a stage

// The compute type of a dtype: bfloat16 where the processor multiplies it, else float.
template <bool kBf16>
struct Compute {
    using type = float;
    static constexpr int64_t kPack = 1;    // elements a unit
    static constexpr int64_t kAlign = 16;  // of head size and query rows
};
template <>
struct Compute<true> {
    using type = BFloat16;
    static constexpr int64_t kPack = 2;
    static constexpr int64_t kAlign = 32;
};

// B with the stage's columns for contraction: units [width / kPack, rows].
template <bool kBf16>
inline void pack_b_transposed(const typename Compute<kBf16>::type* stage, int64_t rows, int64_t width,
                              float* units) {
    const int64_t columns = width / Compute<kBf16>::kPack;
    transpose(reinterpret_cast<const float*>(stage), rows, columns, columns, units, rows);
}

// B with the stage's rows for contraction: units [rows / kPack, width].
inline void pack_b(const BFloat16* stage, int64_t rows, int64_t width, float* units) {
    interleave(stage, rows, width, units);
}
inline void pack_b(const float* stage, int64_t rows, int64_t width, float* units) {
    std::memcpy(units, stage, rows * width * sizeof(float));
}

// A with the stage's 32 rows for contraction: units [width, 16]. `work` has room for 16 * width units.
inline void pack_a_transposed(const BFloat16* stage, int64_t width, float* units, float* work) {
    interleave(stage, 32, width, work);
    transpose(work, 16, width, width, units, 16);
}

}  // namespace
}  // namespace cogview
