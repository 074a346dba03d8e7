// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace cogview {

// Turns the error of the launch just made, if any, into an exception that names the kernel.
inline void check_launch(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error));
}

// As the size of a grid, which would otherwise be cut to 32 bits without a word.
inline unsigned grid_of(const char* kernel, int64_t blocks) {
    if (blocks > 0x7fffffff)
        throw std::runtime_error(std::string(kernel) + ": more than 2^31 blocks; split the batch");
    return unsigned(blocks);
}

}  // namespace cogview
