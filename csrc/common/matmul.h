// SPDX-License-Identifier: Apache-2.0
// Small matrix products C (+)= A B held in registers, for operands that attention packs itself.
//
// Operands are arrays of 4-byte units: one float, or a pair of bfloat16 neighbouring in the contraction. So
// one kernel serves both: a unit of A is broadcast against a vector of units of B. Sums are in float.
//   A  unit (m, k) at a[k / a_block * a_next + m * a_row + k % a_block], or of a TransposedA, whose rows lie
//      side by side, at a[k / a_block * a_next + k % a_block * a_step + m]
//   B  unit (k, n) at b[k * ldb + n]
//   C  float (m, n) at c[m * ldc + n]
// n is a multiple of 16. With kBf16 also m and the units of k are multiples of 16, n and m of 32.
#pragma once

#include "common/vec.h"

namespace cogview {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasBf16 = true;
#else
constexpr bool kHasBf16 = false;
#endif

// Registers: kRows * vectors accumulators, one row of B, one broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanel = 4, kRows = 6;
#else
constexpr int kPanel = 2, kRows = 6;
#endif

struct MatmulA {
    const float* data;
    int64_t row, block, next;

    const float* unit(int64_t m, int64_t k) const { return data + m * row + k; }
    void skip_rows(int64_t m) { data += m * row; }
};

struct TransposedA {
    const float* data;
    int64_t step, block, next;

    const float* unit(int64_t m, int64_t k) const { return data + k * step + m; }
    void skip_rows(int64_t m) { data += m; }
};

template <bool kBf16>
inline VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512BF16__)
    if (kBf16)
        return bitcast<VecF>(
            _mm512_dpbf16_ps(bitcast<__m512>(c), bitcast<__m512bh>(a), bitcast<__m512bh>(b)));
#endif
#if defined(__AVX512F__)
    return bitcast<VecF>(_mm512_fmadd_ps(bitcast<__m512>(a), bitcast<__m512>(b), bitcast<__m512>(c)));
#elif defined(__FMA__)
    return bitcast<VecF>(_mm256_fmadd_ps(bitcast<__m256>(a), bitcast<__m256>(b), bitcast<__m256>(c)));
#else
    return a * b + c;
#endif
}

// A unit in every lane. By way of bytes: it may have been written as a pair of bfloat16.
inline VecF broadcast_unit(const float* p) {
    int32_t unit;
    std::memcpy(&unit, p, sizeof(unit));
    return bitcast<VecF>(VecI{} + unit);
}

template <bool kBf16, int kM, int kN, typename A>
inline void micro_kernel(int64_t K, A a, const float* b, int64_t ldb, float* c, int64_t ldc,
                         bool accumulate) {
    VecF sum[kM][kN];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) sum[m][n] = VecF{};
    for (int64_t k0 = 0; k0 < K; k0 += a.block, a.data += a.next) {
        for (int64_t k = 0; k < a.block; ++k, b += ldb) {
            VecF row[kN];
#pragma GCC unroll 4
            for (int n = 0; n < kN; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 8
            for (int m = 0; m < kM; ++m) {
                const VecF unit = broadcast_unit(a.unit(m, k));
#pragma GCC unroll 4
                for (int n = 0; n < kN; ++n) sum[m][n] = multiply_add<kBf16>(unit, row[n], sum[m][n]);
            }
        }
    }
    // Added at the end: summing by blocks errs less than carrying C through every product.
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) {
            float* to = c + m * ldc + n * kLanes;
            store(to, accumulate ? load(to) + sum[m][n] : sum[m][n]);
        }
}

template <bool kBf16, int kM, int kN, typename A>
inline void last_rows(int64_t rows, int64_t K, A a, const float* b, int64_t ldb, float* c, int64_t ldc,
                      bool accumulate) {
    if constexpr (kM > 0) {
        if (rows == kM)
            micro_kernel<kBf16, kM, kN>(K, a, b, ldb, c, ldc, accumulate);
        else
            last_rows<kBf16, kM - 1, kN>(rows, K, a, b, ldb, c, ldc, accumulate);
    }
}

