// SPDX-License-Identifier: Apache-2.0
#include "norms/launch.h"
#include "rms_norm/rms_norm.h"

namespace cogview {

void rms_norm_fwd_cuda(const NormForward& args, void* stream) {
    launch_norm_forward<NormKind::kRms>(args, static_cast<cudaStream_t>(stream));
}

void rms_norm_bwd_cuda(const NormBackward& args, void* stream) {
    launch_norm_backward<NormKind::kRms>(args, static_cast<cudaStream_t>(stream));
}

}  // namespace cogview
