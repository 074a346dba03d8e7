// SPDX-License-Identifier: Apache-2.0
// Which keys a query sees: the rule of cogview_kernels/layout.py, for CPU and CUDA.
//
// Positions are divided into blocks of block_size. The window of a query begins window_blocks - 1 blocks
// before its own block and ends with the query itself. A pivot left of the window is a far key: it is seen
// too. With the pivots of a sample sorted, the far keys of a query are those before its window_start: a
// prefix.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace cogview {

// Contiguous integers of 2, 4 or 8 bytes each, as PyTorch has them.
struct IntegerList {
    const void* data;
    int bytes;

    COGVIEW_HOST_DEVICE int64_t operator[](int64_t i) const {
        return bytes == 8   ? static_cast<const int64_t*>(data)[i]
               : bytes == 4 ? static_cast<const int32_t*>(data)[i]
                            : static_cast<const int16_t*>(data)[i];
    }
};

struct Layout {
    IntegerList pivots;  // [B, P], in any order; -1 pads
    int P;
    // Neither reaches further than the sequence, so that their product and sums stay within 31 bits. One
    // block as long as the sequence, and no pivots, is plain causal attention.
    int block_size, window_blocks;
    float pivot_bias;  // added to the logits of far keys

    // The first key of a query's window.
    COGVIEW_HOST_DEVICE int window_start(int query) const {
        const int first_block = query / block_size - window_blocks + 1;
        return first_block > 0 ? first_block * block_size : 0;
    }

    // The last key of a query's window.
    COGVIEW_HOST_DEVICE int window_last(int query) const { return query; }

    // The first query for which a key is left of the window; at most `queries`.
    COGVIEW_HOST_DEVICE int first_query_past(int key, int queries) const {
        const int64_t query = int64_t(key / block_size + window_blocks) * block_size;
        return query < queries ? int(query) : queries;
    }
};

// How many of `count` pivots in ascending order lie left of `position`.
COGVIEW_HOST_DEVICE int pivots_before(const int32_t* sorted_pivots, int count, int position) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (sorted_pivots[middle] < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// Whether a query sees a key: as a far key, if `far`, else in its window. For integers and vectors of them.
template <typename V>
COGVIEW_HOST_DEVICE auto sees(bool far, V key, V window_start, V window_last) {
    return far ? key < window_start : ((key >= window_start) & (key <= window_last));
}

}  // namespace cogview
