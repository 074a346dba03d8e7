// SPDX-License-Identifier: Apache-2.0
// Positions that Python hands to kernels of the CPU, which would read past a cache with wrong ones.
#pragma once

#include <stdexcept>
#include <string>

#include "common/regions.h"

namespace cogview {

// `lengths` are those of B samples; `size` says in words what `most` is.
inline void check_lengths(const char* op, IntegerList lengths, int64_t B, int64_t most, const char* size) {
    for (int64_t b = 0; b < B; ++b)
        if (lengths[b] < 0 || lengths[b] > most)
            throw std::invalid_argument(std::string(op) + ": lengths must lie in [0, " +
                                        std::to_string(most) + "] (" + size + "), got " +
                                        std::to_string(lengths[b]));
}

// Pivots of a cache with S positions; -1 pads.
inline void check_pivots(const char* op, const Layout& layout, int64_t B, int64_t S) {
    for (int64_t i = 0; i < B * layout.P; ++i)
        if (layout.pivots[i] < -1 || layout.pivots[i] >= S)
            throw std::invalid_argument(std::string(op) + ": layout.pivots must lie in [0, " +
                                        std::to_string(S) + "), the cache's size (-1 pads), got " +
                                        std::to_string(layout.pivots[i]));
}

}  // namespace cogview
