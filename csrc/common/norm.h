// SPDX-License-Identifier: Apache-2.0
// What the interfaces of layer_norm and sandwich_layer_norm share.
#pragma once

#include "common/dropout.h"
#include "common/dtype.h"

namespace cogview {

// Whose absolute maximum turns eps into eps * (maximum / 8)^2: no one's, the row's, the whole tensor's.
enum class PbRelax : int { kNone = 0, kRow = 1, kTensor = 2 };

// A weight or bias of C elements, or its gradient; `data` is nullptr where there is none.
struct Parameter {
    void* data;
    DType dtype;
};

}  // namespace cogview
