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
#include <cstring>
#include <stdexcept>

#include "common/panels.h"
#include "common/parallel.h"
#include "common/prefetch.h"
#include "common/vec.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace cogview {
namespace COGVIEW_ISA {
namespace {

template <bool kBf16>
constexpr bool kTiles = Product<kBf16>::kSteps;
// Columns of a panel of b.
template <bool kBf16>
constexpr int64_t kWidth = kTiles<kBf16> ? 32 : kPanelColumns;

// out[0, columns) (+)= the sums of a row, rounded.
template <typename T>
void put_row(const float* sums, int64_t columns, bool add, T* out) {
    for_each_vector(columns, [&](int64_t n, auto tag) {
        const VecF sum = load(sums + n);
        store(out + n, add ? load(out + n, tag) + sum : sum, tag);
    });
}

// The lanes that count of a vector in memory, whatever its elements are.
template <typename Vec, typename E>
Vec load_lanes(const E* p, Whole) {
    return lane_vector<Vec>(p);
}
template <typename Vec, typename E>
Vec load_lanes(const E* p, Part part) {
    Vec v = {};
    std::memcpy(&v, p, part.n * sizeof(E));
    return v;
}
template <typename Vec, typename E>
void store_lanes(E* p, Vec v, Whole) {
    std::memcpy(p, &v, sizeof(v));
}
template <typename Vec, typename E>
void store_lanes(E* p, Vec v, Part part) {
    std::memcpy(p, &v, part.n * sizeof(E));
}

// (out, low) (+)= the sums of a row, in 24 bits, or at last rounded to out.
inline void put_sum(const float* sums, int64_t columns, bool add, bool last, BFloat16* out, uint8_t* low) {
    for_each_vector(columns, [&](int64_t n, auto tag) {
        VecF sum = load(sums + n);
        if (add) {
            const VecU upper = __builtin_convertvector(load_lanes<VecU16>(out + n, tag), VecU);
            const VecU below = __builtin_convertvector(load_lanes<VecU8>(low + n, tag), VecU);
            sum += bitcast<VecF>(upper << 16 | below << 8);
        }
        if (last) return store(out + n, sum, tag);
        // It would make a number of a NaN whose lowest bits are all set. Those of bfloat16 end in zeros.
        const VecU rounded = bitcast<VecU>(sum) + 0x80;
        store_lanes(out + n, upper_halves(rounded), tag);
        store_lanes(low + n, __builtin_convertvector(rounded >> 8, VecU8), tag);
    });
}

// ---- a of rows

// Rows of a that pass a panel of b, which stay in the L2 cache with it.
constexpr int64_t kTaskRows = 96;

// A panel of b, [units, a multiple of 16][kPanelColumns]; what is beyond its columns and rows is 0, but for
// rows that no unit of a meets.
template <bool kBf16, typename T>
void pack_panel(const LinearCrossEntropyProduct& p, int64_t panel, int64_t units, float* to) {
    using E = typename Compute<kBf16>::type;
    constexpr int64_t width = kPanelColumns, kPack = Compute<kBf16>::kPack;
    const T* b = static_cast<const T*>(p.b);
    const int64_t first = panel * width, columns = std::min(width, p.N - first);
    const bool has_rows = p.b_n == 1;
    const int64_t length = has_rows ? width : units * kPack;
    const Workspace stage(has_rows ? kPack * width : width * units);
    E* rows = reinterpret_cast<E*>(stage.data);
    if (!has_rows) {
        for (int64_t n = 0; n < width; ++n)
            stage_row(n < columns ? b + (first + n) * p.b_n : nullptr, p.K, length, false, rows + n * length);
        pack_b_transposed<kBf16>(rows, width, length, to);
        return;
    }
    for (int64_t k = 0; k < p.K; k += kPack) {
        for (int64_t i = 0; i < kPack; ++i)
            stage_row(k + i < p.K ? b + (k + i) * p.b_k + first : nullptr, columns, width, false,
                      rows + i * width);
        pack_b(rows, kPack, width, to + k / kPack * width);
    }
}

template <bool kBf16, typename T>
void product(const LinearCrossEntropyProduct& p, int threads) {
    constexpr int64_t width = kPanelColumns, kPack = Compute<kBf16>::kPack;
    const int64_t units = round_up((p.K + kPack - 1) / kPack, 16), panels = (p.N + width - 1) / width;
    const Workspace b(panels * units * width);
    [[maybe_unused]] const bool amd = is_amd();
    parallel_for(panels, 1, threads, [&](int64_t panel, int64_t) {
        pack_panel<kBf16, T>(p, panel, units, b.data + panel * units * width);
    });
    parallel_for(p.M, kTaskRows, threads, [&](int64_t begin, int64_t end) {
        const int64_t rows = end - begin;
        const UnitRows<kBf16, T> a(static_cast<const T*>(p.a) + begin * p.a_m, p.a_m, rows, p.K);
        const Workspace sums(rows * width);
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t first = panel * width, columns = std::min(width, p.N - first);
            const float* b_panel = b.data + panel * units * width;
            T* out = static_cast<T*>(p.out) + begin * p.out_m + first;
            if constexpr (std::is_same<T, float>::value) {
                // Whole vectors of floats are summed where they belong.
                if (columns % kLanes == 0) {
                    a.multiply(b_panel, columns, out, p.out_m, p.add);
                    continue;
                }
            }
            if constexpr (kBf16) {
                if (p.low != nullptr) {
                    uint8_t* low = p.low + begin * p.N + first;
                    // The sums lie row by row far apart, and come from memory while the product is made.
                    for (int64_t m = 0; m < rows && p.add; ++m) {
                        prefetch(out + m * p.out_m, amd);
                        prefetch(out + m * p.out_m + std::min<int64_t>(columns, width / 2), amd);
                        prefetch(low + m * p.N, amd);
                    }
                    a.multiply(b_panel, round_up(columns, kLanes), sums.data, width, false);
                    for (int64_t m = 0; m < rows; ++m)
                        put_sum(sums.data + m * width, columns, p.add, p.last, out + m * p.out_m,
                                low + m * p.N);
                    continue;
                }
            }
            a.multiply(b_panel, round_up(columns, kLanes), sums.data, width, false);
            for (int64_t m = 0; m < rows; ++m)
                put_row(sums.data + m * width, columns, p.add, out + m * p.out_m);
        }
    });
}

// ---- a transposed: a contraction over very many rows, of which kDepth at a time are packed and stay in the
// L2 cache of one core

// Elements of the contraction; with tiles 32 make a group, 16 units.
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
    // A unit of each of the columns [from, from + count) of x, from row k on, as floats or pairs [width].
    void pack_row(const void* x, int64_t stride, int64_t k, int64_t from, int64_t count, int64_t width,
                  float* to) const {
        const auto at = [&](int64_t row) {
            return row < p.K && count > 0 ? static_cast<const T*>(x) + row * stride + from : nullptr;
        };
        if constexpr (kBf16)
            pair_rows(at(k), at(k + 1), count, width, to);
        else
            stage_row(at(k), std::max<int64_t>(count, 0), width, false, to);
    }

