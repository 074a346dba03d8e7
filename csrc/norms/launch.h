// SPDX-License-Identifier: Apache-2.0
// What the launchers of the norms share.
#pragma once

#include <initializer_list>

#include "common/cuda_check.h"
#include "norms/block.cuh"

namespace cogview {
namespace {

inline int norm_threads(int64_t C) {
    return int((C + kColumns - 1) / kColumns + 31) / 32 * 32;
}

// Whether rows can be read 16 bytes at a time.
inline bool norm_vector(int64_t C, std::initializer_list<const void*> tensors) {
    bool aligned = C % kColumns == 0;
    for (const void* x : tensors) aligned = aligned && reinterpret_cast<uintptr_t>(x) % 16 == 0;
    return aligned;
}

// Adds up what the blocks of a backward pass left: `slots` rows of C sums each.
inline void launch_reduce_partials(const BlockWorkspace& partials, int slots, int64_t C,
                                   const ParameterGradients& to, cudaStream_t stream) {
    bool any = false;
    for (const Parameter& p : to.of) any = any || p.data != nullptr;
    if (!any) return;
    norm_reduce_partials_kernel<<<dim3(unsigned((C + 127) / 128), slots), 128, 0, stream>>>(
        partials.data, partials.blocks, slots, int(C), to);
    check_launch("norm_reduce_partials_kernel");
}

}  // namespace
}  // namespace cogview
