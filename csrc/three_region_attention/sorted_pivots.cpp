// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <stdexcept>
#include <string>

#include "three_region_attention/three_region_attention.h"

namespace cogview {

SortedPivots::SortedPivots(const AttentionShape& shape, const Layout& layout) {
    const int64_t B = shape.B, T = shape.T, P = layout.P;
    for (int64_t i = 0; i < B * P; ++i) {
        const int64_t position = layout.pivots[i];
        if (position < -1 || position >= T)
            throw std::invalid_argument("three_region_attention: layout.pivots must lie in [0, " +
                                        std::to_string(T) + ") (-1 pads), got " + std::to_string(position) +
                                        "; draw them for this sequence length");
    }
    positions = new int32_t[B * (P + T + 1) + 1];
    rank_of_pivot = positions + B * P;
    counts = rank_of_pivot + B * T;
    // Sorting by marking: a pivot is a position.
    std::fill(rank_of_pivot, rank_of_pivot + B * T, -1);
    for (int64_t b = 0; b < B; ++b) {
        int32_t* const rank = rank_of_pivot + b * T;
        for (int64_t p = 0; p < P; ++p) {
            const int64_t position = layout.pivots[b * P + p];
            if (position < 0) continue;
            if (rank[position] >= 0) {
                delete[] positions;
                throw std::invalid_argument(
                    "three_region_attention: layout.pivots must be unique within a sample, got " +
                    std::to_string(position) + " twice");
            }
            rank[position] = 0;
        }
        int32_t count = 0;
        const int64_t origin = layout.origin_of(int(b), int(T));
        std::fill(rank, rank + origin, -1);
        for (int64_t j = origin; j < T; ++j) {
            if (rank[j] < 0) continue;
            positions[b * P + count] = int32_t(j);
            rank[j] = count++;
        }
        counts[b] = count;
    }
}

SortedPivots::~SortedPivots() {
    delete[] positions;
}

}  // namespace cogview
