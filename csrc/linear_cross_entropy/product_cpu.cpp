// SPDX-License-Identifier: Apache-2.0
// out[M, N] (+)= a b, in float32 or bfloat16, for the shapes of linear cross-entropy. FLOPs: 2 M N K. Bytes:
// a and out once each; b is packed once, or once for each kSums of the results where a is transposed.
//
// PyTorch's products take longer in two cases. A transposed a in bfloat16 on the matrix unit takes two to
// three times as long as rows do, since both operands are put into another order first. And on AMD's
// processors products in float32 run at 80 to 100 % of the rate of these.
//
// Sums are in float; what is summed together does not depend on the number of threads.
#include <algorithm>
#include <stdexcept>

#include "common/matmul.h"
#include "common/pack.h"
#include "common/parallel.h"
#include "common/vec.h"
#include "common/workspace.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <bool kBf16>
constexpr bool kTiles = Product<kBf16>::kSteps;
// Columns of a panel of b: a multiple of 16, as transposing takes.
template <bool kBf16>
constexpr int64_t kWidth = kTiles<kBf16> ? 32 : std::max(16, kPanel* kLanes);

// out[0, columns) (+)= the sums of a row, rounded.
template <typename T>
void put_row(const float* sums, int64_t columns, bool add, T* out) {
    for_each_vector(columns, [&](int64_t n, auto tag) {
        const VecF sum = load(sums + n);
        store(out + n, add ? load(out + n, tag) + sum : sum, tag);
    });
}

// ---- a of rows

// Units of the contraction that one running sum takes up, since its error grows with their number; and rows
// of a that pass a panel of b, which stay in the L2 cache with it.
constexpr int64_t kRun = 512, kTaskRows = 96;

// Units [panels][K][kWidth] of b; what is beyond its columns is 0.
template <bool kBf16, typename T>
void pack_panel(const LinearCrossEntropyProduct& p, int64_t panel, int64_t units, float* to) {
    using E = typename Compute<kBf16>::type;
    constexpr int64_t width = kWidth<kBf16>, kPack = Compute<kBf16>::kPack;
    const T* b = static_cast<const T*>(p.b);
    const int64_t first = panel * width, columns = std::min(width, p.N - first);
    if (p.b_k == 1) {
        const int64_t padded = round_up(units, 16);
        const Workspace stage(width * padded), transposed(width * padded);
        E* rows = reinterpret_cast<E*>(stage.data);
        for (int64_t n = 0; n < width; ++n)
            stage_row(n < columns ? b + (first + n) * p.b_n : nullptr, p.K, padded * kPack, false,
                      rows + n * padded * kPack);
        pack_b_transposed<kBf16>(rows, width, padded * kPack, transposed.data);
        std::memcpy(to, transposed.data, units * width * sizeof(float));
        return;
    }
    const Workspace stage(kPack * width);
    E* rows = reinterpret_cast<E*>(stage.data);
    for (int64_t u = 0; u < units; ++u) {
        for (int64_t i = 0; i < kPack; ++i) {
            const int64_t k = u * kPack + i;
            stage_row(k < p.K ? b + k * p.b_k + first : nullptr, columns, width, false, rows + i * width);
        }
        pack_b(rows, kPack, width, to + u * width);
    }
}

template <bool kBf16, typename T>
void product(const LinearCrossEntropyProduct& p, int threads) {
    using E = typename Compute<kBf16>::type;
    constexpr int64_t width = kWidth<kBf16>, kPack = Compute<kBf16>::kPack;
    const int64_t units = (p.K + kPack - 1) / kPack, panels = (p.N + width - 1) / width;
    const Workspace b(panels * units * width);
    parallel_for(panels, 1, threads, [&](int64_t panel, int64_t) {
        pack_panel<kBf16, T>(p, panel, units, b.data + panel * units * width);
    });
    // Pairs must lie in one unit each.
    const bool staged = p.K % kPack != 0 || p.a_m % kPack != 0;
    parallel_for(p.M, kTaskRows, threads, [&](int64_t begin, int64_t end) {
        const int64_t rows = end - begin;
        const Workspace stage(staged ? rows * units : 0), sums(rows * width);
        const T* a = static_cast<const T*>(p.a) + begin * p.a_m;
        MatmulA from = {reinterpret_cast<const float*>(a), p.a_m / kPack, units, 0};
        if (staged) {
            E* to = reinterpret_cast<E*>(stage.data);
            for (int64_t m = 0; m < rows; ++m)
                stage_row(a + m * p.a_m, p.K, units * kPack, false, to + m * units * kPack);
            from = {stage.data, units, units, 0};
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t first = panel * width, columns = std::min(width, p.N - first);
            T* out = static_cast<T*>(p.out) + begin * p.out_m + first;
            // Whole vectors of floats are summed where they belong.
            const bool direct = std::is_same<T, float>::value && columns % kLanes == 0;
            float* c = direct ? reinterpret_cast<float*>(out) : sums.data;
            const int64_t row = direct ? p.out_m : width;
            for (int64_t u = 0; u < units; u += kRun) {
                MatmulA part = from;
                part.data += u;
                part.block = std::min(kRun, units - u);
                matmul<kBf16>(rows, round_up(columns, kLanes), part.block, part,
                              b.data + (panel * units + u) * width, width, c, row,
                              u > 0 || (direct && p.add));
            }
            for (int64_t m = 0; m < rows && !direct; ++m)
                put_row(sums.data + m * width, columns, p.add, out + m * p.out_m);
        }
    });
}

