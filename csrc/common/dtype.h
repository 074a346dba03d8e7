// SPDX-License-Identifier: Apache-2.0
// Element types that cross from Python; the codes are those of cogview_kernels/_extension.py.
#pragma once

#include <cstdint>

namespace cogview {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Storage only: arithmetic is done in float, see common/vec.h.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

}  // namespace cogview

// Runs `...` with the C++ type of `dtype` named `scalar_t`.
#define COGVIEW_DISPATCH_DTYPE(dtype, ...)        \
    switch (dtype) {                              \
        case ::cogview::DType::kFloat32: {        \
            using scalar_t = float;               \
            __VA_ARGS__;                          \
            break;                                \
        }                                         \
        case ::cogview::DType::kFloat16: {        \
            using scalar_t = ::cogview::Half;     \
            __VA_ARGS__;                          \
            break;                                \
        }                                         \
        case ::cogview::DType::kBFloat16: {       \
            using scalar_t = ::cogview::BFloat16; \
            __VA_ARGS__;                          \
            break;                                \
        }                                         \
    }
