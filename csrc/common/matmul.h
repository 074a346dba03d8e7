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
        // GCC takes it to read the first 8 bytes alone, and may leave out the stores of the others.
        asm volatile("" : : "r"(config) : "memory");
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

// GCC's intrinsics take only literals for tiles, and do not say that they read memory.
template <int kTile>
inline void tile_load(const float* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,4), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(float* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,4)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kC, int kA, int kB>
inline void tile_multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// A product by tiles that is made step by step, 32 x 32 x 16 units each, so that other work can go between:
// a step keeps the matrix unit busy for 64 cycles, in which the vector units are free. Blocks of C are in
// tiles 0 to 3, A in 4 and 5, B in 6 and 7; so one product must be finished before another begins.
class TileProduct {
  public:
    TileProduct() = default;
    TileProduct(int64_t M, int64_t N, int64_t K, MatmulA a, const float* b, int64_t ldb, float* c,
                int64_t ldc, bool accumulate)
        : M_(M),
          K_(K),
          ldb_(ldb),
          ldc_(ldc),
          accumulate_(accumulate),
          a_(a),
          b_(b),
          c_(c),
          a_at_(a.data),
          b_at_(b),
          left_(M / 32 * (N / 32) * (K / 16)) {}

    int64_t steps_left() const { return left_; }

    void step() {
        if (k_ == 0) begin();
        tile_load<6>(b_at_, ldb_);
        tile_load<4>(a_at_, a_.row);
        tile_load<7>(b_at_ + 16, ldb_);
        tile_multiply_add<0, 4, 6>();
        tile_load<5>(a_at_ + 16 * a_.row, a_.row);
        tile_multiply_add<1, 4, 7>();
        tile_multiply_add<2, 5, 6>();
        tile_multiply_add<3, 5, 7>();
        k_ += 16;
        b_at_ += 16 * ldb_;
        a_at_ += 16;
        if ((in_block_ += 16) == a_.block) {
            in_block_ = 0;
            a_at_ += a_.next - a_.block;
        }
        --left_;
        if (k_ == K_) end();
    }

    void finish() {
        while (left_ > 0) step();
    }

  private:
    void begin() const {
        if (!accumulate_) {
            tile_zero<0>();
            tile_zero<1>();
            tile_zero<2>();
            tile_zero<3>();
            return;
        }
        const float* corner = c_ + m_ * ldc_ + n_;
        tile_load<0>(corner, ldc_);
        tile_load<1>(corner + 16, ldc_);
        tile_load<2>(corner + 16 * ldc_, ldc_);
        tile_load<3>(corner + 16 * ldc_ + 16, ldc_);
    }

    void end() {
        float* corner = c_ + m_ * ldc_ + n_;
        tile_store<0>(corner, ldc_);
        tile_store<1>(corner + 16, ldc_);
        tile_store<2>(corner + 16 * ldc_, ldc_);
        tile_store<3>(corner + 16 * ldc_ + 16, ldc_);
        k_ = in_block_ = 0;
        m_ += 32;
        if (m_ == M_) {
            m_ = 0;
            n_ += 32;
        }
        a_at_ = a_.data + m_ * a_.row;
        b_at_ = b_ + n_;
    }

    int64_t M_ = 0, K_ = 0, ldb_ = 0, ldc_ = 0;
    bool accumulate_ = false;
    MatmulA a_ = {};
    const float* b_ = nullptr;
    float* c_ = nullptr;
    const float *a_at_ = nullptr, *b_at_ = nullptr;
    int64_t m_ = 0, n_ = 0, k_ = 0, in_block_ = 0, left_ = 0;
};

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
    if constexpr (kBf16) return TileProduct(M, N, K, a, b, ldb, c, ldc, accumulate).finish();
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

// A product that is made when it is finished. In bfloat16 on a processor with tiles (kSteps) it may be made
// in steps before that.
template <bool kBf16>
class Product {
  public:
    static constexpr bool kSteps = false;
    Product() = default;
    Product(int64_t M, int64_t N, int64_t K, MatmulA a, const float* b, int64_t ldb, float* c, int64_t ldc,
            bool accumulate)
        : M_(M), N_(N), K_(K), a_(a), b_(b), ldb_(ldb), c_(c), ldc_(ldc), accumulate_(accumulate) {}
    Product(int64_t M, int64_t N, int64_t K, TransposedA a, const float* b, int64_t ldb, float* c,
            int64_t ldc, bool accumulate)
        : M_(M), N_(N), K_(K), transposed_(a), b_(b), ldb_(ldb), c_(c), ldc_(ldc), accumulate_(accumulate) {}

    void finish() {
        const int64_t M = M_;
        M_ = 0;
        if (M == 0) return;
        if (a_.data != nullptr)
            matmul<kBf16>(M, N_, K_, a_, b_, ldb_, c_, ldc_, accumulate_);
        else
            matmul<kBf16>(M, N_, K_, transposed_, b_, ldb_, c_, ldc_, accumulate_);
    }

  private:
    int64_t M_ = 0, N_ = 0, K_ = 0;
    MatmulA a_ = {};
    TransposedA transposed_ = {};  // where a_ is not
    const float* b_ = nullptr;
    int64_t ldb_ = 0;
    float* c_ = nullptr;
    int64_t ldc_ = 0;
    bool accumulate_ = false;
};

#if defined(__AMX_BF16__)
template <>
class Product<true> : public TileProduct {
  public:
    static constexpr bool kSteps = true;
    using TileProduct::TileProduct;
};
#endif

// Spreads the steps of some products, one after the other, evenly over the turns of a loop. Does nothing
// where products have no steps.
template <bool kBf16>
class Spread {
  public:
    Spread(Product<kBf16>* products, int count, int64_t turns) : product_(products), turns_(turns) {
        if constexpr (Product<kBf16>::kSteps)
            for (int i = 0; i < count; ++i) steps_ += products[i].steps_left();
    }

    void turn() {
        if constexpr (Product<kBf16>::kSteps) {
            for (due_ += steps_; due_ >= turns_; due_ -= turns_) {
                while (product_->steps_left() == 0) ++product_;
                product_->step();
            }
        }
    }

  private:
    Product<kBf16>* product_;
    int64_t turns_, steps_ = 0, due_ = 0;
};

}  // namespace
}  // namespace cogview
