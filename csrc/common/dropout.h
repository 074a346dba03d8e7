// SPDX-License-Identifier: Apache-2.0
// Dropout for CPU and CUDA, by the generator of cogview_kernels/_dropout.py: ten rounds of Philox give two
// words for a row, and two multiplications per element then decide. The functions have internal linkage, for
// the reason given in common/vec.h.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace cogview {

// An element is dropped where its random word is below `keep_threshold`; one that is kept is multiplied by
// `keep_scale`.
struct Dropout {
    uint32_t keep_threshold;    // round(p * 2^32), at most 2^32 - 1; 0 for no dropout
    float keep_scale;           // 1 / (1 - p)
    uint64_t seed;              // for the CPU, and for CUDA where seed_data is nullptr
    const uint64_t* seed_data;  // CUDA: a seed in device memory

    COGVIEW_HOST_DEVICE bool drops() const { return keep_threshold != 0; }
    // Only where seed_data can be read: on the device if it lies there.
    COGVIEW_HOST_DEVICE uint64_t read_seed() const { return seed_data == nullptr ? seed : *seed_data; }
};

namespace {

struct RowWords {
    uint32_t r0, r1;
};

// The first two words of Philox4x32-10 at counter (c0, c1, c2, 0).
COGVIEW_HOST_DEVICE RowWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t x0 = c0, x1 = c1, x2 = c2, x3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * x0, b = uint64_t(0xCD9E8D57u) * x2;
        x0 = uint32_t(b >> 32) ^ x1 ^ k0;
        x1 = uint32_t(b);
        x2 = uint32_t(a >> 32) ^ x3 ^ k1;
        x3 = uint32_t(a);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {x0, x1};
}

// True (all ones in a vector) where the element at `column` of rows (r0, r1) survives: where its word reaches
// `keep_threshold`. `Word` is uint32_t or a vector of them.
template <typename Word>
COGVIEW_HOST_DEVICE auto keep_mask(Word r0, Word r1, Word column, uint32_t keep_threshold) {
    Word x = column ^ r0;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x ^= r1;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    return x >= keep_threshold;
}

}  // namespace
}  // namespace cogview