// ---- a transposed: a contraction over very many rows, of which kDepth at a time are packed and stay in the
// L2 cache of one core

// Elements of the contraction; 32 make a group, 16 units with pairs.
template <bool kBf16>
constexpr int64_t kDepth = kTiles<kBf16> ? 256 : 512;
constexpr int64_t kGroup = 32;
// Rows of the results that pass a panel of b.
constexpr int64_t kSlab = 256;
// Parts of the contraction, and sums of each that are held at a time: 16 MB in all, at most.
constexpr int64_t kParts = 8, kSums = 1 << 19;

// units[c] = (low[c], high[c]) for c < columns, else 0; either row may be absent. `width` is a multiple
// of 16.
inline void pair_rows(const BFloat16* low, const BFloat16* high, int64_t columns, int64_t width,
                      float* units) {
    const auto pairs = [=](int64_t c, auto tag) {
        const auto part = [=](const BFloat16* row) { return row == nullptr ? VecF{} : load(row + c, tag); };
        return exact_pair(part(low), part(high));
    };
    for (int64_t c = 0; c < width; c += kLanes) {
        if (c + kLanes <= columns)
            store(units + c, pairs(c, Whole{}));
        else
            store(units + c, c < columns ? pairs(c, Part{int(columns - c)}) : VecF{});
    }
}

// `rows` rows of the results from `first` on; `padded` and `width` are multiples of 32.
template <bool kBf16, typename T>
struct Rows {
    const LinearCrossEntropyProduct& p;
    int64_t first, rows, padded, width;

    static constexpr int64_t kPack = Compute<kBf16>::kPack, kUnits = kDepth<kBf16> / kPack;
    static constexpr int64_t kGroupUnits = kGroup / kPack, kPanelWidth = kWidth<kBf16>;

    // sums[padded, width] = the products over the blocks of kDepth rows from `begin` to `end`.
    void add_up(int64_t begin, int64_t end, float* sums) const {
        const Workspace a(kUnits * std::min(kSlab, padded)), b(kUnits * width), work(kGroupUnits * kSlab);
        const TileScope tiles;
        for (int64_t block = begin; block < end; ++block) {
            for (int64_t u = 0; u < kUnits; ++u) pack_b(block * kDepth<kBf16>, u, b.data);
            for (int64_t m = 0; m < padded; m += kSlab) {
                const int64_t here = std::min(kSlab, padded - m);
                const auto from = pack_a(block * kDepth<kBf16>, m, here, a.data, work.data);
                for (int64_t column = 0; column < width; column += kPanelWidth)
                    matmul<kBf16>(here, std::min(kPanelWidth, width - column), kUnits, from,
                                  b.data + column * kUnits, kPanelWidth, sums + m * width + column, width,
                                  block > begin);
            }
        }
    }

  private:
    const T* row_of(const void* x, int64_t stride, int64_t k) const {
        return k < p.K ? static_cast<const T*>(x) + k * stride : nullptr;
    }

    // Unit u of the rows from k on, columns [from, from + count) of x, as floats or pairs [width].
    void pack_row(const void* x, int64_t stride, int64_t k, int64_t u, int64_t from, int64_t count,
                  int64_t width, float* to) const {
        const auto at = [&](int64_t row) {
            const T* data = row_of(x, stride, row);
            return data == nullptr || count <= 0 ? nullptr : data + from;
        };
        if constexpr (kBf16)
            pair_rows(at(k + 2 * u), at(k + 2 * u + 1), count, width, to);
        else
            stage_row(at(k + u), std::max<int64_t>(count, 0), width, false, to);
    }

