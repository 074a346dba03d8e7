// SPDX-License-Identifier: Apache-2.0
#include "norms/launch.h"
#include "sandwich_rms_norm/sandwich_rms_norm.h"

namespace cogview {

void sandwich_rms_norm_fwd_cuda(const SandwichForward& args, void* stream) {
    launch_sandwich_forward<NormKind::kRms>(args, static_cast<cudaStream_t>(stream));
}

void sandwich_rms_norm_bwd_cuda(const SandwichBackward& args, void* stream) {
    launch_sandwich_backward<NormKind::kRms>(args, static_cast<cudaStream_t>(stream));
}

}  // namespace cogview
