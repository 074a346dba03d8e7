// SPDX-License-Identifier: Apache-2.0
// The counter-based generator behind every dropout; cogview_kernels/_random.py defines it. Internal linkage,
// as files compiled per instruction set must not share inline functions (see common/vec.h).
#pragma once

#ifndef __CUDACC_RTC__
#include <cstdint>
#endif

#if defined(__CUDACC__)
#define COGVIEW_HOST_DEVICE __host__ __device__
#else
#define COGVIEW_HOST_DEVICE
#endif

namespace cogview {

// An element is dropped where its word is below `threshold`, else multiplied by `scale`.
struct Dropout {
    uint32_t threshold;  // round(p * 2^32); 0 for no dropout
    float scale;         // 1 / (1 - p)
    uint64_t seed;
    const uint64_t* seed_on_device;  // CUDA: read instead of `seed` unless nullptr
};

namespace {

struct RowWords {
    uint32_t r0, r1;
};

// The first two words of Philox4x32-10 with the counter (c0, c1, c2, 0).
COGVIEW_HOST_DEVICE inline RowWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t x0 = c0, x1 = c1, x2 = c2, x3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * x0, p1 = uint64_t(0xCD9E8D57u) * x2;
        x0 = uint32_t(p1 >> 32) ^ x1 ^ k0;
        x1 = uint32_t(p1);
        x2 = uint32_t(p0 >> 32) ^ x3 ^ k1;
        x3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {x0, x1};
}

// An element's word; row words and column are uint32_t or vectors of them, the column a vector if any is.
template <typename Row, typename Word>
COGVIEW_HOST_DEVICE inline Word dropout_word(Row r0, Row r1, Word column) {
    Word x = column ^ r0;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = x ^ r1;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

}  // namespace
}  // namespace cogview
