// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

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

}  // namespace cogview