    // Rows of the results [m, m + count): units [groups][count][16] for tiles, else [kUnits][count].
    auto pack_a(int64_t k, int64_t m, int64_t count, float* to, float* work) const {
        const int64_t real = std::min(count, rows - m);
        if constexpr (kTiles<kBf16>) {
            for (int64_t group = 0; group < kUnits; group += kGroupUnits, to += kGroupUnits * count) {
                for (int64_t u = 0; u < kGroupUnits; ++u)
                    pack_row(p.a, p.a_k, k, group + u, first + m, real, count, work + u * count);
                transpose(work, kGroupUnits, count, count, to, kGroupUnits);
            }
            return MatmulA{to - kUnits * count, kGroupUnits, kGroupUnits, kGroupUnits * count};
        } else {
            for (int64_t u = 0; u < kUnits; ++u)
                pack_row(p.a, p.a_k, k, u, first + m, real, count, to + u * count);
            return TransposedA{to, count, kUnits, 0};
        }
    }

    // Row by row into units [width / kPanelWidth][kUnits][kPanelWidth]: panel by panel would fetch a few
    // lines here and there.
    void pack_b(int64_t k, int64_t u, float* units) const {
        for (int64_t column = 0; column < width; column += kPanelWidth)
            pack_row(p.b, p.b_k, k, u, column, std::min(kPanelWidth, p.N - column), kPanelWidth,
                     units + column * kUnits + u * kPanelWidth);
    }
};

template <bool kBf16, typename T>
void transposed_product(const LinearCrossEntropyProduct& p, int threads) {
    const int64_t width = round_up(p.N, kWidth<kBf16>), blocks = (p.K + kDepth<kBf16> - 1) / kDepth<kBf16>;
    const int64_t parts = std::min(kParts, blocks);
    const int64_t most = std::min(round_up(p.M, 32), std::max<int64_t>(32, round_down(kSums / width, 32)));
    // Where there are more threads than parts, the rows are divided as well, and b is packed for each slice.
    const int64_t slices = std::clamp<int64_t>((threads + parts - 1) / parts, 1, most / 32);
    const int64_t slice = round_up((most + slices - 1) / slices, 32);
    const Workspace sums(parts * most * width);
    const auto sums_of = [&](int64_t part, int64_t m) { return sums.data + (part * most + m) * width; };
    for (int64_t first = 0; first < p.M; first += most) {
        const int64_t here = std::min(most, p.M - first);
        parallel_for(parts * slices, 1, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t part = i / slices, m = i % slices * slice, count = std::min(slice, here - m);
                if (count <= 0) continue;
                const Rows<kBf16, T> rows = {p, first + m, count, round_up(count, 32), width};
                rows.add_up(part * blocks / parts, (part + 1) * blocks / parts, sums_of(part, m));
            }
        });
        parallel_for(here, 32, threads, [&](int64_t begin, int64_t end) {
            const Workspace total(width);
            for (int64_t m = begin; m < end; ++m) {
                for (int64_t n = 0; n < width; n += kLanes) {
                    VecF sum = load(sums_of(0, m) + n);
                    for (int64_t part = 1; part < parts; ++part) sum += load(sums_of(part, m) + n);
                    store(total.data + n, sum);
                }
                put_row(total.data, p.N, p.add, static_cast<T*>(p.out) + (first + m) * p.out_m);
            }
        });
    }
}

template <bool kBf16, typename T>
void multiply(const LinearCrossEntropyProduct& p, int threads) {
    if (p.a_k != 1)
        transposed_product<kBf16, T>(p, threads);
    else if constexpr (!kTiles<kBf16>)
        product<kBf16, T>(p, threads);
    else
        throw std::logic_error("a product of rows of bfloat16 by tiles");
}

}  // namespace

void linear_cross_entropy_product_cpu(const LinearCrossEntropyProduct& p, int threads) {
    if (p.dtype == DType::kFloat32) return multiply<false, float>(p, threads);
    if constexpr (kHasBf16) {
        if (p.dtype == DType::kBFloat16) return multiply<true, BFloat16>(p, threads);
    }
    throw std::logic_error("a product of a dtype that this processor does not multiply");
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
