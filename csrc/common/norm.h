// SPDX-License-Identifier: Apache-2.0
// What the interfaces of layer_norm and sandwich_layer_norm share.
#pragma once

#include "common/dtype.h"

namespace cogview {

// Whose absolute maximum turns eps into eps * (maximum / 8)^2: no one's, the row's, the whole tensor's.
enum class PbRelax : int { kNone = 0, kRow = 1, kTensor = 2 };

// A weight or bias of C elements, or its gradient; `data` is nullptr where there is none.
struct Parameter {
    void* data;
    DType dtype;
};

// An element is dropped where its word is below `threshold`, else multiplied by `scale`.
struct Dropout {
    uint32_t threshold;  // round(p * 2^32); 0 for no dropout
    float scale;         // 1 / (1 - p)
    uint64_t seed;
    const uint64_t* seed_on_device;  // CUDA: read instead of `seed` unless nullptr
};

}  // namespace cogview