template <bool kBf16, int kN, typename A>
void panel(int64_t M, int64_t K, A a, const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
    // Narrow panels leave registers for more rows, which hide the latency of an accumulation.
    constexpr int kM = kN <= 2 && kPanel == 4 ? 8 : kRows;
    int64_t m = 0;
    for (; m + kM <= M; m += kM) {
        micro_kernel<kBf16, kM, kN>(K, a, b, ldb, c + m * ldc, ldc, accumulate);
        a.skip_rows(kM);
    }
    last_rows<kBf16, kM - 1, kN>(M - m, K, a, b, ldb, c + m * ldc, ldc, accumulate);
}

#if defined(__AMX_BF16__)

// Holds the tile registers as eight of 16 rows by 64 bytes, and gives back the caller's configuration.
class TileScope {
  public:
    TileScope() {
        _tile_storeconfig(before_);
        alignas(64) uint8_t config[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        _tile_loadconfig(config);
    }
    ~TileScope() {
        if (before_[0] == 0)
            _tile_release();
        else
            _tile_loadconfig(before_);
    }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;

  private:
    alignas(64) uint8_t before_[64];
};

// 32 x 32 blocks of C in tiles 0 to 3; A in 4 and 5, B in 6 and 7.
void tile_matmul(int64_t M, int64_t N, int64_t K, MatmulA a, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool accumulate) {
    asm volatile("" ::: "memory");  // GCC's tile loads do not tell it that they read memory
    const int64_t a_bytes = a.row * 4, b_bytes = ldb * 4, c_bytes = ldc * 4;
    for (int64_t n = 0; n < N; n += 32) {
        for (int64_t m = 0; m < M; m += 32) {
            float* corner = c + m * ldc + n;
            if (accumulate) {
                _tile_loadd(0, corner, c_bytes);
                _tile_loadd(1, corner + 16, c_bytes);
                _tile_loadd(2, corner + 16 * ldc, c_bytes);
                _tile_loadd(3, corner + 16 * ldc + 16, c_bytes);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            const float* a_block = a.data + m * a.row;
            for (int64_t k0 = 0; k0 < K; k0 += a.block, a_block += a.next) {
                for (int64_t k = 0; k < a.block; k += 16) {
                    const float* b_row = b + (k0 + k) * ldb + n;
                    _tile_loadd(6, b_row, b_bytes);
                    _tile_loadd(4, a_block + k, a_bytes);
                    _tile_loadd(7, b_row + 16, b_bytes);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(5, a_block + 16 * a.row + k, a_bytes);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, corner, c_bytes);
            _tile_stored(1, corner + 16, c_bytes);
            _tile_stored(2, corner + 16 * ldc, c_bytes);
            _tile_stored(3, corner + 16 * ldc + 16, c_bytes);
        }
    }
}

#else

struct TileScope {
    TileScope() {}
    ~TileScope() {}
};

#endif

// C[M, N] (+)= A[M, K] B[K, N], with K counted in units. 2 M N K FLOPs (4 with bfloat16 pairs).
template <bool kBf16, typename A = MatmulA>
void matmul(int64_t M, int64_t N, int64_t K, A a, const float* b, int64_t ldb, float* c, int64_t ldc,
            bool accumulate) {
#if defined(__AMX_BF16__)
    if constexpr (kBf16) return tile_matmul(M, N, K, a, b, ldb, c, ldc, accumulate);
#endif
    int64_t vectors = N / kLanes;
    for (int64_t n = 0; vectors > 0;) {
        // 5 vectors go as 3 and 2 rather than as 4 and 1.
        const int64_t width = vectors <= kPanel ? vectors : vectors < 2 * kPanel ? (vectors + 1) / 2 : kPanel;
        const float* b_n = b + n * kLanes;
        float* c_n = c + n * kLanes;
        if (width == 1) panel<kBf16, 1>(M, K, a, b_n, ldb, c_n, ldc, accumulate);
        if (width == 2) panel<kBf16, 2>(M, K, a, b_n, ldb, c_n, ldc, accumulate);
        if constexpr (kPanel > 2) {
            if (width == 3) panel<kBf16, 3>(M, K, a, b_n, ldb, c_n, ldc, accumulate);
            if (width == 4) panel<kBf16, 4>(M, K, a, b_n, ldb, c_n, ldc, accumulate);
        }
        n += width;
        vectors -= width;
    }
}

}  // namespace
}  // namespace cogview
