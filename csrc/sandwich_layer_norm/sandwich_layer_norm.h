// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/isa.h"
#include "norms/sandwich.h"

namespace cogview {

COGVIEW_DECLARE_PER_ISA(void sandwich_layer_norm_fwd_cpu(const SandwichForward& args, int threads);
                        void sandwich_layer_norm_bwd_cpu(const SandwichBackward& args, int threads);)

#if COGVIEW_HAS_CUDA
// `stream` is a cudaStream_t. Rows of up to kMaxWidth. Throws std::runtime_error with the kernel's name.
void sandwich_layer_norm_fwd_cuda(const SandwichForward& args, void* stream);
void sandwich_layer_norm_bwd_cuda(const SandwichBackward& args, void* stream);
#endif

}  // namespace cogview
