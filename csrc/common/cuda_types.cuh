// SPDX-License-Identifier: Apache-2.0
// Element types on the device: arithmetic is in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace cogview {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
struct CudaType;
template <>
struct CudaType<float> {
    using type = float;
};
template <>
struct CudaType<Half> {
    using type = __half;
};
template <>
struct CudaType<BFloat16> {
    using type = __nv_bfloat16;
};

__device__ inline float widen(float x) {
    return x;
}
__device__ inline float widen(__half x) {
    return __half2float(x);
}
__device__ inline float widen(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ inline void narrow(float x, float* to) {
    *to = x;
}
__device__ inline void narrow(float x, __half* to) {
    *to = __float2half_rn(x);
}
__device__ inline void narrow(float x, __nv_bfloat16* to) {
    *to = __float2bfloat16_rn(x);
}

}  // namespace
}  // namespace cogview