    // Rows of the results [m, m + count): units [groups][count][16] for tiles, else [kUnits][count].
    auto pack_a(int64_t k, int64_t m, int64_t count, float* to, float* work) const {
        const int64_t real = std::min(count, rows - m);
        if constexpr (kTiles<kBf16>) {
            for (int64_t group = 0; group < kUnits; group += kGroupUnits, to += kGroupUnits * count) {
                for (int64_t u = 0; u < kGroupUnits; ++u)
                    pack_row(p.a, p.a_k, k + kPack * (group + u), first + m, real, count, work + u * count);
                transpose(work, kGroupUnits, count, count, to, kGroupUnits);
            }
            return MatmulA{to - kUnits * count, kGroupUnits, kGroupUnits, kGroupUnits * count};
        } else {
            for (int64_t u = 0; u < kUnits; ++u)
                pack_row(p.a, p.a_k, k + kPack * u, first + m, real, count, to + u * count);
            return TransposedA{to, count, kUnits, 0};
        }
    }

    // Unit u of the rows from k on into [width / kPanelWidth][kUnits][kPanelWidth]: panel by panel would
    // fetch a few lines here and there.
    void pack_b(int64_t k, int64_t u, float* units) const {
        for (int64_t column = 0; column < width; column += kPanelWidth)
            pack_row(p.b, p.b_k, k + kPack * u, column, std::min(kPanelWidth, p.N - column), kPanelWidth,
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
    if (p.low != nullptr && (p.a_k != 1 || !kBf16))
        throw std::logic_error("a sum in 24 bits of columns, or of float32");
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
