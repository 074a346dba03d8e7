// SPDX-License-Identifier: Apache-2.0
#include "layer_norm/layer_norm.h"
#include "norms/launch.h"

namespace cogview {

void layer_norm_fwd_cuda(const NormForward& args, void* stream) {
    launch_norm_forward<NormKind::kLayer>(args, static_cast<cudaStream_t>(stream));
}

void layer_norm_bwd_cuda(const NormBackward& args, void* stream) {
    launch_norm_backward<NormKind::kLayer>(args, static_cast<cudaStream_t>(stream));
}

}  // namespace cogview
