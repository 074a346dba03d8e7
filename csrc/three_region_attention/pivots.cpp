// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <stdexcept>
#include <string>

#include "three_region_attention/three_region_attention.h"

namespace cogview {

SortedPivots::SortedPivots(const AttentionShape& a) {
    for (int64_t b = 0; b < a.B; ++b) {
        for (int64_t p = 0; p < a.P; ++p) {
            const int64_t position = a.pivots[b * a.P + p];
            if (position < -1 || position >= a.T)
                throw std::invalid_argument(
                    "three_region_attention: layout.pivots must lie in [0, " + std::to_string(a.T) +
                    ") (-1 pads), got " + std::to_string(position) + "; draw them for this sequence length");
        }
    }
    positions = new int32_t[a.B * (a.P + a.T + 1) + 1];
    slots = positions + a.B * a.P;
    counts = slots + a.B * a.T;
    // Sorting by marking: a pivot is a position.
    std::fill(slots, slots + a.B * a.T, -1);
    for (int64_t b = 0; b < a.B; ++b) {
        for (int64_t p = 0; p < a.P; ++p) {
            const int64_t position = a.pivots[b * a.P + p];
            if (position < 0) continue;
            if (slots[b * a.T + position] >= 0) {
                delete[] positions;
                throw std::invalid_argument(
                    "three_region_attention: layout.pivots must be unique within a sample, got " +
                    std::to_string(position) + " twice");
            }
            slots[b * a.T + position] = 0;
        }
        int32_t count = 0;
        for (int64_t j = 0; j < a.T; ++j) {
            if (slots[b * a.T + j] < 0) continue;
            positions[b * a.P + count] = int32_t(j);
            slots[b * a.T + j] = count++;
        }
        counts[b] = count;
    }
}

SortedPivots::~SortedPivots() {
    delete[] positions;
}

}  // namespace cogview
