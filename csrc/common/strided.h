// SPDX-License-Identifier: Apache-2.0
// Tensors of attention, [B, heads, positions, D]: the last stride is 1, the others are in elements.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace cogview {

struct StridedInput {
    const void* data;
    int64_t stride[3];

    template <typename T>
    COGVIEW_HOST_DEVICE const T* head(int64_t b, int64_t h) const {
        return static_cast<const T*>(data) + b * stride[0] + h * stride[1];
    }
    template <typename T>
    COGVIEW_HOST_DEVICE const T* row(int64_t b, int64_t h, int64_t position) const {
        return head<T>(b, h) + position * stride[2];
    }
};

struct StridedOutput {
    void* data;
    int64_t stride[3];

    template <typename T>
    COGVIEW_HOST_DEVICE T* head(int64_t b, int64_t h) const {
        return static_cast<T*>(data) + b * stride[0] + h * stride[1];
    }
    template <typename T>
    COGVIEW_HOST_DEVICE T* row(int64_t b, int64_t h, int64_t position) const {
        return head<T>(b, h) + position * stride[2];
    }
};

}  // namespace cogview
