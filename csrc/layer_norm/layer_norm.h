// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/isa.h"
#include "norms/single.h"

namespace cogview {

COGVIEW_DECLARE_PER_ISA(void layer_norm_fwd_cpu(const NormForward& args, int threads);
                        void layer_norm_bwd_cpu(const NormBackward& args, int threads);)

#if COGVIEW_HAS_CUDA
// `stream` is a cudaStream_t. Rows of up to kMaxWidth. Throws std::runtime_error with the kernel's name.
void layer_norm_fwd_cuda(const NormForward& args, void* stream);
void layer_norm_bwd_cuda(const NormBackward& args, void* stream);
#endif

}  // namespace cogview
