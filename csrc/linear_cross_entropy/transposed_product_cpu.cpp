// SPDX-License-Identifier: Apache-2.0
// out[M, N] = a^T b in bfloat16 on the matrix unit, for a contraction over very many rows. PyTorch's product
// takes two to three times as long for this shape as for that of the logits, since both operands have to be
// put into another order first. Here that is done for kDepth rows at a time, which stay in the L2 cache of
// one core.
//
// FLOPs: 2 M N K. Bytes: a and b once, b again for each kSums of the results. Sums are in float; the parts of
// the contraction are the same however many threads there are, and are summed in their order.
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

// Rows of the contraction that are packed at a time; 32 make a group, 16 units.
constexpr int64_t kDepth = 256, kGroup = 32, kUnits = kGroup / 2;
// Columns of a panel of B, and rows of A that pass one.
constexpr int64_t kPanelWidth = 32, kTaskRows = 256;
// Parts of the contraction, and sums of each that are held at a time: 16 MB in all, at most.
constexpr int64_t kParts = 8, kSums = 1 << 19;

// units[c] = (low[c], high[c]) for c < columns, else 0; either row may be absent. `width` is a multiple
// of 16.
void pair_rows(const BFloat16* low, const BFloat16* high, int64_t columns, int64_t width, float* units) {
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
struct Rows {
    const LinearCrossEntropyTransposedProduct& p;
    int64_t first, rows, padded, width;

    // sums[padded, width] = the products over `blocks` of kDepth rows from the `begin`th block on.
    void add_up(int64_t begin, int64_t blocks, float* sums) const {
        const Workspace a(padded * kDepth / 2), b(width * kDepth / 2), pairs(kUnits * padded);
        const TileScope tiles;
        for (int64_t block = begin; block < begin + blocks; ++block) {
            for (int64_t group = 0; group < kDepth / kGroup; ++group) {
                const int64_t k = block * kDepth + group * kGroup;
                pack_a(k, pairs.data, a.data + group * kUnits * padded);
                pack_b(k, b.data + group * kUnits * kPanelWidth);
            }
            for (int64_t row = 0; row < padded; row += kTaskRows)
                for (int64_t column = 0; column < width; column += kPanelWidth)
                    matmul<kHasBf16>(std::min(kTaskRows, padded - row), kPanelWidth, kDepth / 2,
                                     MatmulA{a.data + row * kUnits, kUnits, kUnits, kUnits * padded},
                                     b.data + column * (kDepth / 2), kPanelWidth, sums + row * width + column,
                                     width, block > begin);
        }
    }

  private:
    const BFloat16* row_of(const BFloat16* x, int64_t stride, int64_t row) const {
        return row < p.K ? x + row * stride : nullptr;
    }

    // A group of rows from k on as units [padded, 16].
    void pack_a(int64_t k, float* pairs, float* units) const {
        for (int64_t r = 0; r < kUnits; ++r)
            pair_rows(row_of(p.a + first, p.a_stride, k + 2 * r),
                      row_of(p.a + first, p.a_stride, k + 2 * r + 1), rows, padded, pairs + r * padded);
        transpose(pairs, kUnits, padded, padded, units, kUnits);
    }

    // A group of rows from k on as units [width / 32][kDepth / 2][32], of which it has 16 of each panel. Row
    // by row: panel by panel would fetch 64 bytes here and there.
    void pack_b(int64_t k, float* units) const {
        for (int64_t r = 0; r < kGroup; r += 2, units += kPanelWidth) {
            const BFloat16 *low = row_of(p.b, p.b_stride, k + r), *high = row_of(p.b, p.b_stride, k + r + 1);
            for (int64_t column = 0; column < width; column += kPanelWidth)
                pair_rows(low == nullptr ? low : low + column, high == nullptr ? high : high + column,
                          std::min(kPanelWidth, p.N - column), kPanelWidth, units + column * (kDepth / 2));
        }
    }
};

}  // namespace

void linear_cross_entropy_transposed_product_cpu(const LinearCrossEntropyTransposedProduct& p, int threads) {
    if constexpr (!kHasBf16) throw std::logic_error("a product of pairs of bfloat16 on a processor without");
    const int64_t width = round_up(p.N, kPanelWidth), blocks = (p.K + kDepth - 1) / kDepth;
    const int64_t each = (blocks + kParts - 1) / kParts, parts = (blocks + each - 1) / each;
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
                const Rows rows = {p, first + m, count, round_up(count, 32), width};
                rows.add_up(part * each, std::min(each, blocks - part * each), sums_of(part, m));
            }
        });
        parallel_for(here, 32, threads, [&](int64_t begin, int64_t end) {
            for (int64_t m = begin; m < end; ++m) {
                BFloat16* out = p.out + (first + m) * p.out_stride;
                for_each_vector(p.N, [&](int64_t n, auto tag) {
                    VecF sum = load(sums_of(0, m) + n);
                    for (int64_t part = 1; part < parts; ++part) sum += load(sums_of(part, m) + n);
                    store(out + n, sum, tag);
                });
            }
        });
    }
}

}  // namespace COGVIEW_ISA
}  // namespace cogview
