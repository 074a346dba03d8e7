// SPDX-License-Identifier: Apache-2.0
// Which keys a query sees: the rule of cogview_kernels/layout.py, for CPU and CUDA.
//
// Positions are divided into blocks of block_size, counted from the first position of the sample. The window
// of a query begins window_blocks - 1 blocks before its own block and ends with the query itself or, where
// the layout is not causal, window_blocks - 1 blocks after its own block. A pivot outside the window is a far
// key, left of it alone where the layout is causal: it is seen too. With the pivots of a sample sorted, the
// far keys of a query are those before its window_start, a prefix, and those after its window_last, a suffix.
// Pivots before the first position of the sample are none.
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

constexpr int32_t kNowhere = 0x7fffffff;  // the position of a key that does not exist

struct Layout {
    IntegerList pivots;  // [B, P], in any order; -1 pads
    int P;
    // Neither reaches further than the sequence, so that their product and sums stay within 31 bits. One
    // block as long as the sequence, and no pivots, is plain causal attention.
    int block_size, window_blocks;
    float pivot_bias;    // added to the logits of far keys
    IntegerList starts;  // [B]: where samples begin, behind padding; without data, all at 0
    bool causal;         // CUDA kernels know it when they are compiled

    // The first position of sample b, up to `length`. Queries before it see nothing.
    COGVIEW_HOST_DEVICE int origin_of(int b, int length) const {
        if (starts.data == nullptr) return 0;
        const int64_t origin = starts[b];
        return origin < 0 ? 0 : origin < length ? int(origin) : length;
    }

    // The first key of a query's window; `origin` is that of the sample.
    COGVIEW_HOST_DEVICE int window_start(int query, int origin) const {
        const int first_block = (query - origin) / block_size - window_blocks + 1;
        return first_block > 0 ? origin + first_block * block_size : origin;
    }

    // The last key of a query's window among `keys`.
    COGVIEW_HOST_DEVICE int window_last(int query, int origin, int keys, bool is_causal) const {
        return is_causal ? query : first_query_past(query, origin, keys) - 1;
    }

    // The first query for which a key is left of the window; at most `queries`.
    COGVIEW_HOST_DEVICE int first_query_past(int key, int origin, int queries) const {
        const int64_t query = origin + int64_t((key - origin) / block_size + window_blocks) * block_size;
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
COGVIEW_HOST_DEVICE auto sees(bool far, V key, V window_start, V window_last, bool causal) {
    if (!far) return V((key >= window_start) & (key <= window_last));
    if (causal) return V(key < window_start);
    return V((key < window_start) | ((key > window_last) & (key < kNowhere)));
}

}  // namespace cogview
