// SPDX-License-Identifier: Apache-2.0
// The generator of cogview_kernels/_random.py: ten rounds of Philox give two words a row, two multiplications
// a decision per element. For CPU and CUDA; internal linkage: see common/vec.h.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define COGVIEW_HOST_DEVICE __host__ __device__
#else
#define COGVIEW_HOST_DEVICE
#endif

namespace cogview {
namespace {

struct RowWords {
    uint32_t r0, r1;
};

// The first two words of Philox4x32-10 at counter (c0, c1, c2, 0).
COGVIEW_HOST_DEVICE inline RowWords philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
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
// `threshold`. `Word` is uint32_t or a vector of them.
template <typename Word>
COGVIEW_HOST_DEVICE inline auto keep_mask(Word r0, Word r1, Word column, uint32_t threshold) {
    Word x = column ^ r0;
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x ^= r1;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    x ^= x >> 16;
    return x >= threshold;
}

}  // namespace
}  // namespace cogview
